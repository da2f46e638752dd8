"""NATS: one counted subscription for each classroom, requests among replicas, and the connection's life.

Owns the client and its replacement, and the subscriptions. What is published and proven on one connection is its outbox's.
Knows nothing of agents or events.

A client lives for one connection. The client's own reconnecting is switched off: it keeps half-sent commands, and a task of
it that dies is never replaced. What was published goes with its connection: whoever has it not confirmed knows whether it is
still true, and publishes it again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Self, cast
from uuid import UUID

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from presence.errors import StartError, Unavailable
from presence.log import get
from presence.metrics import Metrics
from presence.outbox import PROOF_LASTS_S, Outbox

log = get("bus")

OnMessage = Callable[[str, bytes, Mapping[str, str] | None], None]
OnGap = Callable[[], None]
Answer = Callable[[bytes], Awaitable[bytes]]

CONNECT_TIMEOUT_S: Final = 3.0
STUCK_AFTER_S: Final = 7.0  # an echo that is out for longer, at the second look: the client is replaced
WATCH_INTERVAL_S: Final = 4.0  # an idle connection is proven this often
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0
PING_INTERVAL_S: Final = 5
CLOSE_TIMEOUT_S: Final = 2.0


class Inbox:
    """Where the client puts a subscription's messages: it takes this for the future of a reply.

    The client's callbacks cost a task, a queue and a wake-up for each subscription and message. A future is set right where
    the message has been parsed, so the socket itself is the queue: it is not read while messages are worked on.
    """

    __slots__ = ("_on_message",)

    def __init__(self, on_message: Callable[[Msg], None]) -> None:
        self._on_message = on_message

    def cancelled(self) -> bool:
        return False

    def set_result(self, message: Msg) -> None:
        try:
            self._on_message(message)
        except Exception as error:  # raised on, it would end the client's read loop
            log.error("message_failed", limited=True, error=repr(error), exc_info=error)


class Topic:
    """A classroom's subscription, and how many use it."""

    __slots__ = ("classroom_id", "on_message", "remote", "users")

    def __init__(self, classroom_id: UUID, on_message: OnMessage) -> None:
        self.classroom_id = classroom_id
        self.on_message = on_message
        self.users = 0
        self.remote: Subscription | None = None

    def deliver(self, message: Msg) -> None:
        # One that nobody uses any more may still have messages on the way, beside its successor's.
        if self.users:
            self.on_message(message.subject, message.data, message.headers)


