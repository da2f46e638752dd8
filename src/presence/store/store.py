"""The store: what the rest of the program asks of the database.

Owns the replica's own row and the order in which the store starts and stops. Knows nothing of sockets, NATS or rules.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol, Self
from uuid import UUID

import asyncpg

from presence.errors import StartError, Unavailable
from presence.log import get
from presence.metrics import Metrics
from presence.reasons import REPLACED, REPLICA_LOST
from presence.store import sql
from presence.store.closing import ClosedSession, Closings, OnOwned, Proof, within_proof
from presence.store.database import Away, BadRow, Database, Lane, TryAgain
from presence.store.opening import AskOwner, OpenedSession, Openings, always
from presence.store.owner import Owner

log = get("store")

MAX_QUEUED_CLOSES: Final = 65_536
MAX_QUEUED_OPENS: Final = 8_192
MAX_LISTED: Final = 1_000
CLOSE_FLUSH_TIMEOUT_S: Final = 2.0
SWEEP_TIMEOUT_S: Final = 10.0
MAX_HOLDS: Final = 10
TOLD_PER_TURN: Final = 100
TOLD_PER_PROOF: Final = 10_000  # what waits for NATS is bounded


async def at_once() -> None:
    """The proof of those who have nobody to tell."""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A live session, as its row says."""

    session_id: int
    agent_id: str
    classroom_id: UUID
    replica_id: UUID
    started_at: datetime


class Announced(Protocol):
    """A session whose agent.enter others may have heard."""

    @property
    def session_id(self) -> int: ...
    @property
    def classroom_id(self) -> UUID: ...
    @property
    def agent_id(self) -> str: ...
    @property
    def at(self) -> datetime: ...


