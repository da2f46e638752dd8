"""How sessions open: in batches, each caller with its own answer, and nothing left behind by those who did not stay.

Owns the requests that wait, and the rows that an attempt of unknown end may have left. Knows nothing of who asks.

A request goes to OPEN, which makes new rows. For those that have a row already FIND_OWNERS tells whose. A row of this replica
is kept; of a row elsewhere its owner is asked to let go (it gets half a second), and then TAKE_OVER moves it whatever the
answer, on a connection of its own, so that rows locked elsewhere delay no new ones. An attempt is known by its
`started_at`: a row of ours that carries it was made by that attempt, whatever became of the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal
from uuid import UUID

import asyncpg

from presence import reasons
from presence.errors import SessionError, Unavailable
from presence.log import get
from presence.metrics import Metrics
from presence.store import sql
from presence.store.batch import Batcher, run_in_parts
from presence.store.closing import Closings
from presence.store.database import Away, BadRow, Database, Lane, TryAgain, backoff_delays_s
from presence.store.owner import Owner

log = get("store")

Outcome = Literal["created", "kept", "taken_over"]
Key = tuple[UUID, str]

# How often one request may find its row gone or give way to others before it fails.
MAX_ROUNDS: Final = 10
MAX_CONFLICTS: Final = 3

KINDS: Final = {"created": "open", "kept": "open", "taken_over": "take_over", "find": "find_owners"}


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """The row that an agent has now. `kept`: it had one on this replica already; `taken_over`: on another one.

    `delivering`: the replica that it was taken from, if that one drains and the agent goes on hearing its events there.
    `owner_was_silent`: that replica has not answered: nobody knows what the agent has missed.
    """

    session_id: int
    started_at: datetime
    outcome: Outcome
    delivering: UUID | None = None
    owner_was_silent: bool = False


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A session that another replica owns, and that is wanted here."""

    session_id: int
    classroom_id: UUID
    agent_id: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """What an owner says of the sessions that it was asked for, by their ids.

    untold: of these nobody was told that they opened, as far as it knows.
    delivering: these are of its drain, and their agents go on hearing their events there until they hang up.
    silent: of these it has said nothing in time.
    """

    untold: Collection[int] = ()
    delivering: Collection[int] = ()
    silent: Collection[int] = ()


# Asks a replica to let go of sessions; returns when it has, or when it has been given long enough.
AskOwner = Callable[[UUID, Sequence[Elsewhere]], Awaitable[LetGo]]


def always() -> bool:
    return True


class Request:
    """One agent that wants its session. `only_new`: it does not want it if somebody else has it by now.

    `is_there` says whether the agent still is: for one that has gone nobody elsewhere is asked to let go.
    """

    __slots__ = (
        "answer",
        "delivering",
        "is_there",
        "key",
        "may_have_made",
        "only_new",
        "owner_was_silent",
        "rounds",
        "started_at",
        "wanted_id",
        "was_told",
    )

    def __init__(
        self,
        key: Key,
        started_at: datetime,
        answer: asyncio.Future[OpenedSession | None],
        only_new: bool,
        is_there: Callable[[], bool],
    ) -> None:
        self.is_there = is_there
        self.key = key
        self.started_at = started_at
        self.answer = answer
        self.only_new = only_new
        # The session elsewhere whose owner was asked to let go of it.
        self.want(0)
        # The outcome to report should a row with our `started_at` be found: an attempt ended without an answer.
        self.may_have_made: Outcome | None = None
        self.rounds = 0

    def want(self, session_id: int) -> None:
        """Its owner is about to be asked."""
        self.wanted_id = session_id
        self.was_told = True  # the others know of that session, unless its owner says otherwise
        self.delivering: UUID | None = None  # its owner, if that goes on sending the agent its events
        self.owner_was_silent = True

    def taken_over(self, session_id: int, started_at: datetime) -> OpenedSession:
        # A session that nobody knows of is not taken over in silence: it is as new.
        outcome: Outcome = "taken_over" if self.was_told else "created"
        return OpenedSession(session_id, started_at, outcome, self.delivering, self.owner_was_silent)

    def made(self, session_id: int, started_at: datetime) -> OpenedSession:
        """The row with our `started_at`, of the attempt whose answer was lost."""
        if self.may_have_made == "taken_over":
            return self.taken_over(session_id, started_at)
        return OpenedSession(session_id, started_at, "created")

    @property
    def is_wanted(self) -> bool:
        return not self.answer.done() or self.may_have_made is not None


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """A row that may exist, of an attempt whose caller has been refused."""

    key: Key
    started_at: datetime
    outcome: Outcome
    is_wanted: bool = True


