"""Fan-out: a NATS message becomes one frame, once, and goes to the room of its classroom in the hub.

Owns the classrooms that have agents on this replica, who is in them, and the events held for those who are about to be.
Knows nothing of sessions' rows, subscriptions or sockets.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
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

MAX_HELD_BYTES: Final = 262_144  # of events for one agent that is about to come in
POLL_S: Final = 0.002


class Held:
    """The events for an agent that is about to come in: it gets them right behind its success."""

    __slots__ = ("frames", "lost", "missed", "size_bytes")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.size_bytes = 0
        self.missed = 0  # events past the bound
        self.lost = False  # others may be missing, nobody knows how many

    def add(self, frame: bytes) -> None:
        if self.missed or self.size_bytes + len(frame) > MAX_HELD_BYTES:
            self.missed += 1
            return
        self.frames.append(frame)
        self.size_bytes += len(frame)


class Classroom:
    """The agents of one classroom on this replica, and their room in the hub."""

    __slots__ = ("agents", "classroom_id", "held", "key", "lost", "missed", "room")

    def __init__(self, classroom_id: UUID, key: str, room: Room) -> None:
        self.classroom_id = classroom_id
        self.key = key
        self.room = room
        self.agents: dict[str, Agent] = {}
        self.held: dict[Agent, Held] = {}
        # Since the members were last told of a gap:
        self.missed = 0  # events refused here
        self.lost = False  # events lost before they came here, nobody knows how many

    @property
    def owes_gap(self) -> bool:
        return self.lost or self.missed > 0


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
        classroom.held.pop(agent, None)
        del classroom.agents[agent.agent_id]
        if not classroom.agents:
            del self._classrooms[key]

    # --- an agent that comes from another replica: what it may not have heard there, it hears here

    def hold(self, classroom_id: UUID, agent: Agent) -> None:
        """From now on keep the events for this agent, which has entered but is not in the room yet."""
        self._classrooms[str(classroom_id)].held[agent] = Held()

    def take_held(self, classroom_id: UUID, agent: Agent, *, is_whole: bool) -> bytes:
        """What was kept for it, as frames in order, and a gap if that, or what was before it, is not whole."""
        held = self._classrooms[str(classroom_id)].held.pop(agent)
        if held.missed or held.lost or not is_whole:
            held.frames.append(self._gap_of_hand_over(held.missed if is_whole and not held.lost else None))
        return b"".join(held.frames)

    def nothing_held(self) -> bytes:
        """What an agent hears, as a frame, whose old replica could not be asked what it has sent."""
        self._metrics.hand_overs.labels("unproven").inc()
        return self._gap_of_hand_over(None)

    def _gap_of_hand_over(self, missed: int | None) -> bytes:
        self._metrics.gaps.labels("hand_over").inc()
        return encode_frame(OPCODE_TEXT, protocol.encode_gap(missed))

    async def served(self, classroom_ids: Iterable[UUID]) -> None:
        """Return when the agents of these classrooms have been sent all that has come for them by now, or that it is missing."""
        found = [self._classrooms.get(str(classroom_id)) for classroom_id in set(classroom_ids)]
        classrooms = [(classroom, classroom.room.events_taken) for classroom in found if classroom is not None]
        # Mostly true at once; a callback would cost something at every event.
        for classroom, taken in classrooms:
            room, last = classroom.room, taken
            while classroom.owes_gap and len(room):
                await asyncio.sleep(POLL_S)
                last = room.events_taken  # the gap is an event of the room too
            while room.events_served < last:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

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
        for agent, held in classroom.held.items():
            if agent is not exclude and only in (None, agent):
                held.add(frame)
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
            for held in classroom.held.values():
                held.lost = True
            self._tell_gap(classroom, "outage")

    def _tell_gap(self, classroom: Classroom, cause: str) -> None:
        if not classroom.owes_gap:
            return
        gap = protocol.encode_gap(None if classroom.lost else classroom.missed)
        # A room that refuses this too calls on_room_drained later: nothing is forgotten until then.
        if classroom.room.broadcast(encode_frame(OPCODE_TEXT, gap)):
            classroom.missed, classroom.lost = 0, False
            self._metrics.gaps.labels(cause).inc()