class Store:
    """Sessions in PostgreSQL. Every method raises Unavailable when the database cannot serve.

    Eight connections at the most, one for each thing that must not wait for another: new rows, whose a row is, rows that are
    taken over, closes, reads, the lease, the sweep, and whether the database is back.
    """

    def __init__(
        self,
        database: Database,
        owner: Owner,
        on_owned: OnOwned,
        ask_owner: AskOwner,
        prove: Proof,
        confirm: Proof,
        metrics: Metrics,
        max_queued_closes: int,
    ) -> None:
        self._database = database
        self._owner = owner
        self._on_owned = on_owned
        self._prove = prove
        self._confirm = confirm
        metrics.store_healthy.set_function(lambda: float(database.is_healthy))
        self._lease_lane = database.lane()
        self._read_lane = database.lane()
        self._sweep_lane = database.lane()
        self._closings = Closings(database, owner, on_owned, prove, confirm, metrics, max_waiting=max_queued_closes)
        self._openings = Openings(
            database, owner, self._closings, metrics, ask_owner=ask_owner, max_waiting=MAX_QUEUED_OPENS
        )

    @classmethod
    async def open(
        cls,
        dsn: str,
        replica_id: UUID,
        label: str,
        *,
        on_owned: OnOwned,
        ask_owner: AskOwner,
        metrics: Metrics,
        prove: Proof = at_once,
        confirm: Proof = at_once,
        max_queued_closes: int = MAX_QUEUED_CLOSES,
    ) -> Self:
        """Connect and register the replica; raises StartError.

        `ask_owner` asks another replica to let go of sessions before they are taken over from it.

        `on_owned` is told of sessions that are being closed, before anybody can see them in history: it publishes the
        leaves, must not block, and is called once for each row. `prove` returns when the others can be told, `confirm` when
        they have been.
        """
        try:
            database = Database(dsn, f"presence {label}"[:63])
        except ValueError as error:
            raise StartError(f"database-url: {error}") from error
        store = cls(database, Owner(replica_id, label), on_owned, ask_owner, prove, confirm, metrics, max_queued_closes)
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

    async def open_session(
        self, agent_id: str, classroom_id: UUID, *, is_there: Callable[[], bool] = always
    ) -> OpenedSession:
        """The agent's one session in this classroom, now owned by this replica; not taken from elsewhere for one that has gone.

        Safe to cancel: a row made for a cancelled caller is closed again. A row whose close is queued here is never
        `kept`: the answer waits for that close and is then a new row.
        """
        if self._closings.is_full:
            raise Unavailable("Too many sessions wait to be closed")
        opened = await self._openings.open(agent_id, classroom_id, is_there=is_there)
        assert opened is not None
        return opened

    async def restore_session(self, agent_id: str, classroom_id: UUID) -> OpenedSession | None:
        """A row for an agent whose own was swept; None when it has one elsewhere by now."""
        return await self._openings.open(agent_id, classroom_id, only_new=True)

    async def close_session(self, session_id: int, reason: str, ended_at: datetime) -> bool:
        """Move the row to history; True if this replica owned it. Waits through outages; goes on if cancelled."""
        return await self._closings.close_session(session_id, reason, ended_at)

    def close_later(self, session_id: int, reason: str, ended_at: datetime, *, is_secret: bool = False) -> None:
        """The same, for those who need no answer. `is_secret`: nobody was told of it, nobody is told that it ends."""
        self._closings.add(session_id, reason, ended_at, is_secret=is_secret)

    async def get_session(self, classroom_id: UUID, agent_id: str) -> SessionRow | None:
        try:
            rows = await self._read(self._read_lane, sql.GET_SESSION, classroom_id, agent_id)
        except BadRow:  # no text that a row can have
            return None
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

    async def while_in(self, sessions: Sequence[Announced], tell: Callable[[set[int]], None]) -> None:
        """Call `tell` with the ids of those that go on, and return when the others have heard it.

        A session goes on, under another id, when it was taken over in silence. None of these ends before that.
        """
        columns = (
            [each.session_id for each in sessions],
            [each.classroom_id for each in sessions],
            [each.agent_id for each in sessions],
            [each.at for each in sessions],
        )
        try:
            async with self._sweep_lane.session() as connection:
                await connection.execute(sql.BEGIN_CLOSE)
                present = await self._hold(connection, *columns)
                tell(present)
                if present:
                    await within_proof(self._confirm)
                await connection.execute("COMMIT")
        except (Away, TryAgain) as error:
            raise self._unavailable(error) from error

    async def _hold(self, connection: asyncpg.Connection, ids: list[int], *columns: object) -> set[int]:
        """Lock the rows of those that go on. Again, while rows are taken over in the moment they are waited for."""
        for _ in range(MAX_HOLDS):
            rows = await connection.fetch(sql.HOLD, ids, *columns, REPLACED.type)
            if len(rows) == len(ids):
                return {row[0] for row in rows if row[1]}
        raise TryAgain("Rows change hands too often")

    # --- the replica

    async def heartbeat(self) -> bool:
        """Renew the lease; False: this replica's row is gone, it has been swept."""
        return bool(await self._read(self._lease_lane, sql.HEARTBEAT, self._owner.replica_id))

    @property
    def swept(self) -> asyncio.Event:
        """Set when a statement found that this replica has been swept; cleared by `begin_anew`."""
        return self._owner.swept

    async def begin_anew(self, replica_id: UUID) -> None:
        """Go on under a new identity, registered before anything is written in its name."""
        await self._read(self._lease_lane, sql.REGISTER_REPLICA, replica_id, self._owner.label)
        self._owner.replica_id = replica_id
        self._owner.swept.clear()

    async def next_expiry_s(self, ttl_s: float) -> float | None:
        """How long until a lease of another replica runs out, if none of them is renewed; None: there is no other."""
        rows = await self._read(self._lease_lane, sql.NEXT_EXPIRY, self._owner.replica_id, ttl_s)
        seconds: float | None = rows[0][0]
        return seconds

    async def sweep(self, ttl_s: float, longest_s: float = SWEEP_TIMEOUT_S) -> tuple[UUID, int] | None:
        """Move the sessions of one dead replica to history, and tell their leaves; its id and how many, if there was one.

        The others are told before the COMMIT, as for every close: a sweep that fails half way is done again by somebody.
        One that takes more than `longest_s` is undone: the database stood still, and nobody could renew a lease.
        """
        try:
            await within_proof(self._prove)
            async with self._sweep_lane.session() as connection:
                started = time.monotonic()
                await connection.execute(sql.BEGIN_SWEEP)
                dead: UUID | None = await connection.fetchval(sql.LOCK_DEAD, self._owner.replica_id, ttl_s)
                rows = []
                if dead is not None:
                    rows = await connection.fetch(sql.SWEEP, dead, REPLICA_LOST.type, timeout=SWEEP_TIMEOUT_S)
                if time.monotonic() - started > longest_s:
                    raise TryAgain("The database stood still")
                for start in range(0, len(rows), TOLD_PER_TURN):
                    self._on_owned([_swept(row) for row in rows[start : start + TOLD_PER_TURN]])
                    await asyncio.sleep(0)  # thousands of leaves must not make a ping late
                    if start % TOLD_PER_PROOF == TOLD_PER_PROOF - TOLD_PER_TURN:
                        await within_proof(self._confirm)
                if rows:
                    await within_proof(self._confirm)
                await connection.execute("COMMIT")
        except (Away, TryAgain) as error:
            raise self._unavailable(error) from error
        return None if dead is None else (dead, len(rows))

    async def owned(self, after_id: int = 0, limit: int = MAX_LISTED) -> list[SessionRow]:
        """The sessions of this replica by id, from behind `after_id`."""
        rows = await self._read(self._read_lane, sql.OWNED, self._owner.replica_id, after_id, limit)
        return [SessionRow(*row) for row in rows]

    def is_closing(self, session_id: int) -> bool:
        """Whether a close of this session waits to be written."""
        return self._closings.is_waiting(session_id)

    def is_untold(self, classroom_id: UUID, agent_id: str, session_id: int) -> bool:
        """Whether this is the row of an attempt without an answer, which nobody was told of."""
        return self._closings.is_secret(session_id) or self._openings.has_left_behind((classroom_id, agent_id))

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
                await self._lease_lane.fetch(sql.REMOVE_REPLICA, self._owner.replica_id)
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
            raise self._unavailable(error) from error

    def _unavailable(self, error: Away | TryAgain) -> Unavailable:
        if isinstance(error, Away):
            self._database.report_away(error)
        return Unavailable("This cannot be done now")


def _swept(row: asyncpg.Record) -> ClosedSession:
    return ClosedSession(row[0], row[1], row[2], row[3], row[4], REPLICA_LOST.type)


def _explained(error: Exception) -> str:
    if isinstance(error, asyncpg.UndefinedTableError):
        return "its tables are missing; run `presence migrate`"
    return str(error).partition("\n")[0]
