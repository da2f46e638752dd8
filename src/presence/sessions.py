"""Sessions: who is in which classroom on this replica, how a session opens, is replaced, and closes.

Owns the order in which things become true: row committed, subscription active at the NATS server, agent.enter published,
success; and at the end agent.leave, then history. What happens to one agent in one classroom happens one after the other,
whatever the number of its connections. Knows nothing of sockets, frames or SQL.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final
from uuid import UUID

from presence import reasons
from presence.announcements import Enter
from presence.errors import SessionError, Unavailable
from presence.log import get
from presence.replicas import Released
from presence_core.hub import Room

if TYPE_CHECKING:
    from presence.announcements import Announcements
    from presence.bus import Bus
    from presence.connection import Agent
    from presence.fanout import Fanout
    from presence.reasons import Reason
    from presence.replicas import Owners
    from presence.steps import Steps
    from presence.store import OpenedSession, SessionRow, Store

log = get("sessions")

RESTORED_AT_ONCE: Final = 512
LET_GO_S: Final = 3.0  # whoever asked for a session has taken it by then, or has failed
ORPHAN_AGE: Final = timedelta(seconds=60)  # a row that nobody here knows may be one that is just being made

Key = tuple[UUID, str]
Welcome = Callable[["Agent", int, Room, bytes], bool]


class Gone(SessionError):
    """The agent went while its connect was under way: there is nobody to tell."""

    def __init__(self) -> None:
        super().__init__(reasons.LOST)


@dataclass(frozen=True, slots=True)
class Parked:
    """How a session ended whose row is kept for a while.

    `delivering`: the replica where its agent goes on hearing its events, if it was on its way from there.
    """

    reason: str
    ended_at: datetime
    delivering: UUID | None = None


class Turns:
    """A queue for each key that is in use: whoever comes second waits until the first is done.

    `await take(key)`, then `give(key)` in a `finally`.
    """

    def __init__(self) -> None:
        self._waiting: Final[dict[Key, deque[asyncio.Future[None]] | None]] = {}

    async def take(self, key: Key) -> None:
        if key not in self._waiting:
            self._waiting[key] = None
            return
        queue = self._waiting[key]
        if queue is None:
            queue = self._waiting[key] = deque()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(key)
            raise

    def is_taken(self, key: Key) -> bool:
        return key in self._waiting

    def give(self, key: Key) -> None:
        queue = self._waiting[key]
        while queue:
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._waiting[key]


class Sessions:
    def __init__(
        self,
        store: Store,
        bus: Bus,
        fanout: Fanout,
        owners: Owners,
        announcements: Announcements,
        steps: Steps,
    ) -> None:
        self._store = store
        self._bus = bus
        self._fanout = fanout
        self._owners = owners
        self._announcements = announcements
        self._steps = steps
        self._turns = Turns()
        self._end: Callable[[Agent, Reason], None]
        self._parked: dict[int, Parked] = {}
        self._moving: set[int] = set()  # sessions of a drain that another replica has asked for
        self._parking_is_over = False
        self._let_go: dict[Key, int] = {}  # sessions whose rows are still here, as far as is known, for others to take
        self._unannounced: set[int] = set()  # sessions whose agent.enter was never published
        self._come_backs = 0

    def use(self, end: Callable[[Agent, Reason], None]) -> None:
        """`end` ends a connection for a reason: who knows how is built on top of this, and comes last."""
        self._end = end

    # --- open

    async def connect(self, agent: Agent, welcome: Welcome) -> None:
        """Bring an authenticated agent into its classroom; raises SessionError when that cannot be.

        `welcome` says success, sends the frames that are held for it, and joins the room, in one step.
        """
        assert agent.classroom_id is not None
        key = agent.classroom_id, agent.agent_id
        if not (self._store.healthy and self._bus.connected):
            raise Unavailable  # at once: its turn may be a close that waits for the same outage to end
        await self._turns.take(key)
        try:
            await self._bus.prove()  # a row whose enter cannot be told would go to another replica in silence
            if not agent.is_open:
                raise Gone
            if (let_go := self._let_go.get(key)) is not None:
                # To carry it on would lose it to whoever asked for it, unnoticed: this will be a new one.
                await self._store.close_session(let_go, reasons.LOST.type, datetime.now(UTC))
                self._let_go.pop(key, None)
            predecessor = self._fanout.agent_in(agent.classroom_id, agent.agent_id)
            if predecessor is not None:
                self._end(predecessor, reasons.REPLACED)
            await self._open(agent, predecessor, welcome)
        finally:
            self._turns.give(key)

    async def _open(self, agent: Agent, predecessor: Agent | None, welcome: Welcome) -> None:
        assert agent.classroom_id is not None
        come_backs = self._come_backs

        def welcome_still(agent: Agent, session_id: int, room: Room, held: bytes) -> bool:
            if come_backs != self._come_backs:  # its row was swept, and it was not here yet to be brought back
                raise Unavailable
            return welcome(agent, session_id, room, held)

        try:
            session = await self._store.open_session(agent.agent_id, agent.classroom_id, is_there=lambda: agent.is_open)
        except BaseException:
            if predecessor is not None:  # its session has nobody now, unless the next in turn carries it on
                self._steps.spawn(self.leave(predecessor, reasons.LOST))
            raise
        # The session is silent to the others when it goes on: from a connection here, or from another replica. One
        # that had to be made anew is not, predecessor or not: they have been told that the old one is over.
        silent = session.outcome != "created"
        parked = self._parked.pop(session.session_id, None)
        if parked is not None:
            session = replace(session, delivering=parked.delivering)
        if not silent:
            self._unannounced.add(session.session_id)
        try:
            await self._enter(agent, session, silent, welcome_still)
            if predecessor is not None:
                self._bus.release(agent.classroom_id)
        except BaseException as error:
            if predecessor is not None:
                self._forget(predecessor)
            reason = error.reason if isinstance(error, SessionError) else reasons.INTERNAL_ERROR
            if session.delivering is not None and not self._parking_is_over:
                # Its agent may still be where it came from, and comes again: the others hear nothing until it has not.
                self._park_on_its_way(agent, session, reason)
                raise
            # Not awaited: the agent is told now. Should it come again at once, its new row waits for this close.
            is_secret = session.session_id in self._unannounced
            self._unannounced.discard(session.session_id)
            self._store.close_later(session.session_id, reason.type, datetime.now(UTC), is_secret=is_secret)
            raise

    async def _enter(self, agent: Agent, session: OpenedSession, silent: bool, welcome: Welcome) -> None:
        assert agent.classroom_id is not None
        session_id = session.session_id
        await self._bus.subscribe(agent.classroom_id)
        try:
            # NATS works in order: when this is confirmed the subscription is active, and enter came after it.
            if silent:
                await self._bus.confirm()
            else:
                self._unannounced.discard(session_id)  # from here on somebody may have heard of it
                enter = Enter(agent.classroom_id, agent.agent_id, session_id, session.started_at)
                await self._announcements.tell_enter(enter)
            room = self._fanout.enter(agent.classroom_id, agent)
            held = await self._hand_over(agent, session)
            if not welcome(agent, session_id, room, held):
                raise Gone
        except BaseException:
            self._fanout.leave(agent.classroom_id, agent)
            self._bus.release(agent.classroom_id)
            raise

    async def _hand_over(self, agent: Agent, session: OpenedSession) -> bytes:
        """Return what the agent hears first: what came here for it until its old replica had sent it all from before.

        What was published before the subscription was active comes to the old one alone, and perhaps late: the agent must
        not be told that it may hang up there any earlier.
        """
        assert agent.classroom_id is not None
        if session.delivering is None:
            return self._fanout.nothing_held() if session.owner_was_silent else b""
        self._fanout.hold(agent.classroom_id, agent)
        is_whole = await self._owners.delivered(session.delivering, agent.classroom_id, agent.agent_id)
        return self._fanout.take_held(agent.classroom_id, agent, is_whole=is_whole)

    def _forget(self, predecessor: Agent) -> None:
        assert predecessor.classroom_id is not None
        self._fanout.leave(predecessor.classroom_id, predecessor)
        self._bus.release(predecessor.classroom_id)

    # --- the same agent elsewhere

    async def release(self, classroom_id: UUID, agent_id: str, session_id: int) -> Released:
        """Another replica wants this session: its connection here ends, its row is theirs to move. Silent to the others.

        Of a row that an attempt left behind the others were not told. In a drain the connection stays: the agent hears its
        events here until it is in over there, and hangs up itself.
        """
        key = classroom_id, agent_id
        await self._turns.take(key)
        try:
            parked = self._parked.pop(session_id, None)
            is_held = parked is not None
            agent = self._fanout.agent_in(classroom_id, agent_id)
            if agent is not None and agent.session_id == session_id:
                if agent.told:
                    self._moving.add(session_id)
                    return Released(was_told=True, delivering=True)
                self._end(agent, reasons.REPLACED)
                self._forget(agent)
                is_held = True
            if is_held:
                self._let_go[key] = session_id
                asyncio.get_running_loop().call_later(LET_GO_S, self._close_let_go, key, session_id, datetime.now(UTC))
            is_untold = self._store.is_untold(classroom_id, agent_id, session_id)
            # Where its agent goes on hearing its events is too far back: whoever has it now learns that nobody here can vouch.
            was_moving = parked is not None and parked.delivering is not None
            was_told = session_id not in self._unannounced and not is_untold
            return Released(was_told=was_told, delivering=was_moving)
        finally:
            self._turns.give(key)

    async def deliver(self, moving: Sequence[Key]) -> list[bool]:
        """Return when these agents have been sent all that NATS had sent here before this call; raises Unavailable.

        The answer: whose socket was there all the time. What waited for the others has gone with theirs.
        """
        # The request has come behind it all, if it is the same connection; of one that was lost, the proof brings the gap.
        await self._bus.confirm()
        await self._fanout.served(classroom_id for classroom_id, _ in moving)
        agents = [self._fanout.agent_in(*key) for key in moving]
        return [agent is not None and agent.is_open for agent in agents]

    def _close_let_go(self, key: Key, session_id: int, ended_at: datetime) -> None:
        """A row that was taken is no longer ours: nothing happens to it. One that was not has nobody."""
        if self._let_go.get(key) == session_id:
            del self._let_go[key]
            with suppress(Unavailable):  # at the bound: `reconcile` finds it
                self._store.close_later(session_id, reasons.LOST.type, ended_at)

    def remove(self, classroom_id: UUID, agent_id: str, session_id: int | None = None) -> bool:
        """End an agent's session for an operator; False when it is not here, or may have moved: its row tells.

        With `session_id` the row is this replica's.
        """
        agent = self._fanout.agent_in(classroom_id, agent_id)
        if agent is None:
            return False
        if session_id is None:
            if agent.session_id in self._moving:
                return False
        elif agent.session_id not in (0, session_id):  # 0: it is on its way in
            return False
        self._end(agent, reasons.REMOVED)
        return True

    async def come_back(self) -> None:
        """This replica was swept and has a new identity: its live agents get new sessions, as they never left."""
        self._come_backs += 1
        agents = list(self._fanout.agents())
        for start in range(0, len(agents), RESTORED_AT_ONCE):
            await asyncio.gather(*(self._restore(agent) for agent in agents[start : start + RESTORED_AT_ONCE]))

    async def _restore(self, agent: Agent) -> None:
        assert agent.classroom_id is not None
        key = agent.classroom_id, agent.agent_id
        await self._turns.take(key)
        try:
            if self._fanout.agent_in(agent.classroom_id, agent.agent_id) is not agent:
                return
            session = await self._store.restore_session(agent.agent_id, agent.classroom_id)
            if session is None:  # it has gone to another replica meanwhile
                self._end(agent, reasons.REPLACED)
                self._forget(agent)
                return
            agent.session_id = session.session_id
        except SessionError as error:
            self._end(agent, error.reason)
            return
        finally:
            self._turns.give(key)
        if session.outcome == "created":  # whoever swept us has told the others that it left
            with suppress(Unavailable):  # then it is told when NATS is back
                await self._announcements.tell_enter(Enter(*key, session.session_id, session.started_at))

    def on_bus_back(self) -> None:
        """The connection to NATS is a new one, and proven."""
        if self._announcements.unproven:
            self._steps.spawn(self._tell_again())

    async def _tell_again(self) -> None:
        try:
            await self._announcements.tell_again()
        except Unavailable as error:
            log.warning("enters_not_told", limited=True, error=error.title)  # `reconcile` does it

    async def reconcile(self) -> None:
        """Compare the rows with the agents, and tell what was not heard: after a time in which others may have asked in vain.

        Raises Unavailable when there is still something to tell or to compare.
        """
        await self._compare()
        await self._announcements.tell_again()

    async def _compare(self) -> None:
        here = {agent.session_id: agent for agent in self._fanout.agents()}
        owned: dict[int, SessionRow] = {}
        last_id = 0
        while rows := await self._store.owned(last_id):
            owned.update((row.session_id, row) for row in rows)
            last_id = rows[-1].session_id
        if not await self._store.heartbeat():
            return  # swept meanwhile, and the rows with it: the agents are to be brought back
        for session_id, agent in here.items():
            if session_id not in owned and agent.session_id == session_id:
                assert agent.classroom_id is not None
                await self.release(agent.classroom_id, agent.agent_id, session_id)
        settled = datetime.now(UTC) - ORPHAN_AGE
        for session_id, row in owned.items():
            if session_id not in here and row.started_at < settled and not self._is_held(row):
                log.error("orphan_closed", limited=True, session_id=session_id)
                self._store.close_later(session_id, reasons.LOST.type, datetime.now(UTC))

    def _is_held(self, row: SessionRow) -> bool:
        agent = self._fanout.agent_in(row.classroom_id, row.agent_id)
        return (
            (agent is not None and agent.session_id == row.session_id)
            or row.session_id in self._parked
            or self._turns.is_taken((row.classroom_id, row.agent_id))
            or self._store.is_closing(row.session_id)
        )

    # --- drain: a session whose socket has closed waits for its agent to come back elsewhere

    @property
    def parked(self) -> int:
        """How many sessions wait for agents that nobody has asked for yet."""
        return len(self._parked.keys() - self._moving)

    async def park(self, agent: Agent, reason: Reason) -> None:
        """Keep the row until another replica takes it, or `close_parked`: neither leave nor enter if it does."""
        assert agent.classroom_id is not None
        key = agent.classroom_id, agent.agent_id
        ended_at = datetime.now(UTC)
        await self._turns.take(key)
        try:
            if self._fanout.agent_in(agent.classroom_id, agent.agent_id) is agent:
                self._forget(agent)
                if self._parking_is_over:
                    await self._store.close_session(agent.session_id, reason.type, ended_at)
                else:
                    self._parked[agent.session_id] = Parked(reason.type, ended_at)
        finally:
            self._turns.give(key)

    def _park_on_its_way(self, agent: Agent, session: OpenedSession, reason: Reason) -> None:
        """The agent has got no success: it has LET_GO_S to come again, here or elsewhere."""
        assert agent.classroom_id is not None
        key, session_id = (agent.classroom_id, agent.agent_id), session.session_id
        end = self._parked[session_id] = Parked(reason.type, datetime.now(UTC), session.delivering)
        loop = asyncio.get_running_loop()
        loop.call_later(LET_GO_S, lambda: self._steps.spawn(self._close_on_its_way(key, session_id, end)))

    async def _close_on_its_way(self, key: Key, session_id: int, end: Parked) -> None:
        await self._turns.take(key)
        try:
            if self._parked.get(session_id) is end:
                del self._parked[session_id]
                await self._store.close_session(session_id, end.reason, end.ended_at)
        finally:
            self._turns.give(key)

    def close_parked(self) -> None:
        """Whoever has not come back anywhere has left. Rows that were taken are no longer ours: nothing happens to them."""
        self._parking_is_over = True
        parked, self._parked = self._parked, {}
        for session_id, end in parked.items():
            self._store.close_later(session_id, end.reason, end.ended_at)

    # --- close

    async def leave(self, agent: Agent, reason: Reason) -> None:
        """The agent has gone: agent.leave, then its row to history. Changes nothing if the session has gone on."""
        assert agent.classroom_id is not None
        key = agent.classroom_id, agent.agent_id
        await self._turns.take(key)
        try:
            if self._fanout.agent_in(agent.classroom_id, agent.agent_id) is agent:
                self._forget(agent)
                await self._store.close_session(agent.session_id, reason.type, datetime.now(UTC))
        finally:
            self._turns.give(key)
