"""How sessions close: in batches, fenced, told to the others before they are history, and never lost.

Owns the closes that wait, in bounded memory, and tries until the database has taken them. Knows nothing of who is told.

One transaction per batch: rows that this replica still owns are moved (and locked), then `on_owned` is told of them,
and when `confirm` says that they have heard it, COMMIT. Nobody can see a row in history whose leave is not out. `prove` says
beforehand that they can be told: while they cannot, the rows stay, and whoever comes back elsewhere takes its row over in
silence. When the COMMIT fails the batch is tried again, but `on_owned` is told once of each row; should the row by then
belong to another replica, the leave was too much.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from presence import reasons
from presence.errors import SessionError, Unavailable
from presence.log import get
from presence.metrics import Metrics
from presence.store import sql
from presence.store.batch import Batcher, run_in_parts
from presence.store.database import Away, BadRow, Database, TryAgain, backoff_delays_s
from presence.store.owner import Owner

log = get("store")


@dataclass(frozen=True, slots=True)
class ClosedSession:
    """A session that this replica owned and has ended."""

    session_id: int
    agent_id: str
    classroom_id: UUID
    started_at: datetime
    ended_at: datetime
    reason: str


OnOwned = Callable[[Sequence[ClosedSession]], None]
# Returns when it is so, raises Unavailable when it is not.
Proof = Callable[[], Awaitable[None]]

CONFIRM_TIMEOUT_S: Final = 1.0  # rows are locked meanwhile
LOCKED_RETRY_S: Final = 0.05


class Close:
    """One session that is to be moved to history."""

    __slots__ = ("answer", "ended_at", "followers", "is_secret", "key", "reason", "was_told")

    is_wanted: Final = True

    def __init__(
        self,
        session_id: int,
        reason: str,
        ended_at: datetime,
        is_secret: bool,
        answer: asyncio.Future[bool] | None,
    ) -> None:
        self.key = session_id
        self.reason = reason
        self.ended_at = ended_at
        # Nobody was told that it opened: nobody is told that it closes.
        self.is_secret = is_secret
        # An earlier attempt found the row ours and came as far as the COMMIT.
        self.was_told = False
        self.answer = answer
        self.followers: list[Callable[[], None]] | None = None


async def within_proof(proof: Proof) -> None:
    """Raises TryAgain when it does not come in CONFIRM_TIMEOUT_S."""
    try:
        async with asyncio.timeout(CONFIRM_TIMEOUT_S):
            await proof()
    except (Unavailable, TimeoutError) as error:
        raise TryAgain("The others cannot be told") from error


class Closings:
    def __init__(
        self,
        database: Database,
        owner: Owner,
        on_owned: OnOwned,
        prove: Proof,
        confirm: Proof,
        metrics: Metrics,
        *,
        max_waiting: int,
    ) -> None:
        self._database = database
        self._owner = owner
        self._on_owned = on_owned
        self._prove = prove
        self._confirm = confirm
        self._metrics = metrics
        metrics.store_queued_closes.set_function(lambda: len(self._waiting))
        self._max_waiting = max_waiting
        self._lane = database.lane()
        self._waiting: dict[int, Close] = {}
        self._batches: Batcher[Close] = Batcher(self._close_batch, self._on_failed)
        self._emptied: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """How many closes are not written yet."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self._max_waiting

    def add(
        self,
        session_id: int,
        reason: str,
        ended_at: datetime,
        *,
        is_secret: bool = False,
        answer: asyncio.Future[bool] | None = None,
    ) -> bool:
        """Queue a close; False when the same session is being closed already. Raises Unavailable at the bound."""
        if session_id in self._waiting:
            return False
        if self.is_full:
            self._metrics.store_errors.labels("close_dropped").inc()
            log.error("close_dropped", limited=True, waiting=len(self._waiting))
            raise Unavailable("Too many sessions wait to be closed")
        close = Close(session_id, reason, ended_at, is_secret, answer)
        self._waiting[session_id] = close
        self._batches.add(close)
        return True

    async def close_session(self, session_id: int, reason: str, ended_at: datetime) -> bool:
        """Return when it is written: True if the row was this replica's. A cancelled caller does not stop it."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if not self.add(session_id, reason, ended_at, answer=answer):
            self.call_after(session_id, lambda: None if answer.done() else answer.set_result(False))
        return await answer

    def is_waiting(self, session_id: int) -> bool:
        return session_id in self._waiting

    def is_secret(self, session_id: int) -> bool:
        """Whether it is being closed and nobody was told that it opened."""
        close = self._waiting.get(session_id)
        return close is not None and close.is_secret

    def call_after(self, session_id: int, follower: Callable[[], None]) -> bool:
        """Call it when the close of this session is done with; False, and no call, when none is queued."""
        close = self._waiting.get(session_id)
        if close is None:
            return False
        if close.followers is None:
            close.followers = []
        close.followers.append(follower)
        return True

    async def emptied(self) -> None:
        """Return when every close that was queued is written."""
        while self._waiting:
            if self._emptied is None:
                self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._emptied)

    async def close(self) -> None:
        """Stop at once; what is not written yet fails."""
        await self._batches.close()

    # --- one batch

    async def _close_batch(self, batch: list[Close]) -> None:
        """Write the batch, however long the database stays away; closes that come meanwhile wait behind it."""
        left = batch
        delays = backoff_delays_s()
        while left:
            put_off: list[Close] = []

            async def run(part: list[Close], put_off: list[Close] = put_off) -> None:
                try:
                    await self._close_part(part)
                except (Away, TryAgain) as error:
                    self._metrics.store_errors.labels("close").inc()
                    put_off += part
                    if isinstance(error, Away):
                        self._database.report_away(error)

            # Secret ones wait for nobody.
            for part in ([c for c in left if c.is_secret], [c for c in left if not c.is_secret]):
                await run_in_parts(part, run, BadRow, self._fail)
            left = put_off
            if left:
                await asyncio.sleep(next(delays))

    async def _close_part(self, part: list[Close]) -> None:
        if not part:
            return
        is_secret = part[0].is_secret
        if not is_secret:
            await within_proof(self._prove)
        started = time.perf_counter()
        ids, ends, whys = [c.key for c in part], [c.ended_at for c in part], [c.reason for c in part]
        async with self._lane.session() as connection:
            await connection.execute(sql.BEGIN_CLOSE)
            found = await connection.fetch(sql.CLOSE, self._owner.replica_id, ids, ends, whys)
            rows = [row for row in found if row[1] is not None]
            moved, locked = {row[0] for row in rows}, {row[0] for row in found if row[1] is None}
            if any(c.was_told and c.key not in moved | locked for c in part):
                # The COMMIT of an earlier attempt may have succeeded after all.
                moved.update(row[0] for row in await connection.fetch(sql.FIND_MOVED, ids, ends, whys))
            told = self._tell(part, rows)
            if rows and not is_secret:
                await self._confirm_told(told)
            status = await connection.execute("COMMIT")
            if status != "COMMIT":
                raise TryAgain(status)
        self._metrics.store_batch_rows.labels("close").observe(len(part))
        self._metrics.store_batch_seconds.labels("close").observe(time.perf_counter() - started)
        for close in part:
            if close.key in locked:  # the others do not wait for it
                asyncio.get_running_loop().call_later(LOCKED_RETRY_S, self._batches.add, close)
            else:
                self._settle(close, close.key in moved)

    async def _confirm_told(self, told: list[Close]) -> None:
        try:
            await within_proof(self._confirm)
        except TryAgain as error:
            raise self._untold(told) from error

    def _untold(self, told: list[Close]) -> TryAgain:
        """What was told just now may not have left: it is told again, if the row is still ours then."""
        for close in told:
            close.was_told = False
        return TryAgain("The others cannot be told")

    def _tell(self, part: list[Close], rows: list[asyncpg.Record]) -> list[Close]:
        """Tell of those that no earlier attempt has told of, and return these."""
        by_id = {close.key: close for close in part}
        told, newly = [], []
        for session_id, agent_id, classroom_id, started_at in rows:
            close = by_id[session_id]
            if not close.was_told:
                close.was_told = True
                newly.append(close)
                if not close.is_secret:
                    ended_at = max(started_at, close.ended_at)
                    told.append(ClosedSession(session_id, agent_id, classroom_id, started_at, ended_at, close.reason))
        if told:
            try:
                self._on_owned(told)
            except Unavailable as error:
                raise self._untold(newly) from error
            except Exception as error:
                # The rows are true all the same: a fault over there must not keep them from history.
                log.exception("on_owned_failed", limited=True, error=repr(error))
        return newly

    # --- answers

    def _settle(self, close: Close, was_moved: bool) -> None:
        if close.answer is not None and not close.answer.done():
            close.answer.set_result(was_moved)
        self._forget(close)

    def _fail(self, close: Close, error: Exception) -> None:
        if close.answer is not None and not close.answer.done():
            failure = SessionError(reasons.INTERNAL_ERROR) if isinstance(error, BadRow) else Unavailable()
            failure.__cause__ = error
            close.answer.set_exception(failure)
        else:
            log.error("close_failed", limited=True, error=repr(error))
        self._forget(close)

    def _forget(self, close: Close) -> None:
        self._waiting.pop(close.key, None)
        for follower in close.followers or ():
            follower()
        if not self._waiting and self._emptied is not None:
            self._emptied.set_result(None)
            self._emptied = None

    def _on_failed(self, batch: list[Close], error: Exception) -> None:
        log.error("close_batch_failed", limited=True, error=repr(error), exc_info=error)
        for close in batch:
            if close.key in self._waiting:
                self._fail(close, error)
