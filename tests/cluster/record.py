"""What was seen from outside, in the order of one clock: sockets, NATS messages, rows.

Owns the record, the client that hears NATS and the connection that reads rows. Knows nothing of the gateway's insides, and
judges nothing: that is the checker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import nats
from nats.aio.client import Client

from waiting import within

Key = tuple[str, str]  # classroom, agent

ROWS = """
SELECT id, agent_id, classroom_id::text, NULL::float8 AS began, NULL::float8 AS ended, NULL AS reason, 'live' AS place
FROM agent_session WHERE classroom_id = ANY ($1::uuid[])
UNION ALL
SELECT id, agent_id, classroom_id::text, extract(epoch FROM lower(lifetime))::float8,
    extract(epoch FROM upper(lifetime))::float8, reason, 'past'
FROM agent_session_history WHERE classroom_id = ANY ($1::uuid[])
"""
SNAPSHOT_INTERVAL_S = 0.1


@dataclass(slots=True)
class Life:
    """One socket of an agent, from its dial to its end; times are of time.monotonic()."""

    key: Key
    replica: str  # the process it was opened to
    requested_at: float = 0.0
    success_at: float | None = None
    session_id: int = 0
    left_at: float | None = None  # the agent itself began to close, or cut it
    ended_at: float | None = None
    code: int | None = None
    errors: list[tuple[float, str]] = field(default_factory=list)
    events: dict[str, Any] = field(default_factory=dict)  # by id, with their payloads
    gaps: int = 0

    @property
    def is_live(self) -> bool:
        return self.success_at is not None and self.left_at is None and self.ended_at is None

    def hear(self, message: dict[str, Any]) -> None:
        kind, payload = message["type"], message.get("payload")
        if kind == "connect_success":
            self.success_at, self.session_id = time.monotonic(), payload["session_id"]
            assert payload["agent_id"] == self.key[1], message
        elif kind == "event":
            self.events[message["id"]] = payload
        elif kind == "gap":
            self.gaps += 1
        else:
            self.errors.append((time.monotonic(), payload["type"]))


@dataclass(frozen=True, slots=True)
class Told:
    """An agent.enter or agent.leave on NATS, or, with no kind, a time in which messages may have gone unheard."""

    at: float
    kind: str  # enter, leave, or "" for a gap
    session_id: int = 0
    message_id: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    session_id: int
    agent_id: str
    classroom_id: str
    began: float | None
    ended: float | None
    reason: str | None
    place: str  # live or past

    @property
    def key(self) -> Key:
        return self.classroom_id, self.agent_id


async def ignore(error: Exception) -> None:
    """The servers are stopped under this client."""


class Ear:
    """Hears `<prefix>.*.agent` at the server itself; whatever it may have missed is a gap in every sequence."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: Client | None = None
        self._seen: set[str] = set()
        self.duplicates = 0
        self.heard: list[tuple[str, str]] = []  # every message, duplicates too
        self.told: defaultdict[Key, list[Told]] = defaultdict(list)
        self._gaps: list[float] = []

    async def open(self) -> None:
        self._client = await nats.connect(
            self._url, allow_reconnect=False, error_cb=ignore, max_outstanding_pings=1000, ping_interval=60
        )
        await self._client.subscribe("classrooms.*.agent", cb=self._on_message)
        await self._client.flush()

    async def reopen(self) -> None:
        """The server was restarted: all sequences have a gap."""
        await self.close()
        await self.open()
        self._gaps.append(time.monotonic())

    async def _on_message(self, message: Any) -> None:
        event = json.loads(message.data)
        message_id = message.headers["Nats-Msg-Id"]
        self.heard.append((message.subject.split(".")[1], event["type"]))
        if message_id in self._seen:
            self.duplicates += 1
            return
        self._seen.add(message_id)
        kind = event["type"].removeprefix("agent.")
        key = message.subject.split(".")[1], event["agent_id"]
        assert message.headers["Sender-Agent-Id"] == event["agent_id"]
        self.told[key].append(Told(time.monotonic(), kind, event["session_id"], message_id))

    def raw_leaves(self, classroom_id: str) -> int:
        """How many leaves came, duplicates counted."""
        return self.heard.count((classroom_id, "agent.leave"))

    def sequence(self, key: Key) -> list[Told]:
        gaps = [Told(at, "") for at in self._gaps]
        return sorted([*self.told[key], *gaps], key=lambda told: told.at)

    async def flush(self) -> None:
        """Return when everything is heard that the server had before this call."""
        assert self._client is not None
        await within(self._client.flush(timeout=10))
        await asyncio.sleep(0)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):  # its server may be dead
                await client.close()


class Reader:
    """Reads rows at the server itself; None while it cannot."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()

    async def rows(self, classrooms: Iterable[str]) -> list[Row] | None:
        async with self._turn:
            try:
                if self._connection is None or self._connection.is_closed():
                    self._connection = await asyncpg.connect(self.url, timeout=1, command_timeout=2)
                return [Row(*row) for row in await self._connection.fetch(ROWS, list(classrooms))]
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                self.drop()
                return None

    def drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


class Record:
    """One schedule's part of all this: its classrooms, its sockets, its rows over time."""

    def __init__(self, ear: Ear, reader: Reader, classrooms: list[str]) -> None:
        self.ear = ear
        self.reader = reader
        self.classrooms = classrooms
        self.lives: list[Life] = []
        self.snapshots: list[tuple[float, list[Row]]] = []
        self.rows: list[Row] = []

    async def watch(self) -> None:
        """Take snapshots until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(SNAPSHOT_INTERVAL_S)

    async def look(self) -> bool:
        rows = await self.reader.rows(self.classrooms)
        if rows is not None:
            self.rows = rows
            self.snapshots.append((time.monotonic(), rows))
        return rows is not None

    def keys(self) -> set[Key]:
        heard = {key for key, told in self.ear.told.items() if key[0] in self.classrooms and told}
        return {life.key for life in self.lives} | {row.key for row in self.rows} | heard

    def lives_of(self, key: Key) -> list[Life]:
        return [life for life in self.lives if life.key == key]
