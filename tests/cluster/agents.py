"""Agents: good clients as docs/protocol.md describes them, and what rude ones do with their sockets.

Owns the sockets and when to come back. What happens on a socket goes into its `Life` in the record. Knows nothing of faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from typing import Any

from record import Key, Life, Record
from replica import Replica
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from waiting import SCALE

OPEN_TIMEOUT_S = 1.0
ENTER_TIMEOUT_S = 3.0
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 0.4
RECONNECT_CODES = {None, 1001, 1006, 1011, 1012}


class Heard(ClientConnection):
    """A connection that knows when anything last came, pings included."""

    heard_at = 0.0

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        super().data_received(data)


class Socket:
    """One socket, read all the time, and what it means for the next one."""

    def __init__(self, connection: Heard, life: Life) -> None:
        self.connection = connection
        self.life = life
        self.advice: dict[str, Any] | None = None
        self.is_muted = False
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for data in self.connection:
                message = json.loads(data)
                self.life.hear(message)
                if message["type"].endswith("_session_error"):
                    self.advice = message["payload"]
                    assert message["type"].startswith("recoverable") is self.advice["reconnect"]
                self._changed.set()
        except ConnectionClosed:
            pass
        finally:
            self.life.ended_at = time.monotonic()
            self.life.code = self.connection.close_code
            self._changed.set()

    @property
    def is_told(self) -> bool:
        return self.advice is not None and self.advice["type"] == "terminated"

    async def entered(self) -> bool:
        """Wait for the success; False when there is none, and then the socket is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENTER_TIMEOUT_S * SCALE):
                while self.life.success_at is None and self.life.ended_at is None:
                    self._changed.clear()
                    await self._changed.wait()
        if self.life.success_at is None:
            self.abort()
        return self.life.success_at is not None

    async def until_over(self, idle_s: float) -> None:
        """Return when it has ended, is told to move, or nothing was heard for too long: then it is taken for dead."""
        while self.life.ended_at is None and not self.is_told:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                # Not wait_for: it may swallow a cancellation.
                async with asyncio.timeout(0.1):
                    await self._changed.wait()
            if not self.is_muted and time.monotonic() - self.connection.heard_at > idle_s:
                self.abort()
                return

    def reconnect_after_s(self) -> float | None:
        """None: stay away. Negative: at a time of one's own choice."""
        if self.advice is not None:
            return self.advice["reconnect_after_ms"] / 1000 if self.advice["reconnect"] else None
        code = self.connection.close_code
        return -1.0 if code in RECONNECT_CODES or self.life.left_at or 4000 <= (code or 0) <= 4499 else None

    async def request(self, token: str) -> None:
        self.life.requested_at = time.monotonic()
        classroom_id, agent_id = self.life.key
        payload = {"token": token, "classroom_id": classroom_id, "agent_label": agent_id.split(".")[0]}
        await self.send(json.dumps({"type": "connect_request", "payload": payload}))

    async def send(self, text: str) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self.connection.send(text)

    def mute(self) -> None:
        """Read nothing, answer no ping."""
        self.is_muted = True
        self.connection.transport.pause_reading()

    def unmute(self) -> None:
        self.is_muted = False
        self.connection.heard_at = time.monotonic()
        with contextlib.suppress(RuntimeError):  # it has closed
            self.connection.transport.resume_reading()

    def abort(self) -> None:
        """Go without a word."""
        self.life.left_at = self.life.left_at or time.monotonic()
        self.connection.transport.abort()

    async def close(self) -> None:
        """Go in good order."""
        if self.life.ended_at is None:
            self.life.left_at = self.life.left_at or time.monotonic()
        await self.connection.close()
        await self._reading


class Agent:
    """A good client: it stays in its classroom until told otherwise. `doors` are the replicas it may try."""

    def __init__(
        self,
        record: Record,
        key: Key,
        token: str,
        doors: Callable[[], list[Replica]],
        rng: random.Random,
        idle_s: float,
    ) -> None:
        self.record = record
        self.key = key
        self.current: Socket | None = None
        self.is_stopped = False  # it was told not to come back
        self.offline_s: list[tuple[float, float]] = []  # of each return: time without a socket, and the delay asked for
        self._token = token
        self._doors = doors
        self._rng = rng
        self._idle_s = idle_s
        self._task: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def is_wanted(self) -> bool:
        return self._task is not None

    @property
    def is_settled(self) -> bool:
        if self._closing:
            return False
        if self._task is None or self.is_stopped:
            return True
        return self.current is not None and self.current.life.is_live and not self.current.is_told

    def come(self) -> None:
        if self._task is None:
            self.is_stopped = False
            self._task = asyncio.create_task(self._stay())

    async def go(self) -> None:
        """Close in good order and stay away."""
        await self._stop()
        if self.current is not None:
            await self.current.close()

    async def vanish(self) -> None:
        """Cut the socket and stay away."""
        await self._stop()
        if self.current is not None:
            self.current.abort()

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def open(self, replica: Replica | None = None) -> Socket | None:
        """A socket with its request sent, on this replica or any."""
        doors = self._doors() if replica is None else [replica]
        if not doors:
            return None
        replica = self._rng.choice(doors)
        life = Life(self.key, replica.life)
        try:
            connection = await connect(
                f"ws://127.0.0.1:{replica.port}/ws",
                compression=None,
                proxy=None,
                ping_interval=None,
                open_timeout=OPEN_TIMEOUT_S * SCALE,
                close_timeout=3.0,
                create_connection=Heard,
            )
        except (OSError, InvalidHandshake, TimeoutError, ConnectionClosed):
            return None
        assert isinstance(connection, Heard)
        self.record.lives.append(life)
        socket = Socket(connection, life)
        try:
            await socket.request(self._token)
        except asyncio.CancelledError:
            socket.abort()
            raise
        return socket

    async def _stay(self) -> None:
        failures, delay_s = 0, 0.0
        while True:
            await asyncio.sleep(delay_s)
            socket: Socket | None = None
            try:
                socket = await self.open()
                has_entered = socket is not None and await socket.entered()
            except asyncio.CancelledError:
                if socket is not None:
                    socket.abort()
                raise
            if socket is not None and has_entered:
                failures = 0
                self._take(socket)
                await socket.until_over(self._idle_s)
            failures += 1
            after_s = -1.0 if socket is None else socket.reconnect_after_s()
            if after_s is None:
                self.is_stopped = True
                return
            backoff_s = min(FIRST_BACKOFF_S * 2**failures, MAX_BACKOFF_S) * self._rng.uniform(0.5, 1.0)
            delay_s = backoff_s if after_s < 0 else after_s

    def _take(self, socket: Socket) -> None:
        """The new one is in: the old one is dropped, not before."""
        previous, self.current = self.current, socket
        if previous is not None and previous.life.ended_at is None:
            closing = asyncio.create_task(previous.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
