"""What a hundred slow members cost the others: the p99 of the room's last member, with and without them, in turns.

The whole gateway over real servers. A room of three hundred hears an event every four milliseconds; in every other round a
hundred of them read nothing. Their sockets fill, then their backlogs, and past the bound the gateway closes them, all within
the round. The latency runs from the publish to the read at the member that joined last of all, behind
the slow ones; a process of its own publishes, reads and keeps the room.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from urllib.request import urlopen

from clients import Crowd, Outcome
from figures import Figures
from flood import nats_socket, pub
from peers import PRESENCE
from processes import ROOT, Server
from sockets import Tokens

ROOM_MEMBERS = 300
SLOW_MEMBERS = 100
PUBLISH_EVERY_S = 0.004
EVENTS = 2_000  # in a round: twice what a slow member's socket and backlog hold
READ_EVERY = 20  # events
PAYLOAD_BYTES = 190
LONG_PINGS = ("--ping-interval-s", "600", "--pong-timeout-s", "599")  # they would end a slow member first
# Of a slow member's socket. The kernel keeps far more for a socket of the loopback device, whose segments have 64 KiB, than
# for one across a network: as many bytes as a megabyte and more would have to be sent before it is full.
SLOW_OPTIONS = ((socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096), (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_400))

ALL_READ_P99_MS = "event in a room of 300, all read, p99"
SLOW_P99_MS = "event in a room of 300, a hundred do not read, p99"
RATIO = "p99 beside slow members, to that without"


def measure_slow(figures: Figures, *, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens(folder)
        options = ("--data-dir", f"{folder}/data", "--auth-keys", tokens.path, *LONG_PINGS)
        with Server("bench/gateway_server.py", *options) as server:
            for number in range(rounds):
                # Turned round each time: whatever grows with time is no slow member's doing.
                for slow_members in (0, SLOW_MEMBERS) if number % 2 == 0 else (SLOW_MEMBERS, 0):
                    name = SLOW_P99_MS if slow_members else ALL_READ_P99_MS
                    figures.add(name, PRESENCE, _round(server, tokens, folder, slow_members).percentile_ms(0.99))
                quiet, slow = (figures.of(name)[PRESENCE].values[-1] for name in (ALL_READ_P99_MS, SLOW_P99_MS))
                figures.add(RATIO, PRESENCE, slow / quiet)
                print(f"round {number + 1}: p99 {quiet:.2f} ms, beside slow members {slow:.2f} ms", flush=True)


def _round(server: Server, tokens: Tokens, folder: str, slow_members: int) -> Outcome:
    room_id, path = str(uuid.uuid4()), f"{folder}/room"
    with open(path, "w") as file:
        json.dump([tokens.request(number, room_id).decode() for number in range(ROOM_MEMBERS)], file)
    closed = slow_consumers(server)
    arguments = (str(server.port), str(server.ready["nats"]), room_id, path, str(slow_members))
    done = subprocess.run(
        [sys.executable, __file__, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    if slow_consumers(server) - closed != slow_members:
        raise RuntimeError(f"of {slow_members} slow members {slow_consumers(server) - closed} were closed")
    return Outcome(latencies_s=json.loads(done.stdout))


def slow_consumers(server: Server) -> int:
    """Agents closed as such, since the start."""
    with urlopen(f"http://127.0.0.1:{server.ready['http']}/metrics") as response:
        match = re.search(r'^presence_closes_total\{reason="slow_consumer"\} (\S+)', response.read().decode(), re.M)
    assert match is not None
    return int(float(match[1]))


# --- the process of one round


class Room:
    """The room as its members see it."""

    def __init__(self, port: int, nats_port: int, room_id: str, requests: list[bytes], slow_members: int) -> None:
        self.publisher = nats_socket(nats_port)
        self.room_id = room_id
        self.readers, self.slow, self.last = Crowd(port), Crowd(port, options=SLOW_OPTIONS), Crowd(port)
        sizes = (len(requests) - 1 - slow_members, slow_members, 1)
        for crowd, size in zip((self.readers, self.slow, self.last), sizes, strict=True):
            part, requests = requests[:size], requests[size:]
            if failures := crowd.connect(size, in_flight=20, first_messages=part).failures:
                raise RuntimeError(failures)
            self.readers.read_away(0.2)
        self.last.read_away(0.2)
        self.published = 0

    def publish(self) -> float:
        """One event; its latency at the last member, in seconds."""
        began = time.perf_counter()
        mark = b'"%d' % time.perf_counter_ns()
        self.publisher.sendall(pub(self.room_id, mark.ljust(PAYLOAD_BYTES) + b'"'))
        self.last.read_until(mark)
        took_s = time.perf_counter() - began
        self.published += 1
        if self.published % READ_EVERY == 0:
            self.readers.throw_away()
        time.sleep(max(0.0, began + PUBLISH_EVERY_S - time.perf_counter()))
        return took_s


def main() -> None:
    """Prints the latencies as JSON."""
    port, nats_port, room_id, path, slow_members = sys.argv[1:]
    with open(path) as file:
        requests = [request.encode() for request in json.load(file)]
    room = Room(int(port), int(nats_port), room_id, requests, int(slow_members))
    print(json.dumps([room.publish() for _ in range(EVENTS)]))


if __name__ == "__main__":
    main()
