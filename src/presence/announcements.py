"""What the others are told of an agent: agent.enter and agent.leave, once each, and the truth in the end.

Owns the enters of which nobody knows whether NATS has them: its connection broke in that moment. They are told again when it
is back, of agents that are still in; of each agent the latest only. Leaves are never told twice from here: a row stays
until its leave is proven. Knows nothing of connections, sockets or SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Final
from uuid import UUID

from presence import protocol
from presence.log import get

if TYPE_CHECKING:
    from presence.bus import Bus
    from presence.metrics import Metrics
    from presence.store import ClosedSession, Store

log = get("announcements")

MAX_UNPROVEN: Final = 65_536
TOLD_AT_ONCE: Final = 512

Key = tuple[UUID, str]


@dataclass(frozen=True, slots=True)
class Enter:
    """An agent has come into a classroom."""

    classroom_id: UUID
    agent_id: str
    session_id: int
    at: datetime

    @property
    def key(self) -> Key:
        return self.classroom_id, self.agent_id


class Announcements:
    def __init__(self, store: Store, bus: Bus, metrics: Metrics, *, subject_prefix: str) -> None:
        self._store = store
        self._bus = bus
        self._metrics = metrics
        self._subject_prefix = subject_prefix
        self._unproven: dict[Key, Enter] = {}
        self._telling = asyncio.Lock()
        metrics.enters_unproven.set_function(lambda: float(len(self._unproven)))

    @property
    def unproven(self) -> int:
        """How many enters wait to be told again."""
        return len(self._unproven)

    async def tell_enter(self, enter: Enter) -> None:
        """Return when NATS has it, and all that was subscribed before this call; raises Unavailable.

        It may have been heard all the same, and is told again later if the agent is still in by then.
        """
        try:
            self._publish_enter(enter)
            await self._bus.confirm()
        except BaseException:
            self._doubt(enter)
            raise
        self._unproven.pop(enter.key, None)

    def tell_leaves(self, rows: Sequence[ClosedSession]) -> None:
        """Of sessions that are locked and not yet history; raises Unavailable. The caller has it proven."""
        for row in rows:
            enter = self._unproven.get((row.classroom_id, row.agent_id))
            if enter is not None and enter.session_id == row.session_id:
                self._publish_enter(enter)  # nobody hears of one that leaves and never came
            leave = protocol.encode_agent_leave(row.agent_id, row.session_id, row.ended_at)
            self._publish("agent.leave", row.classroom_id, row.agent_id, row.session_id, leave)

    async def tell_again(self) -> None:
        """NATS is back: tell what may not have been heard, of agents that are in now; raises Unavailable."""
        async with self._telling:
            waiting = list(self._unproven.values())
            for start in range(0, len(waiting), TOLD_AT_ONCE):
                part = waiting[start : start + TOLD_AT_ONCE]
                await self._store.while_in(part, partial(self._publish_those, part))
                for enter in part:  # whoever is not in has left, and whoever saw to that has told it
                    if self._unproven.get(enter.key) is enter:
                        del self._unproven[enter.key]

    def _publish_those(self, enters: Sequence[Enter], present: set[int]) -> None:
        for enter in enters:
            if enter.session_id in present:
                self._publish_enter(enter)

    def _doubt(self, enter: Enter) -> None:
        self._unproven.pop(enter.key, None)
        if len(self._unproven) >= MAX_UNPROVEN:
            del self._unproven[next(iter(self._unproven))]
            self._metrics.bus_dropped.inc()
            log.error("enter_dropped", limited=True, waiting=MAX_UNPROVEN)
        self._unproven[enter.key] = enter

    def _publish_enter(self, enter: Enter) -> None:
        payload = protocol.encode_agent_enter(enter.agent_id, enter.session_id, enter.at)
        self._publish("agent.enter", enter.classroom_id, enter.agent_id, enter.session_id, payload)

    def _publish(self, kind: str, classroom_id: UUID, agent_id: str, session_id: int, payload: bytes) -> None:
        headers = {"Sender-Agent-Id": agent_id, "Nats-Msg-Id": f"{session_id}.{kind}"}
        self._bus.publish(f"{self._subject_prefix}.{classroom_id}.agent", payload, headers)
        self._metrics.events_out.labels(kind).inc()
