"""Under a flood: how late the events of a room of 30 are, and everyone's pings, while the crowd in another room is flooded.

The whole gateway over real servers, and as many agents as it can have: the crowd in one room, the others in rooms of 30. The
crowd's classroom gets as many events as make a million deliveries a second, more than the gateway can send one by one: its hub
is never done. A process of its own publishes to one of the small rooms at a fixed pace and reads at one of its agents; its
latency runs from the publish to the read. The lateness of pings is the hub's own histogram of the same time, of all agents: the
upper bound of the bucket with the p99.9.
"""

from __future__ import annotations

import json
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from typing import Self
from urllib.request import urlopen

from clients import Crowd, Member, Outcome
from figures import Figures
from peers import PRESENCE
from processes import ROOT, Server
from sockets import AGENTS_PER_CLASSROOM, Tokens

ROOM_MEMBERS = AGENTS_PER_CLASSROOM
PROBE_EVERY_S = 0.01
QUIET_S = 3.0
FLOOD_S = 15.0
DELIVERIES_PER_S = 1_000_000
PAYLOAD = b'"' + b"x" * 100 + b'"'
IN_FLIGHT = 200
ENTER_BYTES = 300  # at the most: what everyone in the crowd hears of each who comes
ON_THE_WAY_BYTES = 64 << 20  # of that, at once: much more than the kernel gives to TCP would be gigabytes
READ_EVERY_S = 0.01
READ_BYTES = 1 << 18
PINGS_MIN = 500  # for a figure; of fewer than a thousand the p99.9 is the latest
PING_INTERVAL_S = 240
PONG_TIMEOUT_S = 239  # agents that have arrived only read: no pong is missed before all is over
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
            options = (
                "--data-dir",
                f"{folder}/{number}",
                "--auth-keys",
                tokens.path,
                "--pong-timeout-s",
                str(PONG_TIMEOUT_S),
                "--ping-interval-s",
                str(PING_INTERVAL_S),
            )
            with Server("bench/gateway_server.py", *options) as server, Audience(server.port) as audience:
                audience.take_in(others)
                audience.take_in_crowd(crowd)
                _measure(figures, server, audience, crowd_size, crowd_id, _probe_requests(tokens, folder))
            p99, late, waited = (
                figures.of(name)[PRESENCE].values[-1] for name in (FLOODED_P99_MS, PING_LATENESS_MS, WAITED)
            )
            print(
                f"round {number + 1}: room of 30: p99 {p99:.1f} ms; pings: p99.9 within {late:g} ms; "
                f"the gateway waited for a processor {waited:.0%} of the time",
                flush=True,
            )


