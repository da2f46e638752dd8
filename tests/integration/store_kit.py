"""What the tests of the store share: stores of several replicas on one database, and a look at its tables."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg

from presence.metrics import Metrics
from presence.store import ClosedSession, Elsewhere, LetGo, Store

ROOM = uuid.UUID("aaaaaaaa-0000-4000-8000-000000000001")


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Replica:
    """A store, and what it told of the sessions it closed."""

    store: Store
    id: uuid.UUID
    told: list[ClosedSession] = field(default_factory=list)
    asked: list[tuple[uuid.UUID, list[int]]] = field(default_factory=list)


@asynccontextmanager
async def replica_of(url: str, *, max_queued_closes: int = 1000) -> AsyncIterator[Replica]:
    """A replica with its own store on this database."""
    replica_id = uuid.uuid4()
    told: list[ClosedSession] = []

    def on_owned(rows: Sequence[ClosedSession]) -> None:
        told.extend(rows)

    asked: list[tuple[uuid.UUID, list[int]]] = []

    async def ask_owner(owner: uuid.UUID, sessions: Sequence[Elsewhere]) -> LetGo:
        asked.append((owner, [session.session_id for session in sessions]))
        return LetGo()

    store = await Store.open(
        url,
        replica_id,
        "test",
        on_owned=on_owned,
        ask_owner=ask_owner,
        metrics=Metrics(),
        max_queued_closes=max_queued_closes,
    )
    try:
        yield Replica(store, replica_id, told, asked)
    finally:
        await store.close(timeout_s=0.5)


async def ask_nobody(owner: uuid.UUID, sessions: Sequence[Elsewhere]) -> LetGo:
    """For stores without neighbours."""
    return LetGo()


NewReplica = Callable[[], Awaitable[Replica]]


class Tables:
    """Looks at the tables through a connection of its own."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def sessions(self, **where: Any) -> list[asyncpg.Record]:
        return await self._rows("agent_session", where)

    async def history(self, **where: Any) -> list[asyncpg.Record]:
        return await self._rows("agent_session_history", where)

    async def _rows(self, table: str, where: dict[str, Any]) -> list[asyncpg.Record]:
        conditions = " AND ".join(f"{name} = ${number}" for number, name in enumerate(where, 1)) or "true"
        rows: list[asyncpg.Record] = await self.connection.fetch(
            f"SELECT * FROM {table} WHERE {conditions} ORDER BY id", *where.values()
        )
        return rows

    async def waiting_for_locks(self) -> int:
        """How many other backends of this database wait for a lock now."""
        count: int = await self.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return count


@asynccontextmanager
async def tables_of(url: str) -> AsyncIterator[Tables]:
    connection = await asyncpg.connect(url)
    try:
        yield Tables(connection)
    finally:
        await connection.close(timeout=5)
