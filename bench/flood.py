"""Under a flood: how late the events of a room of 30 are, and everyone's pings, while the crowd in another room is flooded.

The whole gateway over real servers, and as many agents as it can have: the crowd in one room, the others in rooms of 30. The
crowd's classroom gets as many events as make a million deliveries a second, more than the gateway can send one by one: its hub
is never done. A process of its own publishes to one of the small rooms at a fixed pace and is all of its agents; its latency
runs from the publish to the arrival at each. The lateness of pings is the hub's own histogram of the same time, of all agents:
the upper bound of the bucket with the p99.9.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.request import urlopen

from clients import READ_EVERY_MS, Crowd
from figures import Figures
from peers import PRESENCE
from presence_swarm.histogram import Histogram
from presence_swarm.swarm import now_ns
from processes import ROOT, Server
from sockets import AGENTS_PER_CLASSROOM, Tokens

ROOM_MEMBERS = AGENTS_PER_CLASSROOM
PROBE_EVERY_S = 0.01
PROBE_READ_EVERY_MS = 1.0  # what is read together has the arrival of the last of it
QUIET_S = 3.0
FLOOD_S = 15.0
DELIVERIES_PER_S = 1_000_000
PAYLOAD = b'"' + b"x" * 100 + b'"'
IN_FLIGHT = 200
ENTER_BYTES = 300  # at the most: what everyone in the crowd hears of each who comes
ON_THE_WAY_BYTES = 64 << 20  # of that, at once: much more than the kernel gives to TCP would be gigabytes
HEARD_S = 0.01  # nothing for so long: they have heard of each other
BEGINS = "it begins\n"
PINGS_MIN = 500  # for a figure; of fewer than a thousand the p99.9 is the latest
NATS_HELLO = b'CONNECT {"verbose":false}\r\n'

QUIET_P99_MS = "event in a room of 30, quiet, p99"
FLOODED_P99_MS = "event in a room of 30, flooded, p99"
PING_LATENESS_MS = "lateness of pings, flooded, p99.9"
WAITED = "share of the flood in which the gateway waited for a processor"
DELIVERED = "deliveries to the flooded crowd"


def measure_flood(figures: Figures, *, rounds: int, crowd_size: int, agents: int) -> None:
    """`agents` in all: those who are not in the crowd are in rooms of 30."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens(folder)
        crowd_id = str(uuid.uuid4())
        crowd = [tokens.request(number, crowd_id) for number in range(crowd_size)]
        others = tokens.requests(max(0, agents - crowd_size - ROOM_MEMBERS))
        for number in range(rounds):
            options = ("--data-dir", f"{folder}/{number}", "--auth-keys", tokens.path)
            with (
                Server("bench/gateway_server.py", *options) as server,
                Crowd(server.port, len(others) + len(crowd)) as audience,
            ):
                audience.add_agents(others)
                audience.add_agents(crowd)
                audience.connect(in_flight=IN_FLIGHT, count=len(others))
                _take_in_crowd(audience, len(crowd))
                _measure(figures, server, audience, crowd_size, crowd_id, _probe_requests(tokens, folder))
            p99, late, waited = (
                figures.of(name)[PRESENCE].values[-1] for name in (FLOODED_P99_MS, PING_LATENESS_MS, WAITED)
            )
            print(
                f"round {number + 1}: room of 30: p99 {p99:.1f} ms; pings: p99.9 within {late:g} ms; "
                f"the gateway waited for a processor {waited:.0%} of the time",
                flush=True,
            )


