"""Under a flood: how late the events of a room of 30 are, and everyone's pings, while the crowd in another room is flooded.

The whole gateway over real servers. The crowd's classroom gets as many events as make a million deliveries a second, more than
the gateway can send one by one: its hub is never done. A process of its own publishes to the small room at a fixed pace and
reads at one of its agents; its latency runs from the publish to the read. The lateness of pings is the hub's own histogram of
the same time: the upper bound of the bucket with the p99.9.
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
from urllib.request import urlopen

from clients import Crowd, Outcome
from figures import Figures
from peers import PRESENCE
from processes import ROOT, Server
from sockets import Tokens

ROOM_MEMBERS = 30
PROBE_EVERY_S = 0.01
QUIET_S = 3.0
FLOOD_S = 8.0
DELIVERIES_PER_S = 1_000_000
PAYLOAD = b'"' + b"x" * 100 + b'"'
IN_FLIGHT = 200
PINGS_MIN = 500  # for a figure; of fewer than a thousand the p99.9 is the latest
PING_INTERVAL_S = 60
PONG_TIMEOUT_S = 59  # in the end the crowd only reads: no pong is missed before all is over
NATS_HELLO = b'CONNECT {"verbose":false}\r\n'

QUIET_P99_MS = "event in a room of 30, quiet, p99"
FLOODED_P99_MS = "event in a room of 30, flooded, p99"
PING_LATENESS_MS = "lateness of pings, flooded, p99.9"
WAITED = "share of the flood in which the gateway waited for a processor"
DELIVERED = "deliveries to the flooded crowd"


def measure_flood(figures: Figures, *, rounds: int, crowd_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens(folder)
        crowd_id = str(uuid.uuid4())
        requests = [tokens.request(number, crowd_id) for number in range(crowd_size)]
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
            with Server("bench/gateway_server.py", *options) as server, Crowd(server.port) as crowd:
                outcome = crowd.connect(crowd_size, in_flight=IN_FLIGHT, first_messages=requests)
                if outcome.failures:
                    raise RuntimeError(f"connects failed: {outcome.failures}")
                crowd.read_away(0.5)
                _measure(figures, server, crowd, crowd_id, _probe_requests(tokens, folder))
            p99, late, waited = (
                figures.of(name)[PRESENCE].values[-1] for name in (FLOODED_P99_MS, PING_LATENESS_MS, WAITED)
            )
            print(
                f"round {number + 1}: room of 30: p99 {p99:.1f} ms; pings: p99.9 within {late:g} ms; "
                f"the gateway waited for a processor {waited:.0%} of the time",
                flush=True,
            )


def _probe_requests(tokens: Tokens, folder: str) -> tuple[str, str]:
    """The small room's id, and a file of its agents' connect_requests."""
    room_id, path = str(uuid.uuid4()), f"{folder}/room"
    with open(path, "w") as file:
        json.dump([tokens.request(number, room_id).decode() for number in range(ROOM_MEMBERS)], file)
    return room_id, path


def _measure(figures: Figures, server: Server, crowd: Crowd, crowd_id: str, room: tuple[str, str]) -> None:
    quiet = _probed(server, room, QUIET_S, crowd, None)
    before = ping_lateness(server)
    read_bytes, waited_s = crowd.read_bytes, server.waited_s()
    flooded = _probed(server, room, FLOOD_S, crowd, crowd_id)
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
    figures.add(DELIVERED, PRESENCE, (crowd.read_bytes - read_bytes) / event_bytes / FLOOD_S)


def _probed(server: Server, room: tuple[str, str], seconds: float, crowd: Crowd, flooded: str | None) -> Outcome:
    """What the prober measured; the crowd reads meanwhile, and is flooded if its classroom is given."""
    nats_port = server.ready["nats"]
    probe = _spawn("probe", str(server.port), str(nats_port), *room, str(seconds))
    flood = None
    try:
        if flooded is not None:
            rate = DELIVERIES_PER_S / len(crowd.members)
            flood = _spawn("flood", str(nats_port), flooded, str(rate), str(seconds + 2))
        while probe.poll() is None:
            crowd.read_away(0.05, at_most_s=0.5)
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
