"""What is published on one connection to NATS, in order, and the proof of what the server has. It ends with the connection.

Owns the messages and those who wait for a proof. Knows nothing of what is published, or of the connection's life.

Proof is an echo: a message to ourselves on the same connection, behind everything subscribed and published before it. When
it comes back the server has processed all of that, and both directions live. The client's own flush proves less: it writes
its PING past the commands that still wait in the client, and it returns at once when the client's read loop has died.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import BadHeaderError, BadSubjectError, MaxPayloadError
from nats.errors import Error as NatsError

from presence.errors import Unavailable
from presence.log import get
from presence.metrics import Metrics

log = get("bus")

CONFIRM_TIMEOUT_S: Final = 3.0
PROOF_LASTS_S: Final = 0.05
MAX_OUTGOING: Final = 65_536  # messages that wait for the ones before them to be sent


class Round:
    """What one echo is the proof of, for those who wait for it."""

    __slots__ = ("late", "number", "started", "waiters")

    def __init__(self, number: int, waiters: list[asyncio.Future[None]]) -> None:
        self.number = number
        self.waiters = waiters
        self.late: asyncio.TimerHandle | None = None
        self.started = time.perf_counter()

    def settle(self, error: Exception | None = None) -> None:
        if self.late is not None:
            self.late.cancel()
        waiters, self.waiters = self.waiters, []
        settle(waiters, error)


class Outbox:
    """`on_proven` is called after each proof, `on_late` when one takes too long, `on_broken` when the client cannot send."""

    def __init__(
        self,
        client: Client,
        echo_subject: str,
        numbers: Iterator[int],
        metrics: Metrics,
        *,
        on_proven: Callable[[], None],
        on_late: Callable[[], None],
        on_broken: Callable[[], Awaitable[None]],
    ) -> None:
        """`numbers`: of the echoes, over all connections. One of an earlier connection may come late, on this one."""
        self._client = client
        self._echo_subject = echo_subject
        self._numbers = numbers
        self._metrics = metrics
        self._on_proven = on_proven
        self._on_late = on_late
        self._on_broken = on_broken
        self._outgoing: deque[tuple[str, bytes, dict[str, str]]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._round: Round | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.proven_at = -PROOF_LASTS_S  # by perf_counter: all that was sent before has arrived

    def __len__(self) -> int:
        """How many messages wait to be sent."""
        return len(self._outgoing)

    @property
    def is_late(self) -> bool:
        """Whether a proof has taken too long: the server cannot be counted on."""
        return self.waits_s >= CONFIRM_TIMEOUT_S

    @property
    def waits_s(self) -> float:
        """How long the echo has been out; 0: none is."""
        return 0.0 if self._round is None else time.perf_counter() - self._round.started

    def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        """Send it behind all that was published before; raises Unavailable when too much waits. Never blocks."""
        if len(self._outgoing) >= MAX_OUTGOING:
            log.error("publish_refused", limited=True, waiting=len(self._outgoing))
            raise Unavailable("NATS is too slow")
        self._outgoing.append((subject, payload, headers))
        self._kick()

    async def confirm(self) -> None:
        """Return when the server has all that was subscribed and published before this call; raises Unavailable."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._kick()
        await waiter

    def probe(self) -> None:
        """Ask for a proof that nobody waits for, unless one is under way."""
        if self._round is None and not self._is_closed:
            waiters, self._waiters = self._waiters, []
            self._round = Round(next(self._numbers), waiters)
            task = asyncio.get_running_loop().create_task(self._send(self._round))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def close(self) -> None:
        """The connection is over: who waits is refused, what was not proven may be lost."""
        self._is_closed = True
        current, self._round = self._round, None
        self._outgoing.clear()
        if current is not None:
            current.settle(Unavailable("NATS is away"))
        self._refuse_waiters()

    def on_echo(self, message: Msg) -> None:
        current = self._round
        if current is None or message.data != b"%d" % current.number:
            return  # of an earlier connection
        self._round = None
        self.proven_at = current.started
        self._metrics.bus_flush_seconds.observe(time.perf_counter() - current.started)
        current.settle()
        self._kick()
        self._on_proven()

    def _kick(self) -> None:
        """What comes while a round is under way forms the next."""
        if self._outgoing or self._waiters:
            self.probe()

    async def _send(self, current: Round) -> None:
        current.late = asyncio.get_running_loop().call_later(CONFIRM_TIMEOUT_S, self._on_round_late, current)
        try:
            # As many as there are now: the rest may come as fast as they are sent.
            for _ in range(len(self._outgoing)):
                if current is not self._round:
                    return  # the connection is over
                await self._send_one(*self._outgoing.popleft())
            if not self._outgoing:  # whoever came meanwhile has nothing behind the echo: it is their proof too
                current.waiters += self._waiters
                self._waiters = []
            await self._client.publish(self._echo_subject, b"%d" % current.number)
        except (NatsError, OSError) as error:
            log.warning("publish_failed", limited=True, error=repr(error))
            if not self._is_closed:
                await self._on_broken()

    async def _send_one(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        try:
            await self._client.publish(subject, payload, headers=headers)
        except (BadHeaderError, BadSubjectError, MaxPayloadError) as error:  # no connection would take it
            self._metrics.bus_dropped.inc()
            log.error("publish_refused", limited=True, error=repr(error))

    def _on_round_late(self, late: Round) -> None:
        if late is self._round:
            log.warning("nats_late", limited=True, after_s=CONFIRM_TIMEOUT_S)
            self._on_late()
            late.settle(Unavailable("NATS does not answer"))
            self._refuse_waiters()

    def _refuse_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        settle(waiters, Unavailable("NATS is away"))


def settle(waiters: list[asyncio.Future[None]], error: Exception | None) -> None:
    for waiter in waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
