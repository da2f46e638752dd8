"""NATS: one counted subscription for each classroom, publishing in order, and flushes that prove what the server has.

Owns the client, the subscriptions and what waits to be published while NATS is away. Knows nothing of agents or events.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Self
from uuid import UUID

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import SlowConsumerError

from presence.errors import StartError, Unavailable
from presence.log import get
from presence.metrics import Metrics

log = get("bus")

OnMessage = Callable[[str, bytes, Mapping[str, str] | None], None]
OnGap = Callable[[UUID | None], None]

CONNECT_TIMEOUT_S: Final = 3
RECONNECT_WAIT_S: Final = 0.5
PING_INTERVAL_S: Final = 5
FLUSH_TIMEOUT_S: Final = 3
CLOSE_TIMEOUT_S: Final = 2
PENDING_MESSAGES: Final = 8_192
PENDING_BYTES: Final = 16 * 1024 * 1024
OUTGOING_MAX: Final = 65_536  # messages that wait while NATS is away


class Subscribed:
    """A classroom's subscription: how many use it, and whether the server is known to have it."""

    __slots__ = ("active", "subscription", "users")

    def __init__(self) -> None:
        self.users = 0
        self.active = False
        self.subscription: Subscription | None = None


class Bus:
    def __init__(self, client: Client, prefix: str, on_message: OnMessage, on_gap: OnGap, metrics: Metrics) -> None:
        self._client = client
        self._prefix = prefix
        self._on_message = on_message
        self._on_gap = on_gap
        self._metrics = metrics
        self._subscriptions: dict[UUID, Subscribed] = {}
        self._outgoing: deque[tuple[str, bytes, dict[str, str]]] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._next_flush: asyncio.Task[None] | None = None
        metrics.bus_connected.set_function(lambda: float(client.is_connected))
        metrics.bus_subscriptions.set_function(lambda: float(len(self._subscriptions)))

    @classmethod
    async def open(
        cls, url: str, *, prefix: str, name: str, on_message: OnMessage, on_gap: OnGap, metrics: Metrics
    ) -> Self:
        client = Client()
        bus = cls(client, prefix, on_message, on_gap, metrics)
        try:
            await client.connect(
                url,
                name=name,
                connect_timeout=CONNECT_TIMEOUT_S,
                max_reconnect_attempts=1,
                allow_reconnect=True,
                reconnect_time_wait=RECONNECT_WAIT_S,
                ping_interval=PING_INTERVAL_S,
                error_cb=bus._on_error,
                reconnected_cb=bus._on_reconnected,
                disconnected_cb=bus._on_disconnected,
            )
        except (NatsError, OSError, TimeoutError) as error:
            raise StartError(f"NATS cannot be reached: {error or type(error).__name__}") from error
        client.options["max_reconnect_attempts"] = -1
        return bus

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    async def subscribe(self, classroom_id: UUID) -> None:
        subscribed = self._subscriptions.get(classroom_id)
        if subscribed is None:
            subscribed = self._subscriptions[classroom_id] = Subscribed()
            subscribed.users = 1
            try:
                subscribed.subscription = await self._client.subscribe(
                    f"{self._prefix}.{classroom_id}.*",
                    cb=self._deliver,
                    pending_msgs_limit=PENDING_MESSAGES,
                    pending_bytes_limit=PENDING_BYTES,
                )
            except NatsError as error:
                self.release(classroom_id)
                raise Unavailable("NATS is away") from error
        else:
            subscribed.users += 1
        if subscribed.active:
            return
        try:
            await self.flush()
        except BaseException:
            self.release(classroom_id)
            raise
        subscribed.active = True

    def release(self, classroom_id: UUID) -> None:
        subscribed = self._subscriptions[classroom_id]
        subscribed.users -= 1
        if subscribed.users == 0:
            del self._subscriptions[classroom_id]
            if subscribed.subscription is not None and not self._client.is_closed:
                asyncio.get_running_loop().create_task(subscribed.subscription.unsubscribe())

    async def _deliver(self, message: Msg) -> None:
        self._on_message(message.subject, message.data, message.headers)

    def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        self._outgoing.append((subject, payload, headers))
        if self._next_flush is None and self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def flush(self) -> None:
        if not self.connected:
            raise Unavailable("NATS is away")
        if self._flushing is None:
            task = self._flushing = asyncio.get_running_loop().create_task(self._flush())
        else:
            if self._next_flush is None:
                self._next_flush = asyncio.get_running_loop().create_task(self._flush_after(self._flushing))
            task = self._next_flush
        await asyncio.shield(task)

    async def _flush_after(self, earlier: asyncio.Task[None]) -> None:
        await asyncio.wait([earlier])
        self._flushing, self._next_flush = self._next_flush, None
        await self._flush()

    async def _flush(self) -> None:
        try:
            while self._outgoing:
                subject, payload, headers = self._outgoing[0]
                await self._client.publish(subject, payload, headers=headers)
                self._outgoing.popleft()
            await self._client.flush(FLUSH_TIMEOUT_S)
        except (NatsError, TimeoutError) as error:
            raise Unavailable("NATS is away") from error
        finally:
            if self._flushing is asyncio.current_task():
                self._flushing = None

    async def _on_error(self, error: Exception) -> None:
        self._metrics.bus_errors.labels(type(error).__name__).inc()
        log.warning("nats_error", limited=True, error=repr(error))
        if isinstance(error, SlowConsumerError):
            self._on_gap(UUID(str(error.subject).split(".")[-2]))

    async def _on_reconnected(self) -> None:
        self._metrics.bus_reconnects.inc()
        self._on_gap(None)

    async def _on_disconnected(self) -> None:
        log.warning("nats_disconnected", limited=True)

    async def close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.flush()
        except (Unavailable, TimeoutError) as error:
            log.error("leaves_lost", count=len(self._outgoing), error=repr(error))
        await self._client.close()
