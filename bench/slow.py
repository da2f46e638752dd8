"""What a hundred slow members cost the others: the p99 of the room's last member, with and without them, in turns.

The whole gateway over real servers. A room of three hundred hears an event every four milliseconds; in every other round a
hundred of them read nothing. Their sockets fill, then their backlogs, and past the bound the gateway closes them, all within
the round. The latency runs from the publish to the arrival at the member that joined last of all, behind the slow ones; a
process of its own publishes and keeps the room.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import uuid
from urllib.request import urlopen

from clients import Crowd
from figures import Figures
from flood import histogram_of, nats_socket, pub, stamped
from peers import PRESENCE
from presence_swarm.histogram import Histogram
from presence_swarm.swarm import DEAF
from processes import ROOT, Server
from sockets import Tokens

ROOM_MEMBERS = 300
SLOW_MEMBERS = 100
PUBLISH_EVERY_S = 0.004
EVENTS = 2_000  # in a round: twice what a slow member's socket and backlog hold
READ_EVERY_MS = 1.0
LAST = 1  # the last member's group of figures
PAYLOAD_BYTES = 190
LONG_PINGS = ("--ping-interval-s", "600", "--pong-timeout-s", "599")  # they would end a slow member first

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


def _round(server: Server, tokens: Tokens, folder: str, slow_members: int) -> Histogram:
    room_id, path = str(uuid.uuid4()), f"{folder}/room"
    with open(path, "w") as file:
        json.dump([tokens.request(number, room_id).decode() for number in range(ROOM_MEMBERS)], file)
    closed = slow_consumers(server)
    numbers = (server.port, server.ready["nats"], slow_members, EVENTS, PAYLOAD_BYTES)
    arguments = (room_id, path, *map(str, numbers))
    done = subprocess.run(
        [sys.executable, __file__, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    if slow_consumers(server) - closed != slow_members:
        raise RuntimeError(f"of {slow_members} slow members {slow_consumers(server) - closed} were closed")
    return histogram_of(done.stdout)


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
        self.crowd = Crowd(port, len(requests))
        readers = len(requests) - 1 - slow_members
        self.crowd.add_agents(requests[:readers])
        self.crowd.add_agents(requests[readers:-1], behaviour=DEAF)
        self.crowd.add_agents(requests[-1:], group=LAST)
        for count in filter(None, (readers, slow_members, 1)):
            self.crowd.connect(in_flight=20, count=count)
            self.crowd.rest(0.2)

    def publish(self, payload_bytes: int) -> None:
        """One event, and what comes until the next one is due."""
        began = time.perf_counter()
        self.publisher.sendall(pub(self.room_id, stamped(payload_bytes)))
        left_s = max(0.0, began + PUBLISH_EVERY_S - time.perf_counter())
        self.crowd.swarm.run(left_s * 1000, READ_EVERY_MS)


def main() -> None:
    """Prints the histogram of the last member's latencies, as JSON."""
    room_id, path = sys.argv[1:3]
    port, nats_port, slow_members, events, payload_bytes = map(int, sys.argv[3:])
    with open(path) as file:
        requests = [request.encode() for request in json.load(file)]
    room = Room(port, nats_port, room_id, requests, slow_members)
    for _ in range(events):
        room.publish(payload_bytes)
    room.crowd.hear_all(events, len(requests) - 1)
    print(json.dumps(room.crowd.swarm.take()["delivery"][LAST]))


if __name__ == "__main__":
    main()