class Bus:
    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        name: str,
        echo_subject: str,
        on_message: OnMessage,
        on_gap: OnGap,
        metrics: Metrics,
    ) -> None:
        self._servers = [server.strip() for server in url.split(",")]
        self._prefix = prefix
        self._name = name
        self._echo_subject = echo_subject
        self._on_message = on_message
        self._on_gap = on_gap
        self._metrics = metrics
        self._client: Client | None = None
        self._lost = asyncio.Event()
        self._there = asyncio.Event()
        self._topics: dict[UUID, Topic] = {}
        self._services: dict[str, Answer] = {}
        self._served: dict[str, Subscription] = {}  # of this connection
        self._outbox: Outbox | None = None  # of this connection
        self._echoes = itertools.count(1)
        self._was_deaf = False
        self._owes_gap = False  # it is told when the subscriptions of the new connection are proven
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._refusal = ""  # why the last server could not be reached: the client's own error only says that none could
        metrics.bus_connected.set_function(lambda: float(self.connected))
        metrics.bus_subscriptions.set_function(lambda: float(len(self._topics)))
        metrics.bus_outgoing.set_function(lambda: float(len(self._outbox or ())))

    @classmethod
    async def open(cls, url: str, **options: Any) -> Self:
        """Connect; raises StartError. The options are those of the constructor."""
        bus = cls(url, **options)
        try:
            bus._use(await bus._connect())
            await bus.confirm()
        except (NatsError, OSError, TimeoutError, Unavailable) as error:
            await bus._drop_client()
            place = ", ".join(server.rpartition("@")[2].rpartition("/")[2] for server in bus._servers)
            why = bus._refusal or str(error) or type(error).__name__
            raise StartError(f"NATS cannot be reached at {place}: {why}") from error
        bus._keeping = asyncio.create_task(bus._keep())
        return bus

    @property
    def connected(self) -> bool:
        """Whether the server can be counted on, as far as is known."""
        return self._outbox is not None and not self._outbox.is_late

    # --- subscriptions

    async def subscribe(self, classroom_id: UUID) -> None:
        """Count one user more of the classroom's subscription; raises Unavailable. `confirm` proves that it is active."""
        topic = self._topics.get(classroom_id)
        if topic is not None:
            topic.users += 1
            return
        client = self._client
        if client is None:
            raise Unavailable("NATS is away")
        topic = self._topics[classroom_id] = Topic(classroom_id, self._on_message)
        topic.users = 1
        try:
            await self._subscribe(client, topic)
        except NatsError as error:
            self.release(classroom_id)
            raise Unavailable("NATS is away") from error

    async def _subscribe(self, client: Client, topic: Topic) -> None:
        topic.remote = await client.subscribe(f"{self._prefix}.{topic.classroom_id}.*", future=_inbox(topic.deliver))

    def release(self, classroom_id: UUID) -> None:
        """One user less; the last one ends the subscription."""
        topic = self._topics[classroom_id]
        topic.users -= 1
        if topic.users == 0:
            del self._topics[classroom_id]
            if topic.remote is not None:
                self._spawn(self._unsubscribe(topic.remote))

    async def _unsubscribe(self, remote: Subscription) -> None:
        try:
            await remote.unsubscribe()
        except NatsError:
            return  # its connection has gone, and the subscription with it

    # --- replicas among themselves

    async def serve(self, subject: str, answer: Answer) -> None:
        """Answer the requests on a subject, on this connection and on those that follow it; raises Unavailable."""
        self._services[subject] = answer
        if self._client is not None:
            try:
                await self._serve(self._client, subject, answer)
            except NatsError as error:
                raise Unavailable("NATS is away") from error

    def stop_serving(self, subject: str) -> None:
        """Nobody asks there any more."""
        self._services.pop(subject, None)
        remote = self._served.pop(subject, None)
        if remote is not None:
            self._spawn(self._unsubscribe(remote))

    async def _serve(self, client: Client, subject: str, answer: Answer) -> None:
        def on_request(message: Msg) -> None:
            self._spawn(self._answer(message, answer))

        self._served[subject] = await client.subscribe(subject, future=_inbox(on_request))

    async def _answer(self, message: Msg, answer: Answer) -> None:
        try:
            await message.respond(await answer(message.data))
        except NatsError as error:  # whoever asked does not wait for ever
            log.warning("answer_not_sent", limited=True, error=repr(error))
        except Exception as error:
            log.error("answer_failed", limited=True, error=repr(error), exc_info=error)

    async def request(self, subject: str, payload: bytes, timeout_s: float, *, is_idempotent: bool = False) -> bytes:
        """The answer to a request; raises Unavailable when nobody listens there, or does not answer in time.

        `is_idempotent`: should the connection break meanwhile, it is asked once more, on the next one: the first may never
        have left. That one has `timeout_s` to be there, and then as long again for the answer.
        """
        client = self._client
        if client is None:
            raise Unavailable("NATS is away")
        try:
            return (await client.request(subject, payload, timeout=timeout_s)).data
        except (NatsError, OSError) as error:
            if is_idempotent and client is not self._client:
                await self._connected_again(timeout_s)
                return await self.request(subject, payload, timeout_s)
            raise Unavailable("No answer") from error

    async def _connected_again(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._there.wait()
        except TimeoutError as error:
            raise Unavailable("NATS is away") from error

    # --- publishing

    def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        """Send it behind all that was published before; raises Unavailable while NATS is away, or slow. Never blocks.

        Should the connection break it may be lost: `confirm` tells.
        """
        if self._outbox is None:
            raise Unavailable("NATS is away")
        self._outbox.publish(subject, payload, headers)

    async def confirm(self) -> None:
        """Return when the server has all that was subscribed and published before this call; raises Unavailable."""
        if self._outbox is None or self._outbox.is_late:
            raise Unavailable("NATS is away")
        await self._outbox.confirm()

    async def prove(self) -> None:
        """Return when the server answers now, or did PROOF_LASTS_S ago; raises Unavailable.

        Before a change that others have to hear of: what is published into a connection that has died comes too late, when
        somebody else may have made the next change.
        """
        if self._outbox is None or time.perf_counter() - self._outbox.proven_at > PROOF_LASTS_S:
            await self.confirm()

    def was_deaf(self) -> bool:
        """Whether others may have asked in vain since the last call."""
        deaf, self._was_deaf = self._was_deaf or not self.connected, not self.connected
        return deaf

    def _on_echo(self, message: Msg) -> None:
        if self._outbox is not None:
            self._outbox.on_echo(message)

    def _on_proven(self) -> None:
        if self._owes_gap:
            self._owes_gap = False
            self._on_gap()

    def _on_late(self) -> None:
        self._was_deaf = True

    # --- one connection after the other

    async def _connect(self) -> Client:
        """A client with all subscriptions made, not yet proven."""
        client = Client()

        async def on_closed() -> None:
            if client is self._client:
                await self._drop_client()

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await client.connect(
                    self._servers,
                    name=self._name,
                    connect_timeout=int(CONNECT_TIMEOUT_S),
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    ping_interval=PING_INTERVAL_S,
                    error_cb=self._on_error,
                    closed_cb=on_closed,
                )
                await client.subscribe(self._echo_subject, future=_inbox(self._on_echo))
                for subject, answer in list(self._services.items()):
                    await self._serve(client, subject, answer)
                for topic in list(self._topics.values()):
                    await self._subscribe(client, topic)
                    if not topic.users and topic.remote is not None:  # released meanwhile
                        await self._unsubscribe(topic.remote)
        except BaseException:
            await _close(client)
            raise
        if client._reading_task is not None:  # a message that its parser cannot take ends it, in silence
            client._reading_task.add_done_callback(lambda _: self._on_reading_ended(client))
        return client

    def _on_reading_ended(self, client: Client) -> None:
        if client is self._client:
            log.error("nats_reading_ended", limited=True)
            self._spawn(self._drop_client())

    async def _keep(self) -> None:
        """Prove the connection while it lives, replace it when it does not."""
        while True:
            if self._client is None:
                await self._reconnect()
            try:
                # Not wait_for: it may swallow the cancellation of `close`.
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await self._lost.wait()
            except TimeoutError:
                await self._check()

    async def _check(self) -> None:
        if self._outbox is not None and self._outbox.waits_s >= STUCK_AFTER_S:
            log.error("nats_stuck", limited=True)
            await self._drop_client()
        elif self._outbox is not None:
            self._outbox.probe()

    async def _reconnect(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while self._client is None:
            try:
                client = await self._connect()
            except (NatsError, OSError, TimeoutError) as error:
                log.warning("nats_not_reached", limited=True, error=repr(error))
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
                continue
            except Exception as error:  # a fault of the client must not end the keeping
                log.error("nats_client_failed", limited=True, error=repr(error), exc_info=error)
                await asyncio.sleep(MAX_BACKOFF_S)
                continue
            self._lost.clear()
            self._use(client)
        log.info("nats_back")
        self._metrics.bus_reconnects.inc()
        self._owes_gap = True

    def _use(self, client: Client) -> None:
        """From now on this one; its subscriptions are active when its first echo is back."""
        self._client = client
        self._there.set()
        self._outbox = Outbox(
            client,
            self._echo_subject,
            self._echoes,
            self._metrics,
            on_proven=self._on_proven,
            on_late=self._on_late,
            on_broken=self._drop_client,
        )
        self._outbox.probe()

    async def _drop_client(self) -> None:
        """This connection is over, with all that was not proven: who waits is refused."""
        client, self._client = self._client, None
        outbox, self._outbox = self._outbox, None
        self._lost.set()
        self._there.clear()
        self._was_deaf = True
        if outbox is not None:
            outbox.close()
        if client is not None:
            if self._keeping is not None:
                log.warning("nats_lost", limited=True)
            await _close(client)

    async def _on_error(self, error: Exception) -> None:
        """Called by the client, out of its own loops: must not raise."""
        self._metrics.bus_errors.labels(type(error).__name__).inc()
        self._refusal = _words_of(error)
        if self._keeping is not None:
            log.warning("nats_error", limited=True, error=repr(error))

    async def close(self) -> None:
        """Send what waits, for CLOSE_TIMEOUT_S at the most, and go."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.confirm()
        except (Unavailable, TimeoutError) as error:
            if self._outbox:
                log.error("publishes_lost", count=len(self._outbox), error=repr(error))
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
            self._keeping = None
        await self._drop_client()
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _inbox(on_message: Callable[[Msg], None]) -> asyncio.Future[Msg]:
    return cast("asyncio.Future[Msg]", Inbox(on_message))


async def _close(client: Client) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.close()
    except Exception as error:  # half open, or closing already: it is given up either way
        log.debug("nats_close_failed", error=repr(error))


def _words_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        # asyncio puts addresses into its own text; a resolver's numbers are not the system's.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or type(error).__name__
