"""The composition root: builds the parts, starts them in order, waits for a signal, drains, stops in reverse.

Owns the order. Knows nothing of what the parts do.
"""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final
from uuid import UUID

from presence.announcements import Announcements
from presence.authn import Authenticator
from presence.authz import Authorizer
from presence.bus import Bus
from presence.connection import Lives
from presence.drain import Drain
from presence.errors import ConfigError
from presence.fanout import Fanout
from presence.gateway import Gateway
from presence.http_api import HttpApi
from presence.log import get
from presence.metrics import Metrics
from presence.replicas import Lease, Owners
from presence.sessions import Sessions
from presence.steps import Steps
from presence.store import MAX_QUEUED_CLOSES, Store
from presence_core.hub import Hub

if TYPE_CHECKING:
    from presence.config import Settings

log = get("app")

EXIT_INCOMPLETE: Final = 1
EXIT_KILLED: Final = 130  # a second signal: at once, as it was asked for
GC_THRESHOLDS: Final = (50_000, 50, 1_000)  # a full collection pauses everyone: rare, and over few objects


class App:
    """One replica. `start` and `stop` are here for tests; `serve` is the whole life."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.replica_id = uuid.uuid4()
        self.metrics = Metrics()
        self.steps = Steps()
        self.started = False
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        settings, stack, metrics = self.settings, self._stack, self.metrics
        if settings.nats_url is None or settings.database_url is None:
            raise ConfigError(
                "nats_url and database_url are needed here: the embedded servers are somebody else's to start"
            )
        authenticator = await Authenticator.open(settings, metrics=metrics)
        stack.push_async_callback(authenticator.close)
        authorizer = Authorizer(settings, metrics=metrics)
        stack.push_async_callback(authorizer.close)

        self.fanout = Fanout(metrics, id_prefix=self.replica_id.hex[:12])
        self.bus = await Bus.open(
            settings.nats_url,
            prefix=settings.subject_prefix,
            name=f"presence {settings.replica_label}",
            echo_subject=f"presence.replica.{self.replica_id}.echo",
            on_message=self.fanout.on_message,
            on_gap=self._on_gap,
            metrics=metrics,
        )
        stack.push_async_callback(self.bus.close)
        self.owners = Owners(self.bus, metrics)
        self.store = await Store.open(
            settings.database_url,
            self.replica_id,
            settings.replica_label,
            on_owned=lambda rows: self.announcements.tell_leaves(rows),  # noqa: PLW0108 - made after the store
            ask_owner=self.owners.ask,
            prove=self.bus.prove,
            confirm=self.bus.confirm,
            metrics=metrics,
            # All may leave at once, when this replica drains.
            max_queued_closes=max(MAX_QUEUED_CLOSES, settings.max_connections),
        )
        stack.push_async_callback(self.store.close)
        self.announcements = Announcements(self.store, self.bus, metrics, subject_prefix=settings.subject_prefix)
        self.sessions = Sessions(self.store, self.bus, self.fanout, self.owners, self.announcements, self.steps)
        self.lives = Lives(
            settings, authenticator, authorizer, self.sessions, self.fanout, metrics, self.steps, random=random.random
        )
        await self._serve_others(self.replica_id)
        self.lease = Lease(
            settings,
            self.store,
            metrics,
            come_back=self._come_back,
            reconcile=self.sessions.reconcile,
            was_deaf=self.bus.was_deaf,
        )
        self.lease.open()
        stack.push_async_callback(self.lease.close)
        self._open_hub()
        self.gateway = Gateway(settings, self.hub, metrics)
        await self.gateway.open()
        stack.push_async_callback(self.gateway.close)
        self.http_api = HttpApi(settings, self.store, self.sessions, self.owners, metrics, ready=self.is_ready)
        await self.http_api.open()
        stack.push_async_callback(self.http_api.close)
        self.started = True

    def _open_hub(self) -> None:
        settings = self.settings
        self.hub = Hub(
            self.lives,
            max_message_bytes=settings.max_message_bytes,
            max_backlog_bytes=settings.max_backlog_bytes,
            max_room_queue_bytes=settings.max_room_queue_bytes,
            ping_interval_ms=settings.ping_interval_s * 1000,
            pong_timeout_ms=settings.pong_timeout_s * 1000,
            close_timeout_ms=settings.close_timeout_s * 1000,
            messages_per_s=settings.messages_per_s,
            message_burst=settings.message_burst,
            pings_per_s=settings.pings_per_s,
            ping_burst=settings.ping_burst,
        )
        loop = asyncio.get_running_loop()
        loop.add_reader(self.hub.fileno(), self.hub.on_readable)
        self._stack.callback(self._close_hub, loop)
        self.fanout.use(self.hub)
        self.metrics.register_hub(self.hub.stats)

    def _on_gap(self) -> None:
        self.fanout.on_gap()
        if self.started:
            self.sessions.on_bus_back()

    async def _serve_others(self, replica_id: UUID) -> None:
        await self.owners.serve(replica_id, self.sessions.release, self.sessions.remove, self.sessions.deliver)

    async def _come_back(self, replica_id: UUID) -> None:
        """Swept: go on as somebody else, who owns nothing yet."""
        await self._serve_others(replica_id)
        await self.store.begin_anew(replica_id)
        self.replica_id = replica_id
        await self.sessions.come_back()

    def _close_hub(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self.hub.fileno())
        self.hub.close()

    def is_ready(self) -> bool:
        return self.started and not self.gateway.draining and self.store.healthy and self.bus.connected

    async def drain(self) -> bool:
        drain = Drain(
            self.settings,
            self.hub,
            self.gateway,
            self.lives,
            self.sessions,
            self.lease,
            self.steps,
            self.store,
            self.bus,
        )
        return await drain.run()

    async def stop(self) -> None:
        self.started = False
        await self._stack.aclose()


async def serve(settings: Settings, *, ready: Callable[[App], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the process's exit status. A second signal ends it at once."""
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    again = asyncio.Event()

    def on_signal() -> None:
        (again if signalled.is_set() else signalled).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    app = App(settings)
    await app.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    log.info(
        "serving",
        port=app.gateway.port,
        http_port=app.http_api.port,
        replica_id=str(app.replica_id),
        sends_in_bulk=app.hub.sends_in_bulk,
    )
    if ready is not None:
        ready(app)
    await signalled.wait()
    ending = asyncio.create_task(_end(app))
    killed = asyncio.create_task(again.wait())
    await asyncio.wait({ending, killed}, return_when=asyncio.FIRST_COMPLETED)
    if not ending.done():
        log.warning("killed", under_way=len(app.steps))
        ending.cancel()
        return EXIT_KILLED
    killed.cancel()
    return 0 if ending.result() else EXIT_INCOMPLETE


async def _end(app: App) -> bool:
    try:
        return await app.drain()
    finally:
        await app.stop()
