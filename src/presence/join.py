"""A terminal agent: joins a classroom, prints what it hears, and comes back as it is told to.

Owns one agent's socket and the rules of a good client: when to reconnect, after how long, when to stop.
Knows nothing of the gateway's insides; it speaks the JSON dialect as any other client would.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit
from uuid import UUID

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidProxy, InvalidStatus, InvalidURI

from presence.log import escape_controls

__all__ = ["TerminalAgent", "printer"]

OPEN_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 2.0
MAX_MESSAGE_BYTES: Final = 16 * 2**20  # NATS can be set to carry events larger than the library's usual bound
FIRST_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 15.0
MAX_WAIT_S: Final = 300.0
MAX_REMEMBERED_EVENTS: Final = 256

LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "::1")
NORMAL_CLOSE: Final = 1000
# Going away, no close frame, internal error, restart, try again later, bad gateway.
RECONNECT_CODES: Final = frozenset([1001, 1005, 1006, 1011, 1012, 1013, 1014])
# Answers to an upgrade that another attempt may not get.
RECONNECT_STATUSES: Final = frozenset([408, 429, 500, 502, 503, 504])


@dataclass(frozen=True, slots=True)
class End:
    """How one connection ended, and what that means for the next one."""

    words: str
    reconnect: bool
    after_s: float | None = None
    status: int = 1  # the exit status, if nothing follows


@dataclass(slots=True)
class TerminalAgent:
    """One agent in one classroom. `find_url` is called for each connection, `make_token` also every `refresh_every_s`."""

    find_url: Callable[[], str]
    classroom_id: UUID
    label: str
    make_token: Callable[[], str]
    show: Callable[[str], None]
    refresh_every_s: float | None = None
    chance: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _failures: int = 0
    # The sockets of gateways that go away, by who listens on them.
    _previous: dict[asyncio.Task[None], ClientConnection] = field(default_factory=dict, repr=False)
    _hanging_up: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    _shown_ids: dict[str, None] = field(default_factory=dict, repr=False)  # of the last events, oldest first

    async def run(self) -> int:
        """Returns the exit status once it may not come back; cancel it to leave (the socket closes with 1000)."""
        try:
            while True:
                end = await self._connect()
                self.show(end.words)
                if not end.reconnect:
                    return end.status
                wait_s = self._backoff_s() if end.after_s is None else min(end.after_s, MAX_WAIT_S)
                self.show(f"reconnecting in {wait_s:.1f} s")
                await self.sleep(wait_s)
        finally:
            self._leave_previous()
            if self._previous:
                await asyncio.wait(self._previous)

    async def _connect(self) -> End:
        self._failures += 1
        url = self.find_url()
        # A proxy of the environment is for the world outside; with compression the gateway has nothing to do.
        proxy: Literal[True] | None = None if urlsplit(url).hostname in LOOPBACK_HOSTS else True
        try:
            socket = await connect(
                url,
                compression=None,
                proxy=proxy,
                open_timeout=OPEN_TIMEOUT_S,
                close_timeout=CLOSE_TIMEOUT_S,
                ping_interval=None,  # the gateway pings
                max_size=MAX_MESSAGE_BYTES,
            )
        except InvalidStatus as error:
            status, retry = error.response.status_code, error.response.headers.get("Retry-After", "")
            after_s = float(retry) if retry.isdecimal() else None
            return End(f"the gateway answered {status}", reconnect=status in RECONNECT_STATUSES, after_s=after_s)
        except (InvalidURI, InvalidProxy) as error:
            return End(f"cannot connect to {_place(url)}: {error.msg}", reconnect=False)
        except (OSError, InvalidHandshake) as error:
            return End(f"cannot connect to {_place(url)}: {_reason_of(error)}", reconnect=True)
        return await self._live(socket)

    async def _live(self, socket: ClientConnection) -> End:
        handed_over = False
        try:
            await socket.send(self._request())
            end, handed_over = await self._receive(socket)
        except ConnectionClosed:
            return _end_of(socket)
        finally:
            if not handed_over:
                await socket.close(NORMAL_CLOSE)
        return end

    async def _receive(self, socket: ClientConnection) -> tuple[End, bool]:
        """Prints until an error message ends it; True with it when the socket stays open until the next one serves."""
        refresh_at, served = self._next_refresh(), False
        while True:
            try:
                async with asyncio.timeout_at(refresh_at):
                    message = _parse(await socket.recv())
            except TimeoutError:
                await socket.send(json.dumps({"type": "refresh", "payload": {"token": self.make_token()}}))
                refresh_at = self._next_refresh()
                continue
            self._show(message)
            if message.get("type") == "connect_success":
                self._failures, served = 0, True
                self._leave_previous()
            elif str(message.get("type")).endswith("_session_error"):
                facts = _facts(message)
                if facts.get("type") != "terminated" or not served:
                    return _end_from(facts), False
                # The gateway keeps serving until it closes: stay until another one has us, and miss nothing.
                listening = asyncio.create_task(self._listen_on(socket))
                self._previous[listening] = socket
                listening.add_done_callback(self._previous.pop)
                return _end_from(facts), True

    async def _listen_on(self, socket: ClientConnection) -> None:
        """Prints the events of a gateway that is going away, until it has gone."""
        try:
            async for data in socket:
                message = _parse(data)
                if message.get("type") in ("event", "gap"):
                    self._show(message)
        except ConnectionClosed:
            pass
        finally:
            await socket.close(NORMAL_CLOSE)

    def _leave_previous(self) -> None:
        """Hang up there, and take what still comes in front of the answer."""
        for socket in self._previous.values():
            hanging_up = asyncio.create_task(socket.close(NORMAL_CLOSE))
            self._hanging_up.add(hanging_up)
            hanging_up.add_done_callback(self._hanging_up.discard)

    def _show(self, message: dict[str, Any]) -> None:
        if message.get("type") == "event":
            event_id = str(message.get("id"))
            if event_id in self._shown_ids:  # the old gateway and the new one have both delivered it
                return
            self._shown_ids[event_id] = None
            if len(self._shown_ids) > MAX_REMEMBERED_EVENTS:
                del self._shown_ids[next(iter(self._shown_ids))]
        self.show(_describe(message))

    def _request(self) -> str:
        payload = {"token": self.make_token(), "classroom_id": str(self.classroom_id), "agent_label": self.label}
        return json.dumps({"type": "connect_request", "payload": payload})

    def _next_refresh(self) -> float | None:
        return None if self.refresh_every_s is None else asyncio.get_running_loop().time() + self.refresh_every_s

    def _backoff_s(self) -> float:
        longest_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(self._failures, 10))
        return longest_s * (0.5 + self.chance() / 2)


def _parse(data: str | bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        message = None
    return message if isinstance(message, dict) else {"type": "unreadable message"}


def _facts(message: dict[str, Any]) -> dict[str, Any]:
    payload = message.get("payload")
    return payload if isinstance(payload, dict) else {}


def _describe(message: dict[str, Any]) -> str:
    """Returns one line for a human."""
    kind, facts = message.get("type"), _facts(message)
    if kind == "connect_success":
        return f"connected as {facts.get('agent_id')}, session {facts.get('session_id')}"
    if kind == "gap":
        missed = facts.get("missed")
        return f"gap: {'some' if missed is None else missed} events of this classroom were lost on the way"
    if kind == "event" and facts.get("type") in ("agent.enter", "agent.leave"):
        return f"{facts['type']} {facts.get('agent_id')} (session {facts.get('session_id')})"
    if kind == "event":
        name = str(message.get("subject")).rpartition(".")[2]
        return f"{name} {json.dumps(message.get('payload'), ensure_ascii=False, separators=(',', ':'))}"
    if str(kind).endswith("_session_error"):
        return f"{facts.get('type')}: {facts.get('title')}"
    return str(kind)


def _end_from(payload: dict[str, Any]) -> End:
    after_ms = payload.get("reconnect_after_ms")
    after_s = min(after_ms, MAX_WAIT_S * 1000) / 1000 if isinstance(after_ms, int | float) and after_ms >= 0 else None
    if payload.get("reconnect") is True:
        return End("the gateway asks to reconnect", reconnect=True, after_s=after_s)
    return End("not reconnecting: the gateway says that it would not help", reconnect=False)


def _end_of(socket: ClientConnection) -> End:
    """Returns what a close without an error message means."""
    code = socket.close_code or 1006
    words = "the connection was lost" if code == 1006 else f"closed by the gateway ({code})"
    return End(words, reconnect=code in RECONNECT_CODES or 4000 <= code < 4500, status=int(code != NORMAL_CLOSE))


def _reason_of(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)


def _place(url: str) -> str:
    """Returns the URL without user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def printer() -> Callable[[str], None]:
    """Returns what prints one line at once, with the time; whatever came from outside cannot drive the terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has every character

    def show(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {escape_controls(text)}", flush=True)

    return show
