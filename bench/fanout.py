"""One room: frames a second when every event is sent on its own, and events a second when they come in bursts of ten.

nchan leaves Nagle's algorithm on: while a packet is not answered the kernel joins what comes behind it, and over loopback most
of it. The hub does not (a frame would wait for the answer to the last one, over a real network for tens of milliseconds); what
it would be without TCP_NODELAY is beside it, to be compared with nchan; and what it would be without io_uring.

nats-server joins events as it sees fit: it is measured with all of them at once, beside the others' bursts. nchan sends each on
its own however they come: it is measured with all of them at once, one message each on one of its sockets.

From the message that starts it to the last byte at the last member, all of them one client's. The bare C loop shows what
the kernel alone takes on this machine, in this run.
"""

from __future__ import annotations

import tempfile

from clients import Crowd, Outcome
from figures import Figures
from peers import BARE_C, FANOUT_SERVERS, NATS_SERVER, NCHAN, is_installed
from processes import Server, compiled

IN_FLIGHT = 200
PAYLOAD_BYTES = 190
EVENT = b"x" * PAYLOAD_BYTES
BURST = 10

NATS_HELLO = b'CONNECT {"verbose":false}\r\nSUB room 1\r\n'
NATS_PUB = b"PUB room %d\r\n%s\r\n" % (PAYLOAD_BYTES, EVENT)
NATS_MSG_BYTES = len(b"MSG room 1 %d\r\n" % PAYLOAD_BYTES) + PAYLOAD_BYTES + 2
NATS_PING = b"PING\r\n"
NATS_QUIET_S = 0.3  # then all subscriptions are there, or all has come

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
                    with Server(*command) as server, Crowd(server.port, members) as crowd:
                        _measure(figures, server, crowd, who, members, events)
                    rates = [
                        f"{name} {series[who].values[-1]:,.0f}/s"
                        for name in (FRAMES, BURSTS)
                        if who in (series := figures.of(name))
                    ]
                    print(f"round {number + 1}: {who}: {'; '.join(rates)}", flush=True)


def _measure(figures: Figures, server: Server, crowd: Crowd, who: str, members: int, events: int) -> None:
    crowd.add_sockets(members)
    crowd.connect(in_flight=IN_FLIGHT)
    if who == NATS_SERVER:
        _measure_nats(figures, server, crowd, events)
        return
    for figure, burst in ((FRAMES, 1), (BURSTS, BURST)):
        if who == NCHAN and burst > 1:
            continue
        message, times = (EVENT, events) if who == NCHAN else (b"%d %d" % (events, burst), 1)
        cpu_s = server.cpu_s()
        outcome = crowd.hear(message, members * events, PAYLOAD_BYTES, times=times)
        _add(figures, figure, who, outcome, server.cpu_s() - cpu_s)


def _measure_nats(figures: Figures, server: Server, crowd: Crowd, events: int) -> None:
    """Members that are NATS clients; one of them publishes everything at once."""
    crowd.swarm.say(NATS_HELLO)
    crowd.rest(NATS_QUIET_S)
    cpu_s = server.cpu_s()
    slack_bytes = len(crowd) * len(NATS_PING)
    outcome = crowd.hear(NATS_PUB * events, len(crowd) * events, NATS_MSG_BYTES, slack_bytes=slack_bytes)
    _add(figures, BURSTS, NATS_SERVER, outcome, server.cpu_s() - cpu_s)


def _add(figures: Figures, figure: str, who: str, outcome: Outcome, server_cpu_s: float) -> None:
    figures.add(
        figure,
        who,
        outcome.rate,
        client_share=outcome.client_share,
        server_share=server_cpu_s / outcome.took_s,
    )
