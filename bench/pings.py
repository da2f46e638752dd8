"""What a ping costs: microseconds of the server's CPU for one ping and its pong, all sockets idle but for that.

Each server pings as it does when it is asked to, every five seconds (uWebSockets: about as often); the client answers and
counts. Whatever else the server does for idle sockets meanwhile, timers for one thing, is part of the figure.
"""

from __future__ import annotations

from clients import Crowd
from figures import Figures
from peers import PING_INTERVAL_S, PING_SERVERS, is_installed
from processes import Server

IN_FLIGHT = 200
SETTLE_S = 1.0
WINDOW_S = 2.0 * PING_INTERVAL_S

PING_US = "CPU of one ping"


def measure_pings(figures: Figures, *, rounds: int, sockets: int) -> None:
    """Alternating rounds; every socket is pinged at least once in each, and none may be lost."""
    for number in range(rounds):
        for who, command in PING_SERVERS.items():
            if not is_installed(who, figures):
                continue
            with Server(*command) as server, Crowd(server.port, sockets) as crowd:
                crowd.add_sockets(sockets)
                crowd.connect(in_flight=IN_FLIGHT)
                crowd.hold(SETTLE_S)
                _measure(figures, server, crowd, who)
            print(f"round {number + 1}: {who}: {figures.of(PING_US)[who].values[-1]:.1f} µs a ping", flush=True)


def _measure(figures: Figures, server: Server, crowd: Crowd, who: str) -> None:
    before, cpu_s = crowd.swarm.counters()["pings"], server.cpu_s()
    crowd.hold(WINDOW_S)
    pings, cpu_s = crowd.swarm.counters()["pings"] - before, server.cpu_s() - cpu_s
    if pings < len(crowd):
        raise RuntimeError(f"{who}: {len(crowd)} sockets had {pings} pings in {WINDOW_S:g} s")
    figures.add(PING_US, who, cpu_s / pings * 1e6, server_share=cpu_s / WINDOW_S)