class Audience:
    """Agents that read what comes, and throw it away: not even pings are answered."""

    def __init__(self, port: int) -> None:
        self.read_bytes = 0
        self._port = port
        self._members: dict[int, Member] = {}
        self._poll = select.epoll()
        self._space = bytearray(READ_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members.values():
            member.sock.close()
        self._poll.close()

    def take_in(self, requests: Sequence[bytes]) -> None:
        with Crowd(self._port) as newcomers:
            outcome = newcomers.connect(len(requests), in_flight=IN_FLIGHT, first_messages=requests)
            if outcome.failures or newcomers.lost:
                raise RuntimeError(f"{newcomers.lost} lost, connects failed: {outcome.failures}")
            for fd, member in newcomers.members.items():
                self._poll.register(fd, select.EPOLLIN)
                self._members[fd] = member
            newcomers.members.clear()

    def take_in_crowd(self, requests: Sequence[bytes]) -> None:
        """At the pace at which they can hear of each other: ten thousand hear fifty million times that somebody came."""
        taken = 0
        while taken < len(requests):
            count = max(1, min(IN_FLIGHT, ON_THE_WAY_BYTES // (ENTER_BYTES * max(1, taken))))
            self.take_in(requests[taken : taken + count])
            taken += count
            self.read(READ_EVERY_S)
        self.read(0.5)

    def read(self, quiet_s: float, *, at_most_s: float = 10.0) -> None:
        """Until nothing has come for so long; at a fixed pace, as `Crowd.drain` does and for the same reason."""
        until = time.perf_counter() + at_most_s
        while time.perf_counter() < until and (ready := self._poll.poll(quiet_s, len(self._members))):
            for fd, _ in ready:
                size = self._members[fd].sock.recv_into(self._space)
                if size == 0:
                    raise ConnectionError("the gateway has closed a socket")
                self.read_bytes += size
            time.sleep(READ_EVERY_S)


def _probe_requests(tokens: Tokens, folder: str) -> tuple[str, str]:
    """The small room's id, and a file of its agents' connect_requests."""
    room_id, path = str(uuid.uuid4()), f"{folder}/room"
    with open(path, "w") as file:
        json.dump([tokens.request(number, room_id).decode() for number in range(ROOM_MEMBERS)], file)
    return room_id, path


def _measure(
    figures: Figures, server: Server, audience: Audience, crowd_size: int, crowd_id: str, room: tuple[str, str]
) -> None:
    quiet = _probed(server, room, QUIET_S, audience)
    before = ping_lateness(server)
    read_bytes, waited_s = audience.read_bytes, server.waited_s()
    flooded = _probed(server, room, FLOOD_S, audience, crowd_id, DELIVERIES_PER_S / crowd_size)
    event_bytes = (
        4
        + len(PAYLOAD)
        + len(f'{{"type":"event","id":"{"x" * 16}","subject":"classrooms.{crowd_id}.chat","payload":}}')
    )
    late_ms = quantile_ms(
        {bound: count - before.get(bound, 0) for bound, count in ping_lateness(server).items()}, 0.999
    )
    figures.add(QUIET_P99_MS, PRESENCE, quiet.percentile_ms(0.99))
    figures.add(FLOODED_P99_MS, PRESENCE, flooded.percentile_ms(0.99))
    figures.add(PING_LATENESS_MS, PRESENCE, late_ms)
    figures.add(WAITED, PRESENCE, (server.waited_s() - waited_s) / (FLOOD_S + 1))
    figures.add(DELIVERED, PRESENCE, (audience.read_bytes - read_bytes) / event_bytes / FLOOD_S)


def _probed(
    server: Server,
    room: tuple[str, str],
    seconds: float,
    audience: Audience,
    flooded: str | None = None,
    events_per_s: float = 0.0,
) -> Outcome:
    """What the prober measured; the audience reads meanwhile, and a classroom is flooded if it is given."""
    nats_port = server.ready["nats"]
    probe = _spawn("probe", str(server.port), str(nats_port), *room, str(seconds))
    flood = None
    try:
        if flooded is not None:
            flood = _spawn("flood", str(nats_port), flooded, str(events_per_s), str(seconds + 2))
        while probe.poll() is None:
            audience.read(0.05, at_most_s=0.5)
        assert probe.stdout is not None
        if probe.returncode != 0:
            raise RuntimeError("the prober failed")
        return Outcome(latencies_s=json.loads(probe.stdout.read()))
    finally:
        for process in filter(None, (probe, flood)):
            process.kill()
            process.communicate()


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


def flood(nats_port: int, classroom_id: str, rate: float, seconds: float) -> None:
    sock, message = nats_socket(nats_port), pub(classroom_id, PAYLOAD)
    began, sent = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        due = int(passed * rate) - sent
        if due:
            sock.sendall(message * due)
            sent += due
        time.sleep(0.002)


def probe(port: int, nats_port: int, room_id: str, path: str, seconds: float) -> None:
    """Prints the latencies as JSON."""
    with open(path) as file:
        requests = [request.encode() for request in json.load(file)]
    sock, latencies = nats_socket(nats_port), []
    with Crowd(port) as room:
        if failures := room.connect(len(requests), in_flight=1, first_messages=requests).failures:
            raise RuntimeError(failures)
        room.read_away(0.3)
        reader = next(iter(room.members.values())).sock
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            mark = b'"%d"' % time.perf_counter_ns()
            sock.sendall(pub(room_id, mark))
            _await(reader, mark)
            latencies.append(time.perf_counter() - began)
            for member in room.members.values():
                if member.sock is not reader:
                    _throw_away(member.sock)
            time.sleep(max(0.0, began + PROBE_EVERY_S - time.perf_counter()))
    print(json.dumps(latencies))


def _await(reader: socket.socket, mark: bytes) -> None:
    heard = b""
    while mark not in heard:
        select.select([reader], [], [])
        data = reader.recv(1 << 16)
        if not data:
            raise ConnectionError("the gateway has closed a socket")
        heard += data


def _throw_away(sock: socket.socket) -> None:
    try:
        sock.recv(1 << 16)
    except BlockingIOError:
        return


if __name__ == "__main__":
    if sys.argv[1] == "flood":
        flood(int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]))
    else:
        probe(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], float(sys.argv[6]))
