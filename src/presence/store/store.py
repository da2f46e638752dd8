"""The store: what the rest of the program asks of the database.

Owns the replica's own row and the order in which the store starts and stops. Knows nothing of sockets, NATS or rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self
from uuid import UUID

import asyncpg

from presence.errors import StartError, Unavailable
from presence.log import get
from presence.metrics import Metrics
from presence.store import sql
from presence.store.closing import Closings, OnOwned
from presence.store.database import Away, BadRow, Database, Lane, TryAgain
from presence.store.opening import OpenedSession, Openings

log = get("store")

MAX_QUEUED_CLOSES: Final = 65_536
MAX_QUEUED_OPENS: Final = 8_192
MAX_LISTED: Final = 1_000
CLOSE_FLUSH_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A live session, as its row says."""

    session_id: int
    agent_id: str
    classroom_id: UUID
    replica_id: UUID
    started_at: datetime


class Store:
    """Sessions in PostgreSQL. Every method raises Unavailable when the database cannot serve.

    Five connections at the most: for new rows, for rows that are taken over, for closes, for reads, for the lease.
    """

    def __init__(
        self,
        database: Database,
        replica_id: UUID,
        on_owned: OnOwned,
        metrics: Metrics,
        max_queued_closes: int,
    ) -> None:
        self._database = database
        self._replica_id = replica_id
        metrics.store_healthy.set_function(lambda: float(database.is_healthy))
        self._lease_lane = database.lane()
        self._read_lane = database.lane()
        self._closings = Closings(database, replica_id, on_owned, metrics, max_waiting=max_queued_closes)
        self._openings = Openings(database, replica_id, self._closings, metrics, max_waiting=MAX_QUEUED_OPENS)

    @classmethod
    async def open(
        cls,
        dsn: str,
        replica_id: UUID,
        label: str,
        *,
        on_owned: OnOwned,
        metrics: Metrics,
        max_queued_closes: int = MAX_QUEUED_CLOSES,
    ) -> Self:
        """Connect and register the replica; raises StartError.

        `on_owned` is told of sessions that are being closed, before anybody can see them in history: it publishes the
        leaves, must not block, and is called once for each row.
        """
        try:
            database = Database(dsn, f"presence {label}"[:63])
        except ValueError as error:
            raise StartError(f"database-url: {error}") from error
        store = cls(database, replica_id, on_owned, metrics, max_queued_closes)
        try:
            await store._lease_lane.fetch(sql.REGISTER_REPLICA, replica_id, label)
        except (Away, TryAgain, BadRow, asyncpg.PostgresError) as error:
            await database.close()
            raise StartError(f"The database cannot be used: {_explained(error)}") from error
        return store

    @property
    def healthy(self) -> bool:
        """Whether the database can be written to, as far as is known."""
        return self._database.is_healthy

    @property
    def queued_closes(self) -> int:
        return len(self._closings)

    # --- sessions

    async def open_session(self, agent_id: str, classroom_id: UUID) -> OpenedSession:
        """The agent's one session in this classroom, now owned by this replica.

        Safe to cancel: a row made for a cancelled caller is closed again. A row whose close is queued here is never
        `kept`: the answer waits for that close and is then a new row.
        """
        if self._closings.is_full:
            raise Unavailable("Too many sessions wait to be closed")
        return await self._openings.open(agent_id, classroom_id)

    async def close_session(self, session_id: int, reason: str, ended_at: datetime) -> bool:
        """Move the row to history; True if this replica owned it. Waits through outages; goes on if cancelled."""
        return await self._closings.close_session(session_id, reason, ended_at)

    def close_later(self, session_id: int, reason: str, ended_at: datetime) -> None:
        """The same, for those who need no answer."""
        self._closings.add(session_id, reason, ended_at)

    async def get_session(self, classroom_id: UUID, agent_id: str) -> SessionRow | None:
        rows = await self._read(self._read_lane, sql.GET_SESSION, classroom_id, agent_id)
        return SessionRow(*rows[0]) if rows else None

    async def agents(self, classroom_id: UUID, after_id: int = 0, limit: int = MAX_LISTED) -> list[SessionRow]:
        """The sessions of a classroom by id, from behind `after_id`, MAX_LISTED at the most."""
        limit = max(0, min(limit, MAX_LISTED))
        rows = await self._read(self._read_lane, sql.LIST_AGENTS, classroom_id, after_id, limit)
        return [SessionRow(*row) for row in rows]

    async def counts(self, classroom_ids: Sequence[UUID]) -> dict[UUID, int]:
        """How many agents are in each of these classrooms, 0 where there are none."""
        rows = await self._read(self._read_lane, sql.COUNT_AGENTS, list(classroom_ids))
        return dict.fromkeys(classroom_ids, 0) | {row[0]: row[1] for row in rows}

    # --- the replica

    async def heartbeat(self) -> bool:
        """Renew the lease; False: this replica's row is gone, it has been swept."""
        return bool(await self._read(self._lease_lane, sql.HEARTBEAT, self._replica_id))

    async def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was queued is written; False if that took longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._openings.found()
                await self._closings.emptied()
        except TimeoutError:
            return False
        return True

    async def close(self, timeout_s: float = CLOSE_FLUSH_TIMEOUT_S) -> None:
        """Write what is queued, for `timeout_s` at the most, remove the replica's row if it has no sessions, and go."""
        if not await self.flush(timeout_s):
            log.error("closes_lost", count=len(self._closings))
        await self._openings.close()
        await self._closings.close()
        try:
            if self._database.is_healthy:
                await self._lease_lane.fetch(sql.REMOVE_REPLICA, self._replica_id)
        except (Away, TryAgain) as error:
            log.warning("replica_not_removed", why=str(error))
        finally:
            await self._database.close()

    async def _read(self, lane: Lane, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run a statement that may be run twice: once more when the connection was lost."""
        if not self._database.is_healthy:
            raise Unavailable("The database is away")
        try:
            try:
                return await lane.fetch(statement, *arguments)
            except TryAgain:
                return await lane.fetch(statement, *arguments)
            except Away as error:
                if error.was_slow:
                    raise
                return await lane.fetch(statement, *arguments)
        except (Away, TryAgain) as error:
            if isinstance(error, Away):
                self._database.report_away(error)
            raise Unavailable("The database is away") from error


def _explained(error: Exception) -> str:
    if isinstance(error, asyncpg.UndefinedTableError):
        return "its tables are missing; run `presence migrate`"
    return str(error).partition("\n")[0]
