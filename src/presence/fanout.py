"""Fan-out: a NATS message becomes one frame, once, and goes to the room of its classroom in the hub.

Owns the classrooms that have agents on this replica, and who is in them. Knows nothing of sessions' rows, subscriptions or
sockets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final
from uuid import UUID

from presence import protocol
from presence.log import get
from presence_core.frames import OPCODE_TEXT, encode_frame
from presence_core.hub import Hub, Room, now_ns

if TYPE_CHECKING:
    from presence.connection import Agent
    from presence.metrics import Metrics

log = get("fanout")

SENDER: Final = "Sender-Agent-Id"
RECEIVER: Final = "Receiver-Agent-Id"
INTERNAL: Final = "Is-Internal"
MESSAGE_ID: Final = "Nats-Msg-Id"


class Classroom:
    """The agents of one classroom on this replica, and their room in the hub."""

    __slots__ = ("agents", "classroom_id", "key", "lost", "missed", "room")

    def __init__(self, classroom_id: UUID, key: str, room: Room) -> None:
        self.classroom_id = classroom_id
        self.key = key
        self.room = room
        self.agents: dict[str, Agent] = {}
        # Since the members were last told of a gap:
        self.missed = 0  # events refused here
        self.lost = False  # events lost before they came here, nobody knows how many


class Fanout:
    def __init__(self, metrics: Metrics, *, id_prefix: str) -> None:
        self._metrics = metrics
        self._new_room: Callable[[object], Room]
        # By the id as it stands in a subject: one look-up for each message, no parsing.
        self._classrooms: dict[str, Classroom] = {}
        self._event_ids = (f"{id_prefix}-{number}" for number in itertools.count(1))

    def use(self, hub: Hub) -> None:
        """The hub calls back into what is built on top of this: so it comes last."""
        self._new_room = hub.new_room

    # --- who is where

    def agent_in(self, classroom_id: UUID, agent_id: str) -> Agent | None:
        classroom = self._classrooms.get(str(classroom_id))
        return None if classroom is None else classroom.agents.get(agent_id)

    def agents(self) -> Iterator[Agent]:
        for classroom in self._classrooms.values():
            yield from classroom.agents.values()

    def enter(self, classroom_id: UUID, agent: Agent) -> Room:
        """Register the agent, in place of an earlier connection of its own; returns the room to join."""
        key = str(classroom_id)
        classroom = self._classrooms.get(key)
        if classroom is None:
            classroom = self._classrooms[key] = Classroom(classroom_id, key, self._new_room(key))
        classroom.agents[agent.agent_id] = agent
        agent.classroom_id = classroom.classroom_id  # one object for all of them
        return classroom.room

    def leave(self, classroom_id: UUID, agent: Agent) -> None:
        key = str(classroom_id)
        classroom = self._classrooms.get(key)
        if classroom is None or classroom.agents.get(agent.agent_id) is not agent:
            return
        del classroom.agents[agent.agent_id]
        if not classroom.agents:
            del self._classrooms[key]

    # --- events

    def on_message(self, subject: str, data: bytes, headers: Mapping[str, str] | None) -> None:
        """A message on `<prefix>.<classroom_id>.<kind>`. Called by the bus: neither raises nor blocks."""
        received_ns = now_ns()
        classroom = self._classrooms.get(subject.split(".")[-2])
        if classroom is None:
            self._metrics.events_dropped.labels("no_agents").inc()
            return
        exclude = only = message_id = None
        if headers:
            if headers.get(INTERNAL, "").lower() == "true":
                self._metrics.events_dropped.labels("internal").inc()
                return
            exclude = classroom.agents.get(headers.get(SENDER, ""))
            if (receiver := headers.get(RECEIVER)) is not None:
                only = classroom.agents.get(receiver)
                if only is None or only is exclude:
                    self._metrics.events_dropped.labels("no_receiver").inc()
                    return
            message_id = headers.get(MESSAGE_ID)
        if not protocol.is_json(data):
            self._metrics.events_dropped.labels("not_json").inc()
            log.warning("event_not_json", limited=True, subject=subject, size_bytes=len(data))
            return
        event = protocol.encode_event(message_id or next(self._event_ids), subject, data)
        frame = encode_frame(OPCODE_TEXT, event)
        if classroom.room.broadcast(frame, exclude=exclude, only=only, received_ns=received_ns):
            self._metrics.events_in.inc()
        else:
            classroom.missed += 1
            self._metrics.events_dropped.labels("room_queue_full").inc()

    def on_room_drained(self, room: Room) -> None:
        """A room that had to refuse events has room again: its members learn how many they missed."""
        classroom = self._classrooms.get(room.tag)
        if classroom is not None:
            self._tell_gap(classroom, "flood")

    def on_gap(self) -> None:
        """Messages were lost before they came here, nobody knows how many, or in which classrooms."""
        for classroom in self._classrooms.values():
            classroom.lost = True
            self._tell_gap(classroom, "outage")

    def _tell_gap(self, classroom: Classroom, cause: str) -> None:
        if not (classroom.lost or classroom.missed):
            return
        gap = protocol.encode_gap(None if classroom.lost else classroom.missed)
        # A room that refuses this too calls on_room_drained later: nothing is forgotten until then.
        if classroom.room.broadcast(encode_frame(OPCODE_TEXT, gap)):
            classroom.missed, classroom.lost = 0, False
            self._metrics.gaps.labels(cause).inc()
