"""Rooms against a plain model: random comings and goings, events for all or for some, full sockets; who heard what, in order."""

from __future__ import annotations

import select
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers import OPCODE_CLOSE, OPCODE_TEXT, Handler, Peer, new_hub
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Room

ROOMS = 3
MAX_BACKLOG_BYTES = 60_000
picks = st.integers(0, 1 << 16)


@dataclass
class Stay:
    """One time in one room: the events that were meant for this member, in order."""

    room: int
    events: list[int] = field(default_factory=list)
    over: bool = False


class Member:
    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.stays: list[Stay] = []
        self.close_code: int | None = None

    @property
    def stay(self) -> Stay | None:
        return self.stays[-1] if self.stays and not self.stays[-1].over else None

    def end_stay(self) -> None:
        if self.stays:
            self.stays[-1].over = True

    def heard(self) -> list[int]:
        return [int(payload) for payload in self.peer.texts()]


class RoomsAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.handler = Handler()
        self.handler.react["on_limit"] = lambda connection, limit: connection.close(4002)
        self.members: list[Member] = []
        self.number = 0

    @initialize(slice_us=st.sampled_from([1, 1000]))
    def begin(self, slice_us: int) -> None:
        self.hub = new_hub(
            self.handler, slice_us=slice_us, max_backlog_bytes=MAX_BACKLOG_BYTES, max_room_queue_bytes=150_000
        )
        self.rooms: list[Room] = [self.hub.new_room(number) for number in range(ROOMS)]

    def pick(self, number: int) -> Member:
        return self.members[number % len(self.members)]

    @property
    def open_members(self) -> list[Member]:
        return [member for member in self.members if member.peer.connection.is_open]

    # --- what may happen

    @rule(room=st.integers(0, ROOMS), small=st.booleans(), crowd=st.sampled_from([1, 1, 1, 70]))
    def connect(self, room: int, small: bool, crowd: int) -> None:
        if len(self.members) > 150:
            return
        for _ in range(crowd):
            member = Member(Peer(self.hub, buffers=4096 if small else 0))
            self.members.append(member)
            if room < ROOMS:
                member.peer.connection.join(self.rooms[room])
                member.stays.append(Stay(room))

    @precondition(lambda self: self.members)
    @rule(pick=picks, room=st.integers(0, ROOMS - 1))
    def move(self, pick: int, room: int) -> None:
        member = self.pick(pick)
        member.peer.connection.leave()
        member.end_stay()
        if member.peer.connection.is_open:
            member.peer.connection.join(self.rooms[room])
            member.stays.append(Stay(room))

    @precondition(lambda self: self.members)
    @rule(pick=picks)
    def leave(self, pick: int) -> None:
        member = self.pick(pick)
        member.peer.connection.leave()
        member.end_stay()

    @rule(
        room=st.integers(0, ROOMS - 1),
        size=st.sampled_from([0, 0, 100, 5_000, 40_000]),
        count=st.sampled_from([1, 1, 2, 9]),
        exclude=st.one_of(st.none(), picks),
        only=st.one_of(st.none(), st.none(), picks),
    )
    def broadcast(self, room: int, size: int, count: int, exclude: int | None, only: int | None) -> None:
        excluded = self.pick(exclude).peer.connection if exclude is not None and self.members else None
        alone = self.pick(only).peer.connection if only is not None and self.members else None
        for _ in range(count):
            self.number += 1
            frame = encode_frame(OPCODE_TEXT, b"%d" % self.number + b" " * size)
            if not self.rooms[room].broadcast(frame, exclude=excluded, only=alone):
                return
            for member in self.members:
                stay = member.stay
                if stay is None or stay.room != room or not member.peer.connection.is_open:
                    continue
                if member.peer.connection is not excluded and alone in (None, member.peer.connection):
                    stay.events.append(self.number)

    @rule(turns=st.integers(1, 5))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.hub.run_once(0)

    @precondition(lambda self: self.members)
    @rule(pick=picks)
    def read(self, pick: int) -> None:
        self.pick(pick).peer.take()

    @precondition(lambda self: self.members)
    @rule(pick=picks)
    def close(self, pick: int) -> None:
        member = self.pick(pick)
        if member.peer.connection.close(4000):
            member.close_code = 4000

    @precondition(lambda self: self.members)
    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        self.pick(pick).peer.connection.abort()

    @rule()
    def settle(self) -> None:
        """Everyone reads and the hub turns until nothing is left; then everyone has heard what was meant for them."""
        while True:
            for member in self.members:
                member.peer.read()
            if not select.select([self.hub.fileno()], [], [], 0)[0] and not self.waiting():
                break
            self.hub.run_once(0)
        for member in self.members:
            if member.peer.connection.is_open:
                assert member.peer.connection.backlog_bytes == 0
                self.check(member, settled=True)

    def waiting(self) -> bool:
        """Written, but neither read yet nor on its way to the hub as an event."""
        return any(member.peer.connection.backlog_bytes for member in self.members)

    # --- what must hold

    def check(self, member: Member, settled: bool) -> None:
        heard = member.heard()
        at = 0
        for stay in member.stays:
            took = 0
            while took < len(stay.events) and at < len(heard) and heard[at] == stay.events[took]:
                at += 1
                took += 1
            # Whoever leaves, or is closed, may miss what had not been served, but only from some event on.
            if settled and not stay.over:
                assert took == len(stay.events), (heard, stay)
        assert at == len(heard), (heard, member.stays)  # nothing else, nothing twice, nothing out of order

    @invariant()
    def everyone_heard_a_part_in_order(self) -> None:
        for member in self.members[-3:]:
            if member.peer.connection.backlog_bytes == 0:
                self.check(member, settled=False)

    @invariant()
    def rooms_hold_whom_they_should(self) -> None:
        if not hasattr(self, "rooms"):
            return
        for number, room in enumerate(self.rooms):
            there = [
                member
                for member in self.members
                if member.peer.connection.is_open and member.stay and member.stay.room == number
            ]
            assert len(room) == len(there)
            assert all(member.peer.connection.room is room for member in there)

    def teardown(self) -> None:
        if not hasattr(self, "hub"):
            return
        self.settle()
        for member in self.members:
            self.check(member, settled=False)
            closes = [payload for opcode, payload in member.peer.take() if opcode == OPCODE_CLOSE]
            assert closes in ([], [(4000).to_bytes(2)], [(4002).to_bytes(2)])
            if closes:
                assert member.peer.take()[-1][0] == OPCODE_CLOSE  # nothing comes behind it
        self.hub.close()
        closed: list[Connection] = [connection for connection, _ in self.handler.of("on_closed")]
        assert sorted(map(id, closed)) == sorted(id(member.peer.connection) for member in self.members)
        for member in self.members:
            member.peer.close()


TestRooms = RoomsAgainstModel.TestCase
TestRooms.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
