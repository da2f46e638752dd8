"""Sessions: who is in which classroom on this replica, how a session opens, is replaced, and closes.

Owns the order in which things become true: row committed, subscription active at the NATS server, agent.enter published,
success; and at the end agent.leave, then history. What happens to one agent in one classroom happens one after the other,
whatever the number of its connections. Knows nothing of sockets, frames or SQL.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from uuid import UUID

from presence_core.hub import Room

from presence import protocol, reasons
from presence.errors import SessionError, Unavailable
from presence.log import get

if TYPE_CHECKING:
    from presence.bus import Bus
    from presence.connection import Agent
    from presence.fanout import Fanout
    from presence.metrics import Metrics
    from presence.reasons import Reason
    from presence.steps import Steps
    from presence.store import ClosedSession, Store

log = get("sessions")

Key = tuple[UUID, str]


class Gone(SessionError):
    """The agent went while its connect was under way: there is nobody to tell."""

    def __init__(self) -> None:
        super().__init__(reasons.LOST)


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
        self, store: Store, bus: Bus, fanout: Fanout, steps: Steps, metrics: Metrics, *, subject_prefix: str
    ) -> None:
        self._store = store
        self._bus = bus
        self._fanout = fanout
        self._steps = steps
        self._metrics = metrics
        self._subject_prefix = subject_prefix
        self._turns = Turns()
        self._unannounced: set[int] = set()  # sessions whose agent.enter was never published

    # --- open

    async def connect(
        self,
        agent: Agent,
        welcome: Callable[[Agent, int, Room], bool],
        replace: Callable[[Agent], None],
    ) -> None:
        """Bring an authenticated agent into its classroom; raises SessionError when that cannot be.

        `replace` ends the connection that this agent has had here until now; `welcome` says success and joins the room,
        in one step.
        """
        assert agent.classroom_id is not None
        key = agent.classroom_id, agent.agent_id
        if not (self._store.healthy and self._bus.connected):
            raise Unavailable  # at once: its turn may be a close that waits for the same outage to end
        await self._turns.take(key)
        try:
            if not agent.is_open:
                raise Gone
            predecessor = self._fanout.agent_in(agent.classroom_id, agent.agent_id)
            if predecessor is not None:
                replace(predecessor)
            await self._open(agent, predecessor, welcome)
        finally:
            self._turns.give(key)

    async def _open(self, agent: Agent, predecessor: Agent | None, welcome: Callable[[Agent, int, Room], bool]) -> None:
        assert agent.classroom_id is not None
        try:
            session = await self._store.open_session(agent.agent_id, agent.classroom_id)
        except BaseException:
            if predecessor is not None:  # its session has nobody now, unless the next in turn carries it on
                self._steps.spawn(self.leave(predecessor, reasons.REPLACED))
            raise
        # The session is silent to the others when it goes on: from a connection here, or from another replica. One
        # that had to be made anew is not, predecessor or not: they have been told that the old one is over.
        silent = session.outcome != "created"
        if not silent:
            self._unannounced.add(session.session_id)
        try:
            await self._enter(agent, session.session_id, session.started_at, silent, welcome)
            if predecessor is not None:
                self._bus.release(agent.classroom_id)
        except BaseException as error:
            if predecessor is not None:
                self._forget(predecessor)
            reason = error.reason if isinstance(error, SessionError) else reasons.INTERNAL_ERROR
            # Not awaited: the agent is told now. Should it come again at once, its new row waits for this close.
            self._store.close_later(session.session_id, reason.type, datetime.now(UTC))
            raise

    async def _enter(
        self,
        agent: Agent,
        session_id: int,
        started_at: datetime,
        silent: bool,
        welcome: Callable[[Agent, int, Room], bool],
    ) -> None:
        assert agent.classroom_id is not None
        await self._bus.subscribe(agent.classroom_id)
        try:
            if not silent:
                enter = protocol.encode_agent_enter(agent.agent_id, session_id, started_at)
                self._publish("agent.enter", agent.classroom_id, agent.agent_id, session_id, enter)
                self._unannounced.discard(session_id)
            await self._bus.confirm()  # NATS works in order: the subscription is active, and enter came after it
            room = self._fanout.enter(agent.classroom_id, agent)
            if not welcome(agent, session_id, room):
                raise Gone
        except BaseException:
            self._fanout.leave(agent.classroom_id, agent)
            self._bus.release(agent.classroom_id)
            raise

    def _forget(self, predecessor: Agent) -> None:
        assert predecessor.classroom_id is not None
        self._fanout.leave(predecessor.classroom_id, predecessor)
        self._bus.release(predecessor.classroom_id)

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

    def on_owned(self, rows: Sequence[ClosedSession]) -> None:
        """Rows that are this replica's to close, locked and not yet moved: now the others are told."""
        for row in rows:
            if row.session_id in self._unannounced:
                self._unannounced.discard(row.session_id)
                continue
            leave = protocol.encode_agent_leave(row.agent_id, row.session_id, row.ended_at)
            self._publish("agent.leave", row.classroom_id, row.agent_id, row.session_id, leave)

    def _publish(self, kind: str, classroom_id: UUID, agent_id: str, session_id: int, payload: bytes) -> None:
        headers = {"Sender-Agent-Id": agent_id, "Nats-Msg-Id": f"{session_id}.{kind}"}
        self._bus.publish(f"{self._subject_prefix}.{classroom_id}.agent", payload, headers)
        self._metrics.events_out.labels(kind).inc()