class Openings:
    def __init__(
        self,
        database: Database,
        owner: Owner,
        closings: Closings,
        metrics: Metrics,
        *,
        ask_owner: AskOwner,
        max_waiting: int,
    ) -> None:
        self._database = database
        self._owner = owner
        self._closings = closings
        self._metrics = metrics
        self._ask_owner = ask_owner
        self._max_waiting = max_waiting
        self._open_lane = database.lane()
        self._find_lane = database.lane()
        self._take_over_lane = database.lane()
        self._new: Batcher[Request] = Batcher(self._open_batch, self._on_failed)
        self._existing: Batcher[Request] = Batcher(self._find_batch, self._on_failed)
        self._asking: set[asyncio.Task[None]] = set()
        self._asked_for = 0  # requests whose owner is being asked
        self._let_go: Batcher[Request] = Batcher(self._take_over_batch, self._on_failed)
        self._left_behind: dict[tuple[Key, datetime], LeftBehind] = {}
        self._searches: Batcher[LeftBehind] = Batcher(self._search_batch, self._on_search_failed)

    async def found(self) -> None:
        """Return when no row of an attempt without an answer is looked for any more."""
        await self._searches.idle()

    def has_left_behind(self, key: Key) -> bool:
        """Whether a row of an attempt without an answer is looked for."""
        return any(left_key == key for left_key, _ in self._left_behind)

    async def open(
        self, agent_id: str, classroom_id: UUID, *, only_new: bool = False, is_there: Callable[[], bool] = always
    ) -> OpenedSession | None:
        """Raises Unavailable when it cannot be done now. A cancelled caller leaves no row behind.

        With `only_new` None is the answer when there is a row already, whosever it is.
        """
        if not self._database.is_healthy:
            raise Unavailable("The database is away")
        if self._waiting() >= self._max_waiting:
            raise Unavailable("Too many sessions are being opened")
        answer: asyncio.Future[OpenedSession | None] = asyncio.get_running_loop().create_future()
        request = Request((classroom_id, agent_id), datetime.now(UTC), answer, only_new, is_there)
        self._new.add(request)
        try:
            return await answer
        except asyncio.CancelledError:
            # The answer may be there already, and then nobody else will see it.
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                opened = answer.result()
                if opened is not None:
                    self._abandon(opened)
            raise

    def _waiting(self) -> int:
        return len(self._new) + len(self._existing) + self._asked_for + len(self._let_go) + len(self._left_behind)

    async def close(self) -> None:
        """Stop at once; who still waits gets Unavailable."""
        for task in list(self._asking):
            task.cancel()
        if self._asking:
            await asyncio.wait(self._asking)
        for batcher in (self._new, self._existing, self._let_go, self._searches):
            await batcher.close()

    # --- the steps

    async def _open_batch(self, batch: list[Request]) -> None:
        await run_in_parts(batch, self._open_part, BadRow, self._fail)

    async def _open_part(self, part: list[Request]) -> None:
        keys = [request.key[0] for request in part], [request.key[1] for request in part]
        starts = [request.started_at for request in part]
        rows = await self._write("created", self._open_lane, sql.OPEN, part, *keys, starts)
        if rows is None:
            return
        by_key = {(row[1], row[2]): row[0] for row in rows}
        for request in part:
            session_id = by_key.get(request.key)
            if session_id is None:
                self._existing.add(request)
            else:
                self._settle(request, OpenedSession(session_id, request.started_at, "created"))

    async def _find_batch(self, batch: list[Request]) -> None:
        """Whose are the rows that were in the way?"""
        keys = [request.key[0] for request in batch], [request.key[1] for request in batch]
        rows = await self._attempt("find", self._find_lane, sql.FIND_OWNERS, batch, *keys)
        if rows is None:
            return
        by_key = {(row[1], row[2]): row for row in rows}
        elsewhere: defaultdict[UUID, list[tuple[Request, Elsewhere]]] = defaultdict(list)
        for request in batch:
            row = by_key.get(request.key)
            if row is None:
                self._go_round(request)
            elif row[4] == self._owner.replica_id:
                self._settle_own(request, row[0], row[3])
            elif request.only_new:
                self._settle(request, None)
            elif not request.is_there():  # it may have connected elsewhere meanwhile, and must not lose that
                self._fail(request, TryAgain("the agent has gone"))
            else:
                request.want(row[0])
                elsewhere[row[4]].append((request, Elsewhere(row[0], row[1], row[2])))
        for owner, wanted in elsewhere.items():
            self._asked_for += len(wanted)
            task = asyncio.get_running_loop().create_task(self._ask(owner, wanted))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self, owner: UUID, wanted: list[tuple[Request, Elsewhere]]) -> None:
        """A dead owner delays its own sessions only, and these by no more than it is given to answer."""
        try:
            let_go = await self._ask_owner(owner, [session for _, session in wanted])
            for request, session in wanted:
                request.was_told = session.session_id not in let_go.untold
                request.delivering = owner if session.session_id in let_go.delivering else None
                request.owner_was_silent = session.session_id in let_go.silent
        except Exception as error:
            log.error("ask_owner_failed", limited=True, error=repr(error), exc_info=error)
        finally:
            self._asked_for -= len(wanted)
            for request, _ in wanted:  # gone or not: what its owner has let go has nobody now
                self._let_go.add(request)

    async def _take_over_batch(self, batch: list[Request]) -> None:
        await run_in_parts(batch, self._take_over_part, BadRow, self._fail)

    async def _take_over_part(self, part: list[Request]) -> None:
        ids, starts = [request.wanted_id for request in part], [request.started_at for request in part]
        reason = reasons.REPLACED.type
        rows = await self._write("taken_over", self._take_over_lane, sql.TAKE_OVER, part, ids, starts, reason)
        if rows is None:
            return
        by_key = {(row[1], row[2]): row for row in rows}
        for request in part:
            row = by_key.get(request.key)
            if row is None:
                self._go_round(request)
            else:
                self._settle(request, request.taken_over(row[0], row[3]))

    def _settle_own(self, request: Request, session_id: int, started_at: datetime) -> None:
        """The row found is this replica's already."""
        if started_at == request.started_at:
            # An earlier attempt of this very request has made it, and its answer was lost.
            self._settle(request, request.made(session_id, started_at))
            return
        if self._closings.call_after(session_id, lambda: self._go_round(request)):
            return
        left_behind = self._left_behind.pop((request.key, started_at), None)
        if left_behind is not None:
            # Nobody was ever told of this one: it is as new. Or nobody has asked where it came from what was sent there.
            is_moved = left_behind.outcome == "taken_over"
            opened = OpenedSession(session_id, started_at, left_behind.outcome, owner_was_silent=is_moved)
            self._settle(request, opened)
            return
        self._settle(request, OpenedSession(session_id, started_at, "kept"))

    def _go_round(self, request: Request) -> None:
        """The row that was in the way is gone: try to make a new one."""
        request.rounds += 1
        if request.rounds < MAX_ROUNDS:
            self._new.add(request)
        else:
            self._fail(request, TryAgain("the row changed hands too often"))

    async def _write(
        self, outcome: Outcome, lane: Lane, statement: str, part: list[Request], *arguments: object
    ) -> list[asyncpg.Record] | None:
        """A statement that makes rows of this replica, as long as this replica has not been swept."""
        rows = await self._attempt(outcome, lane, statement, part, self._owner.replica_id, *arguments)
        if rows and rows[-1][0] is None:
            self._owner.swept.set()
            self._refuse(part, TryAgain("this replica has been swept"))
            return None
        return rows

    async def _attempt(
        self, outcome: Outcome | Literal["find"], lane: Lane, statement: str, part: list[Request], *arguments: object
    ) -> list[asyncpg.Record] | None:
        """Run the statement, a second time when the connection was lost; None: all have been refused."""
        kind = KINDS[outcome]
        conflicts = losses = 0
        while True:
            started = time.perf_counter()
            try:
                rows = await lane.fetch(statement, *arguments)
            except TryAgain as error:
                self._metrics.store_errors.labels(kind).inc()
                conflicts += 1
                if conflicts >= MAX_CONFLICTS:
                    self._refuse(part, error)
                    return None
            except Away as error:
                self._metrics.store_errors.labels(kind).inc()
                if error.may_have_run and outcome != "find":
                    for request in part:
                        request.may_have_made = request.may_have_made or outcome
                losses += 1
                if losses > 1 or error.was_slow or not self._database.is_healthy:
                    self._database.report_away(error)
                    self._refuse(part, error)
                    return None
            else:
                self._metrics.store_batch_rows.labels(kind).observe(len(part))
                self._metrics.store_batch_seconds.labels(kind).observe(time.perf_counter() - started)
                return rows

    # --- answers

    def _settle(self, request: Request, opened: OpenedSession | None) -> None:
        if request.answer.done():
            if opened is not None:
                self._abandon(opened)
        else:
            request.answer.set_result(opened)

    def _abandon(self, opened: OpenedSession) -> None:
        """Its caller has gone. A row that was there before is the affair of whoever made it."""
        if opened.outcome != "kept":
            self._close_unseen(opened.session_id, reasons.LOST.type, opened.outcome)

    def _close_unseen(self, session_id: int, reason: str, outcome: Outcome) -> None:
        # Nobody has heard of a new session; one that was taken over is still in the others' rosters.
        self._closings.add(session_id, reason, datetime.now(UTC), is_secret=outcome == "created")

    def _refuse(self, part: list[Request], error: Exception) -> None:
        for request in part:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if request.may_have_made is not None:
            outcome: Outcome = request.may_have_made if request.was_told else "created"
            self._search(LeftBehind(request.key, request.started_at, outcome))
        if request.answer.done():
            return
        failure = SessionError(reasons.INTERNAL_ERROR) if isinstance(error, BadRow) else Unavailable()
        failure.__cause__ = error
        request.answer.set_exception(failure)

    def _on_failed(self, batch: list[Request], error: Exception) -> None:
        log.error("open_failed", limited=True, error=repr(error), exc_info=error)
        self._refuse(batch, error)

    # --- rows left behind

    def _search(self, left_behind: LeftBehind) -> None:
        self._left_behind[left_behind.key, left_behind.started_at] = left_behind
        self._searches.add(left_behind)

    async def _search_batch(self, batch: list[LeftBehind]) -> None:
        """Find and close them, however long the database stays away."""
        delays = backoff_delays_s()
        while True:
            try:
                rows = await self._find_lane.fetch(
                    sql.FIND_LEFT_BEHIND,
                    self._owner.replica_id,
                    [left.key[0] for left in batch],
                    [left.key[1] for left in batch],
                    [left.started_at for left in batch],
                )
            except (Away, TryAgain):
                await asyncio.sleep(next(delays))
            else:
                break
        found = {(row[1], row[2]): row[0] for row in rows}
        for left in batch:
            # One that is no longer listed has been given to a later request.
            is_listed = self._left_behind.pop((left.key, left.started_at), None) is not None
            if is_listed and left.key in found:
                self._close_unseen(found[left.key], reasons.UNAVAILABLE.type, left.outcome)

    def _on_search_failed(self, batch: list[LeftBehind], error: Exception) -> None:
        log.error("search_failed", limited=True, error=repr(error), exc_info=error)
        for left in batch:
            self._left_behind.pop((left.key, left.started_at), None)
