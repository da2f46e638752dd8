"""The load side of the whole-system benchmarks: the swarm of the load tests, in this process's one thread.

Every peer is driven by this same client. It opens upgrades, or whole connects, with a bounded number in flight, keeps the
sockets open, answers pings, and says how much of a core it needed itself. It owns its sockets and knows nothing of the server
but the port.

While it waits for frames it rests between two looks at the sockets. A reader that waits for each frame is woken by each frame,
at the sender's expense, unless the sender is fast enough to keep it busy: slow servers would look slower still.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from presence_swarm.histogram import Histogram
from presence_swarm.swarm import ONCE, PLAIN, Swarm, now_ns

CONNECTED_LOOK_MS = 5.0  # whether all is there
HEARD_LOOK_MS = 50.0
READ_EVERY_MS = 10.0
HOLD_READ_EVERY_MS = 50.0
LATEST_S = 5.0  # an event that has not come by then is lost


@dataclass(frozen=True)
class Outcome:
    """What connects or deliveries took. A latency runs from connect(2) to the arrival of the last byte waited for."""

    count: int
    took_s: float
    client_cpu_s: float
    latencies: Histogram = field(default_factory=Histogram)

    @property
    def rate(self) -> float:
        return self.count / self.took_s

    @property
    def client_share(self) -> float:
        """How much of one core the client needed."""
        return self.client_cpu_s / self.took_s


class Crowd:
    """Up to `capacity` sockets to one server. Used as a context manager: all are closed at its end."""

    def __init__(self, port: int, capacity: int) -> None:
        self.swarm = Swarm(capacity)
        self.swarm.set_targets([port])
        self._asked = 0  # to connect: those before this one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self.swarm

    def __len__(self) -> int:
        return len(self.swarm)

    def add_sockets(self, count: int) -> None:
        """Connected once they are upgraded; whatever the server says on top of WebSocket is counted, and not read."""
        for _ in range(count):
            self.swarm.add(b"", None, behaviour=PLAIN)

    def add_agents(self, requests: Sequence[bytes], *, behaviour: int = ONCE, group: int = 0) -> None:
        """Agents of the gateway, connected at their connect_success."""
        for request in requests:
            self.swarm.add(request, None, group, behaviour)

    def connect(self, *, in_flight: int, count: int | None = None, timeout_s: float = 120.0) -> Outcome:
        """The next `count` of those that were added, or all, `in_flight` at a time."""
        count = len(self) - self._asked if count is None else count
        if count == 0:
            return Outcome(0, 0.0, 0.0)
        self.swarm.take()
        began_ns, cpu_s = now_ns(), time.process_time()
        self.swarm.connect(in_flight, self._asked, count)
        self._asked += count
        while self.swarm.counters()["connects"] < count:
            self.swarm.run(CONNECTED_LOOK_MS)
            self._check()
            if now_ns() - began_ns > timeout_s * 1e9:
                raise TimeoutError(f"after {timeout_s:g} s: {self.swarm.gauges()}")
        cpu_s = time.process_time() - cpu_s
        taken = self.swarm.take()
        latencies = Histogram()
        for by_group in taken["connect"]:
            latencies.add(by_group)
        return Outcome(count, (taken["connected_last_ns"] - began_ns) / 1e9, cpu_s, latencies)

    def _check(self) -> None:
        """No benchmark goes on with a socket less."""
        counters = self.swarm.counters()
        if counters["ends"] or counters["refusals"]:
            closes = self.swarm.take()["closes"]
            raise ConnectionError(f"{counters['refusals']} refused; ended, by code and reason: {closes}")

    def hold(self, seconds: float, *, read_every_ms: float = HOLD_READ_EVERY_MS) -> None:
        """Stay connected: read what comes, answer pings."""
        self.swarm.run(seconds * 1000, read_every_ms)
        self._check()

    def rest(self, quiet_s: float, *, at_most_s: float = 10.0) -> None:
        """Read until nothing but pings has come for so long."""
        until, before, heard = time.perf_counter() + at_most_s, -1, self._heard()
        while heard != before and time.perf_counter() < until:
            self.hold(quiet_s, read_every_ms=READ_EVERY_MS)
            before, heard = heard, self._heard()

    def _heard(self) -> int:
        counters = self.swarm.counters()
        return counters["frames"] - counters["pings"]

    def hear(
        self,
        message: bytes,
        deliveries: int,
        bytes_each: int,
        *,
        times: int = 1,
        slack_bytes: int = 0,
        timeout_s: float = 120.0,
    ) -> Outcome:
        """The first one says `message` so many times; then read until all deliveries have come, as payload of whatever frames.

        Up to `slack_bytes` more may come, from a server that says something of its own.
        """
        payload_bytes = deliveries * bytes_each
        self.swarm.take()
        began_ns, cpu_s = now_ns(), time.process_time()
        self.swarm.say(message, times, 0, 1)
        while self.swarm.counters()["payload_bytes"] < payload_bytes:
            self.swarm.run(HEARD_LOOK_MS, READ_EVERY_MS)
            self._check()
            if now_ns() - began_ns > timeout_s * 1e9:
                raise TimeoutError(f"after {timeout_s:g} s of {payload_bytes} bytes: {self.swarm.counters()}")
        cpu_s = time.process_time() - cpu_s
        taken = self.swarm.take()
        if (extra := taken["counters"]["payload_bytes"] - payload_bytes) > slack_bytes:
            raise AssertionError(f"{extra} bytes too many")
        return Outcome(deliveries, (taken["heard_last_ns"] - began_ns) / 1e9, cpu_s)

    def hear_all(self, events: int, index: int) -> None:
        """Read until this agent has had so many stamped events since it was added."""
        until = time.perf_counter() + LATEST_S
        while (heard := self.swarm.events_of(index)) < events:
            if time.perf_counter() > until:
                raise TimeoutError(f"{events - heard} of {events} events have not come")
            self.swarm.run(READ_EVERY_MS)
