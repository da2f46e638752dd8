"""One connection's life, top to bottom: open → authenticate → session → events and heartbeats → leave → history.

Owns the phase of every connection, and is the hub's handler: what the hub notices (a message, a deadline, a limit, a close)
arrives here and nowhere else. Knows nothing of SQL, NATS subjects, HTTP or epoll.

`end` is the one place where a connection's life is over; what that implies stands in the row of its reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Final

from presence import protocol, reasons
from presence.errors import SessionError
from presence.identity import Identity, agent_id_of
from presence.log import get
from presence.outage import Outage
from presence_core.frames import OPCODE_TEXT, encode_frame
from presence_core.hub import DEADLINE_PONG, LIMIT_BACKLOG, Connection, Room

if TYPE_CHECKING:
    from uuid import UUID

    from presence.authn import Authenticator
    from presence.authz import Authorizer
    from presence.config import Settings
    from presence.fanout import Fanout
    from presence.metrics import Metrics
    from presence.reasons import Reason
    from presence.sessions import Sessions
    from presence.steps import Steps

log = get("connection")

# A token that expires in more than this is looked at again by then: far deadlines would gain nothing.
ALARM_MAX_S: Final = 30 * 24 * 3600
HEAD_START: Final = 0.1  # of the drain: nobody comes back elsewhere before everybody has been told to


class Phase(IntEnum):
    """Where in its life a connection is. It only ever moves down this list."""

    WAITING = 0  # for the connect_request
    CONNECTING = 1  # the request is being worked on
    CONNECTED = 2
    ENDED = 3


class Agent(Connection):
    """A connection and the session on it. It owns no task and no timer handle once it is connected."""

    __slots__ = ("agent_id", "classroom_id", "expires_at", "phase", "refreshing", "session_id", "told")

    def __init__(self) -> None:
        self.phase = Phase.WAITING
        self.agent_id: str = ""
        self.classroom_id: UUID | None = None
        self.session_id = 0
        self.expires_at = 0.0
        self.refreshing = False
        self.told = False  # of the drain: the close comes without a second message


class Lives:
    """The lives of all connections of this process. One instance, the hub's handler."""

    def __init__(
        self,
        settings: Settings,
        authenticator: Authenticator,
        authorizer: Authorizer,
        sessions: Sessions,
        fanout: Fanout,
        metrics: Metrics,
        steps: Steps,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self._authorizer = authorizer
        self._sessions = sessions
        self._fanout = fanout
        self._metrics = metrics
        self._steps = steps
        self._now = now
        self._clock = clock
        self._outage = Outage(settings.reconnect_spread_s)
        self._random = random
        # Found once: a look-up by label, or a line that nobody logs, costs more than what it is for.
        self._connected_count = metrics.connects.labels("success")
        self._ended_counts = {reason: metrics.closes.labels(reason) for reason in reasons.BY_TYPE}
        self._is_debug = settings.log_level == "debug"
        self._in_phase = [0, 0, 0]  # how many are WAITING, CONNECTING, CONNECTED
        for phase in (Phase.WAITING, Phase.CONNECTING, Phase.CONNECTED):
            metrics.connections.labels(phase.name.lower()).set_function(partial(self._in_phase.__getitem__, phase))
        self._connects = asyncio.Semaphore(settings.max_connects_in_flight)
        self.draining = False
        self.parks = False  # a session whose socket closes in the drain waits for its agent to come back elsewhere
        sessions.use(self.end)

    # --- open: the upgrade is done, ten seconds to say who it is

    def on_open(self, agent: Agent) -> None:
        self._in_phase[Phase.WAITING] += 1
        agent.set_alarm(self._settings.auth_timeout_s * 1000)

    def on_message(self, agent: Agent, data: bytes, opcode: int) -> None:
        if agent.phase is Phase.ENDED:
            return
        try:
            if opcode != OPCODE_TEXT:
                raise SessionError(reasons.UNSUPPORTED_REQUEST, "Messages are text frames")
            self._on_request(agent, protocol.parse_request(data))
        except SessionError as error:
            self.end(agent, error.reason, error.title)

    def _on_request(self, agent: Agent, request: protocol.ConnectRequest | protocol.Refresh) -> None:
        if isinstance(request, protocol.ConnectRequest) and agent.phase is Phase.WAITING:
            if self.draining:
                self.end(agent, reasons.TERMINATED)
                return
            self._enter_phase(agent, Phase.CONNECTING)
            agent.set_alarm(self._settings.connect_timeout_s * 1000)
            self._steps.spawn(self._connect(agent, request))
        elif isinstance(request, protocol.Refresh) and agent.phase is Phase.CONNECTED:
            if agent.refreshing:
                raise SessionError(reasons.RATE_LIMITED, "One refresh at a time")
            agent.refreshing = True
            self._steps.spawn(self._refresh(agent, request))
        else:
            raise SessionError(reasons.UNSUPPORTED_REQUEST, "This request is not expected now")

    def _enter_phase(self, agent: Agent, phase: Phase) -> None:
        self._in_phase[agent.phase] -= 1
        self._in_phase[phase] += 1
        agent.phase = phase

    # --- connect: authenticate → row → subscription → enter → success

    async def _connect(self, agent: Agent, request: protocol.ConnectRequest) -> None:
        started = time.perf_counter()
        try:
            async with self._connects:
                if agent.phase is not Phase.CONNECTING:
                    return  # gone while it waited for its turn
                identity = await self._authorize(agent, request)
                agent.agent_id = agent_id_of(request.agent_label, identity)
                agent.classroom_id = request.classroom_id
                agent.expires_at = identity.expires_at
                await self._sessions.connect(agent, self._welcome)
            self._connected_count.inc()
            self._metrics.connect_seconds.observe(time.perf_counter() - started)
        except SessionError as error:
            self._metrics.connects.labels(error.reason.type).inc()
            self.end(agent, error.reason, error.title)
        except Exception:
            self._metrics.connects.labels(reasons.INTERNAL_ERROR.type).inc()
            self.end(agent, reasons.INTERNAL_ERROR)
            raise

    async def _authorize(self, agent: Agent, request: protocol.ConnectRequest) -> Identity:
        identity = await self._authenticator.authenticate(request.token)
        agent_id = agent_id_of(request.agent_label, identity)
        await self._authorizer.authorize(identity, agent_id, request.classroom_id)
        return identity

    def _welcome(self, agent: Agent, session_id: int, room: Room, held: bytes) -> bool:
        """All is in place: say so and let the events come, the held ones first. False: the agent has gone meanwhile."""
        if agent.phase is not Phase.CONNECTING or not agent.is_open:
            return False
        settings = self._settings
        ping_interval_ms, pong_timeout_ms = int(settings.ping_interval_s * 1000), int(settings.pong_timeout_s * 1000)
        success = protocol.encode_success(session_id, agent.agent_id, ping_interval_ms, pong_timeout_ms)
        if not agent.send(encode_frame(OPCODE_TEXT, success) + held):
            return False
        self._outage.end()
        agent.session_id = session_id
        self._enter_phase(agent, Phase.CONNECTED)
        agent.join(room)
        agent.start_heartbeat()
        self._watch_expiry(agent)
        if self.draining:
            self.tell_terminated(agent)
        if self._is_debug:
            log.debug(
                "agent_connected", agent_id=agent.agent_id, classroom_id=agent.classroom_id, session_id=session_id
            )
        return True

    # --- connected: the token runs, and may be renewed

    def _watch_expiry(self, agent: Agent) -> None:
        left_s = agent.expires_at - self._now()
        agent.set_alarm(min(left_s, ALARM_MAX_S) * 1000)

    async def _refresh(self, agent: Agent, request: protocol.Refresh) -> None:
        try:
            identity = await self._authenticator.authenticate(request.token)
            label = agent.agent_id.partition(".")[0]
            if agent_id_of(label, identity) != agent.agent_id:
                raise SessionError(reasons.UNAUTHENTICATED, "The token belongs to another agent")
            assert agent.classroom_id is not None
            await self._authorizer.authorize(identity, agent.agent_id, agent.classroom_id)
        except SessionError as error:
            self._metrics.refreshes.labels(error.reason.type).inc()
            self.end(agent, error.reason, error.title)
            return
        finally:
            agent.refreshing = False
        self._metrics.refreshes.labels("success").inc()
        if agent.phase is Phase.CONNECTED:
            agent.expires_at = identity.expires_at
            self._watch_expiry(agent)

    # --- what the hub notices

    def on_deadline(self, agent: Agent, deadline: str) -> None:
        if deadline == DEADLINE_PONG:
            self.end(agent, reasons.PONG_TIMED_OUT)
        elif agent.phase is Phase.WAITING:
            self.end(agent, reasons.AUTH_TIMED_OUT)
        elif agent.phase is Phase.CONNECTING:
            self.end(agent, reasons.UNAVAILABLE, "The connect took too long")
        elif agent.expires_at > self._now():
            self._watch_expiry(agent)
        else:
            self.end(agent, reasons.TOKEN_EXPIRED)

    def on_limit(self, agent: Agent, limit: str) -> None:
        self.end(agent, reasons.SLOW_CONSUMER if limit == LIMIT_BACKLOG else reasons.RATE_LIMITED)

    def on_violation(self, agent: Agent, code: int) -> None:
        log.info("protocol_violation", limited=True, code=code)
        self.end(agent, reasons.PROTOCOL_ERROR)

    def on_close(self, agent: Agent, code: int) -> None:
        self.end(agent, reasons.CLOSED)

    def on_closed(self, agent: Agent, code: int) -> None:
        self.end(agent, reasons.LOST)

    def on_error(self, agent: Agent | None, error: Exception) -> None:
        log.error("callback_failed", limited=True, error=repr(error), exc_info=error)
        if agent is not None:
            self.end(agent, reasons.INTERNAL_ERROR)

    def on_room_drained(self, room: Room) -> None:
        self._fanout.on_room_drained(room)

    # --- the end

    def tell_terminated(self, agent: Agent) -> None:
        """The drain has begun: the message now, the close when it ends."""
        if agent.phase is not Phase.ENDED and not agent.told:
            agent.told = True
            agent.send(self._error_frame(reasons.TERMINATED, None))

    def end(self, agent: Agent, reason: Reason, title: str | None = None) -> None:
        """The one place where a life ends. Only the first reason counts."""
        phase, agent.phase = agent.phase, Phase.ENDED
        if phase is Phase.ENDED:
            return
        self._in_phase[phase] -= 1
        self._ended_counts[reason.type].inc()
        if reason.announced and agent.told and reason in (reasons.TERMINATED, reasons.REPLACED):
            agent.close(reasons.TERMINATED.close_code)  # it knows that this connection ends, and why
        elif reason.announced:
            agent.close(reason.close_code, b"", self._error_frame(reason, title))
        elif reason is reasons.INTERNAL_ERROR:
            agent.close(reason.close_code)
        if phase is Phase.CONNECTED and reason.leaves:
            self._steps.spawn(self._leave(agent, reason))
        else:
            agent.finish()
        if self._is_debug:
            log.debug("agent_ended", reason=reason.type, agent_id=agent.agent_id, session_id=agent.session_id)

    async def _leave(self, agent: Agent, reason: Reason) -> None:
        """agent.leave, then the row to history, then the answer to the agent's close frame."""
        try:
            if self.parks and agent.told and reason is not reasons.REMOVED:
                await self._sessions.park(agent, reason)
            else:
                await self._sessions.leave(agent, reason)
        finally:
            agent.finish()

    def _error_frame(self, reason: Reason, title: str | None) -> bytes:
        return encode_frame(OPCODE_TEXT, protocol.encode_error(reason, title, self._reconnect_after_ms(reason)))

    def _reconnect_after_ms(self, reason: Reason) -> int:
        """At random, for an agent each: all that one event sends away must not come back in one instant."""
        if not reason.reconnect:
            return 0
        if reason is reasons.UNAVAILABLE:
            return int((1 + self._random()) / 2 * self._outage.spread_s(self._clock()) * 1000)
        head_start_s = HEAD_START * self._settings.drain_timeout_s if reason is reasons.TERMINATED else 0.0
        return int((head_start_s + self._random() * self._settings.reconnect_spread_s) * 1000)