def _take_in_crowd(audience: Crowd, size: int) -> None:
    """At the pace at which they can hear of each other: ten thousand hear fifty million times that somebody came."""
    taken = 0
    while taken < size:
        count = min(IN_FLIGHT, ON_THE_WAY_BYTES // (ENTER_BYTES * max(1, taken)), size - taken)
        audience.connect(in_flight=count, count=count)
        taken += count
        audience.rest(HEARD_S)
    audience.rest(0.5)


def _probe_requests(tokens: Tokens, folder: str) -> tuple[str, str]:
    """The small room's id, and a file of its agents' connect_requests."""
    room_id, path = str(uuid.uuid4()), f"{folder}/room"
    with open(path, "w") as file:
        json.dump([tokens.request(number, room_id).decode() for number in range(ROOM_MEMBERS)], file)
    return room_id, path


@dataclass(frozen=True)
class Snapshot:
    """What has been counted so far."""

    at_s: float
    events: int  # that the audience has heard
    waited_s: float
    pings: dict[float, int]


def _snapshot(server: Server, audience: Crowd) -> Snapshot:
    events = audience.swarm.counters()["other_events"]
    return Snapshot(time.perf_counter(), events, server.waited_s(), ping_lateness(server))


def _measure(
    figures: Figures, server: Server, audience: Crowd, crowd_size: int, crowd_id: str, room: tuple[str, str]
) -> None:
    quiet, *_ = _probed(server, room, QUIET_S, audience)
    flood = _spawn("flood", str(server.ready["nats"]), crowd_id, str(DELIVERIES_PER_S / crowd_size))
    with _ended(flood):
        flooded, before, after = _probed(server, room, FLOOD_S, audience)
    took_s = after.at_s - before.at_s
    late_ms = quantile_ms({bound: count - before.pings.get(bound, 0) for bound, count in after.pings.items()}, 0.999)
    figures.add(QUIET_P99_MS, PRESENCE, quiet.percentile_ms(0.99))
    figures.add(FLOODED_P99_MS, PRESENCE, flooded.percentile_ms(0.99))
    figures.add(PING_LATENESS_MS, PRESENCE, late_ms)
    figures.add(WAITED, PRESENCE, (after.waited_s - before.waited_s) / took_s)
    figures.add(DELIVERED, PRESENCE, (after.events - before.events) / took_s)


def _probed(
    server: Server, room: tuple[str, str], seconds: float, audience: Crowd
) -> tuple[Histogram, Snapshot, Snapshot]:
    """What the prober measured, and what was counted when it began and when it had done. The audience reads meanwhile."""
    probe = _spawn("probe", str(server.port), str(server.ready["nats"]), *room, str(seconds))
    with _ended(probe):
        assert probe.stdout is not None
        told = select.poll()
        told.register(probe.stdout, select.POLLIN)
        while not told.poll(0):
            audience.hold(0.05, read_every_ms=READ_EVERY_MS)
        if probe.stdout.readline() != BEGINS:
            raise RuntimeError("the prober failed")
        before = _snapshot(server, audience)
        while probe.poll() is None:
            audience.hold(0.05, read_every_ms=READ_EVERY_MS)
        after = _snapshot(server, audience)
        if probe.returncode != 0:
            raise RuntimeError("the prober failed")
        return histogram_of(probe.stdout.read()), before, after


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def histogram_of(durations: str) -> Histogram:
    """What a process of these benchmarks has printed."""
    histogram = Histogram()
    histogram.add(json.loads(durations))
    return histogram


def _spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def ping_lateness(server: Server) -> dict[float, int]:
    """Cumulative counts by the upper bound, of all pings since the start."""
    with urlopen(f"http://127.0.0.1:{server.ready['http']}/metrics") as response:
        text = response.read().decode()
    buckets = re.findall(r'^presence_ping_lateness_seconds_bucket\{le="([^"]+)"\} (\S+)', text, re.MULTILINE)
    return {float(bound): int(float(count)) for bound, count in buckets}


def quantile_ms(cumulative: dict[float, int], fraction: float) -> float:
    total = max(cumulative.values())
    if total < PINGS_MIN:
        raise RuntimeError(f"{total} pings are too few")
    return min(bound for bound, count in cumulative.items() if count >= fraction * total) * 1000


# --- the processes


def nats_socket(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.recv(4096)  # INFO
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(NATS_HELLO)
    return sock


def pub(classroom_id: str, payload: bytes) -> bytes:
    return b"PUB classrooms.%s.chat %d\r\n%s\r\n" % (classroom_id.encode(), len(payload), payload)


def stamped(size: int = 0) -> bytes:
    """A payload that says when it was published, of so many bytes at the least."""
    payload = b'{"at":%d,"text":"' % now_ns()
    return payload + b"x" * (size - len(payload) - 2) + b'"}'


def flood(nats_port: int, classroom_id: str, rate: float) -> None:
    """Until it is ended."""
    sock, message = nats_socket(nats_port), pub(classroom_id, PAYLOAD)
    began, sent = time.perf_counter(), 0
    while True:
        due = int((time.perf_counter() - began) * rate) - sent
        if due:
            sock.sendall(message * due)
            sent += due
        time.sleep(0.002)


def probe(port: int, nats_port: int, room_id: str, path: str, seconds: float) -> None:
    """Says when it begins, then the histogram of the latencies, as JSON; every event has come to every member."""
    with open(path) as file:
        requests = [request.encode() for request in json.load(file)]
    sock, sent = nats_socket(nats_port), 0
    with Crowd(port, len(requests)) as room:
        room.add_agents(requests)
        room.connect(in_flight=1)
        room.rest(0.3)
        print(BEGINS, end="", flush=True)
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            sock.sendall(pub(room_id, stamped()))
            sent += 1
            room.hold(max(0.0, began + PROBE_EVERY_S - time.perf_counter()), read_every_ms=PROBE_READ_EVERY_MS)
        for member in range(len(room)):
            room.hear_all(sent, member)
        print(json.dumps(room.swarm.take()["delivery"][0]))


if __name__ == "__main__":
    if sys.argv[1] == "flood":
        flood(int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
    else:
        probe(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], float(sys.argv[6]))
