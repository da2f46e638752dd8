"""One room: frames a second when every event is sent on its own, and events a second when they come in bursts of ten.

From the message that starts it to the last byte at the last member, all read by the same client. The bare C loop shows what
the kernel alone takes on this machine, in this run.
"""

from __future__ import annotations

import tempfile

from clients import Crowd
from figures import Figures
from peers import BARE_C, FANOUT_SERVERS, is_installed
from processes import Server, compiled

IN_FLIGHT = 200
FRAME_BYTES = 4 + 190
BURST = 10

FRAMES = "fan-out, one by one"
BURSTS = "fan-out, bursts of 10"


def measure_fanout(figures: Figures, *, rounds: int, members: int, events: int) -> None:
    """Alternating rounds over one room of `members`."""
    with tempfile.TemporaryDirectory() as folder:
        program = compiled("bench/peers/bare.c", folder)
        servers = dict(FANOUT_SERVERS)
        if program is None:
            figures.skipped[BARE_C] = "there is no C compiler"
            del servers[BARE_C]
        else:
            servers[BARE_C] = (program,)
        for number in range(rounds):
            for who, command in servers.items():
                if is_installed(who, figures):
                    with Server(*command) as server, Crowd(server.port) as crowd:
                        _measure(figures, server, crowd, who, members, events)
                    rate = figures.of(FRAMES)[who].values[-1]
                    print(f"round {number + 1}: {who}: {rate:,.0f} frames/s", flush=True)


def _measure(figures: Figures, server: Server, crowd: Crowd, who: str, members: int, events: int) -> None:
    opened = crowd.connect(members, in_flight=IN_FLIGHT)
    if opened.failures:
        raise RuntimeError(f"{who}: {opened.failures}")
    for figure, burst in ((FRAMES, 1), (BURSTS, BURST)):
        cpu_s = server.cpu_s()
        outcome = crowd.drain(b"%d %d" % (events, burst), members * events * FRAME_BYTES)
        figures.add(
            figure,
            who,
            members * events / outcome.took_s,
            client_share=outcome.client_share,
            server_share=(server.cpu_s() - cpu_s) / outcome.took_s,
        )
