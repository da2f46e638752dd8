"""The shutdown sequence: not ready, no new upgrades, `terminated` to everyone, time to move, close, write, done.

Owns the order and its time limits. Knows nothing of how any of the steps is done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from presence import reasons
from presence.errors import Unavailable
from presence.log import get
from presence_core.hub import Hub

if TYPE_CHECKING:
    from presence.bus import Bus
    from presence.config import Settings
    from presence.connection import Agent, Lives
    from presence.gateway import Gateway
    from presence.replicas import Lease
    from presence.sessions import Sessions
    from presence.steps import Steps
    from presence.store import Store

log = get("drain")

AGENTS_PER_TURN: Final = 200  # told or closed before the loop has its turn again: about a millisecond
POLL_S: Final = 0.02
CLOSE_HANDSHAKE_S: Final = 0.2  # for the last agents to answer the close frame
SERVE_TIMEOUT_S: Final = 0.1  # for the last events to those who stay to the end
# For rows and leaves when the database or NATS is slow: past it they are given up, loudly.
WRITE_TIMEOUT_S: Final = 20.0


class Drain:
    def __init__(
        self,
        settings: Settings,
        hub: Hub,
        gateway: Gateway,
        lives: Lives,
        sessions: Sessions,
        lease: Lease,
        steps: Steps,
        store: Store,
        bus: Bus,
    ) -> None:
        self._timeout_s = settings.drain_timeout_s
        self._sessions = sessions
        self._lease = lease
        self._hub = hub
        self._gateway = gateway
        self._lives = lives
        self._steps = steps
        self._store = store
        self._bus = bus

    async def run(self) -> bool:
        """Returns whether everything that was queued has been written and published."""
        started = time.monotonic()
        self._gateway.draining = True
        self._lives.draining = True
        self._lives.parks = self._lease.has_others  # without others there is nowhere to come back
        await self._each(self._hub.members(), self._lives.tell_terminated)
        log.info("drain_started", agents=len(self._hub), told_s=round(time.monotonic() - started, 3))
        await self._until_empty(started + self._timeout_s)
        remaining, waited = len(self._hub), time.monotonic()
        self._lives.parks = False
        self._sessions.close_parked()
        await self._serve()
        await self._each(self._hub.members(), lambda agent: self._lives.end(agent, reasons.TERMINATED))
        closed = time.monotonic()
        written = await self._write()
        answering = time.monotonic()
        await self._until_empty(answering + CLOSE_HANDSHAKE_S)
        finished = time.monotonic()
        log.info(
            "drain_finished",
            closed=remaining,
            written=written,
            took_s=round(finished - started, 3),
            closing_s=round(closed - waited, 3),
            writing_s=round(answering - closed, 3),
            answers_s=round(finished - answering, 3),
        )
        return written

    async def _each(self, agents: Iterable[Agent], step: Callable[[Agent], None]) -> None:
        for number, agent in enumerate(agents, 1):
            step(agent)
            if number % AGENTS_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _until_empty(self, deadline: float) -> None:
        # Asked again and again for ten seconds, once in a life; an event would cost something at every close before.
        while (len(self._hub) or self._sessions.parked) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async def _serve(self) -> None:
        """Who hears its events here until now gets those that are on their way."""
        members: list[Agent] = self._hub.members()
        staying = [(agent.classroom_id, agent.agent_id) for agent in members if agent.classroom_id is not None]
        if not staying:
            return
        try:
            async with asyncio.timeout(SERVE_TIMEOUT_S):
                await self._sessions.deliver(staying)
        except (Unavailable, TimeoutError) as error:
            log.warning("last_events_not_sent", error=repr(error))

    async def _write(self) -> bool:
        """Rows to history and leaves to NATS."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._steps.settled()
                await self._store.flush()
                await self._bus.confirm()
        except Exception as error:
            log.error("drain_incomplete", error=repr(error), under_way=len(self._steps))
            return False
        return True
