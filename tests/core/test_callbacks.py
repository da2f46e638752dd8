"""Callbacks that do their worst: close, abort, leave, join, adopt, broadcast, turn, close the hub or raise, wherever they come.

What must hold after each: every adopted connection is told closed once, nobody else notices, everything is given back.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from peers import (
    OPCODE_BINARY,
    OPCODE_CLOSE,
    OPCODE_PING,
    OPCODE_PONG,
    OPCODE_TEXT,
    Handler,
    Peer,
    masked,
    new_hub,
    tcp_pair,
    turn_until,
)
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub, Room

CLOSE_1000 = masked(OPCODE_CLOSE, (1000).to_bytes(2))


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def hub(handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler, close_timeout_ms=100)
    yield hub
    hub.close()


class Scene:
    """A hub with thirty members in a room, of whom each is told of something different in the same turn."""

    TRIGGERS = (
        "on_open",
        "on_message",
        "on_close",
        "on_violation",
        "on_deadline",
        "on_limit",
        "on_closed",
        "on_room_drained",
    )

    def __init__(self) -> None:
        self.handler = Handler()
        self.hub = new_hub(
            self.handler,
            close_timeout_ms=50,
            message_burst=4,
            messages_per_s=0.001,
            max_room_queue_bytes=1000,
            slice_us=1,
        )
        self.room = self.hub.new_room("room")
        self.other_room = self.hub.new_room("other room")
        self.extra: list[Peer] = []
        self.adoptions = self.collections = 0
        self.peers = [Peer(self.hub) for _ in range(30)]
        for peer in self.peers:
            peer.connection.join(self.room)
            peer.connection.start_heartbeat()
        self.handler.calls.clear()

    def provoke(self) -> None:
        """Everything at once; what then comes first is up to the hub."""
        for index, peer in enumerate(self.peers):
            match index % 5:
                case 0:
                    peer.send(
                        masked(OPCODE_TEXT, b"m") * 3 + masked(OPCODE_PING) + masked(OPCODE_TEXT, b"n", fin=False)
                    )
                case 1:
                    peer.send(masked(OPCODE_TEXT, b"m") + CLOSE_1000)
                case 2:
                    peer.send(masked(OPCODE_TEXT, b"m") + b"\xff\xff")
                case 3:
                    peer.connection.set_alarm(0)
                    peer.send(masked(OPCODE_TEXT) * 9)
                case 4:
                    peer.connection.set_alarm(0)
                    if index % 10 == 4:
                        peer.reset()
        while self.room.broadcast(encode_frame(OPCODE_TEXT, b"x" * 100), exclude=self.peers[0].connection):
            pass

    def play(self) -> None:
        self.provoke()
        self.adopt(masked(OPCODE_TEXT, b"head") * 2)
        for _ in range(12):
            try:
                self.hub.run_once(2)
            except RuntimeError:  # the hub was closed
                break

    def adopt(self, head: bytes = b"") -> None:
        try:
            self.extra.append(Peer(self.hub, head))
        except ValueError:  # the hub is closed
            self.extra = self.extra[:]

    def end(self) -> None:
        self.hub.close()
        closed = [connection for connection, _ in self.handler.of("on_closed")]
        # A member told before the scene began is in nobody's list: all that were adopted are told, each once.
        assert len(closed) == len(set(map(id, closed)))
        assert {id(peer.connection) for peer in self.peers + self.extra} == set(map(id, closed))
        assert len(self.hub) == 0
        assert len(self.room) == len(self.other_room) == 0
        assert self.hub.stats()["gauges"] == {"connections_open": 0, "connections_closing": 0, "timers": 0}


def close_others(scene: Scene) -> None:
    for peer in scene.peers:
        peer.connection.close(4000)


def abort_all(scene: Scene) -> None:
    for peer in scene.peers:
        peer.connection.abort()


def leave_all(scene: Scene) -> None:
    for peer in scene.peers:
        peer.connection.leave()


def change_rooms(scene: Scene) -> None:
    for peer in scene.peers:
        if peer.connection.is_open:
            target = scene.other_room if peer.connection.room is scene.room else scene.room
            peer.connection.leave()
            peer.connection.join(target)


def adopt_another(scene: Scene) -> None:
    scene.adoptions += 1  # before it, as on_open comes in the middle of it
    if scene.adoptions < 20:
        scene.adopt(masked(OPCODE_TEXT) + masked(OPCODE_PING))


def broadcast(scene: Scene) -> None:
    scene.room.broadcast(encode_frame(OPCODE_TEXT, b"again"))
    scene.other_room.broadcast(encode_frame(OPCODE_TEXT, b"again"), only=scene.peers[1].connection)


def send_much(scene: Scene) -> None:
    for peer in scene.peers:
        peer.connection.send(encode_frame(OPCODE_BINARY, bytes(100_000)))


def set_timers(scene: Scene) -> None:
    for index, peer in enumerate(scene.peers):
        peer.connection.set_alarm(None if index % 2 else 0)
        peer.connection.start_heartbeat()


def turn(scene: Scene) -> None:
    with pytest.raises(RuntimeError):
        scene.hub.run_once(0)
    with pytest.raises(RuntimeError):
        scene.hub.on_readable()


def close_hub(scene: Scene) -> None:
    scene.hub.close()
    scene.hub.close()


def finish_all(scene: Scene) -> None:
    for peer in scene.peers:
        peer.connection.finish()


def collect(scene: Scene) -> None:
    gc.collect(0 if scene.collections else 2)
    scene.collections += 1


def fail(scene: Scene) -> None:
    raise RuntimeError("a callback failed")


@pytest.mark.parametrize("trigger", Scene.TRIGGERS)
@pytest.mark.parametrize(
    "deed",
    [
        close_others,
        abort_all,
        leave_all,
        change_rooms,
        adopt_another,
        broadcast,
        send_much,
        set_timers,
        turn,
        close_hub,
        finish_all,
        collect,
        fail,
    ],
)
def test_any_deed_in_any_callback(trigger: str, deed: Callable[[Scene], None]) -> None:
    scene = Scene()
    done = []

    def react(*_: Any) -> None:
        done.append(trigger)
        deed(scene)

    scene.handler.react[trigger] = react
    scene.play()
    assert done or trigger == "on_room_drained"
    scene.end()
    errors = {str(error) for _, error in scene.handler.of("on_error")}
    assert errors == ({"a callback failed"} if deed is fail else set())


def test_the_scene_provokes_every_callback() -> None:
    scene = Scene()
    scene.play()
    assert set(Scene.TRIGGERS) - {"on_error"} <= set(scene.handler.names())
    scene.end()


# --- closing the hub


def test_a_hub_that_is_closed_in_a_callback_tells_of_everyone_and_lets_go_at_the_end_of_the_turn(
    hub: Hub, handler: Handler
) -> None:
    peers = [Peer(hub) for _ in range(150)]  # more than the events of one turn
    room = hub.new_room()
    for peer in peers:
        peer.connection.join(room)
        peer.send(masked(OPCODE_TEXT) * 3)
    room.broadcast(encode_frame(OPCODE_TEXT, b"never"), exclude=peers[3].connection)
    states = []

    def close(connection: Connection, *_: Any) -> None:
        hub.close()
        states.append((len(handler.of("on_closed")), hub.fileno() >= 0))

    handler.react["on_message"] = close
    del peer
    turn_until(hub, lambda: handler.of("on_message"))
    assert states == [(0, True)]
    assert hub.fileno() == -1
    assert sorted(id(connection) for connection, code in handler.of("on_closed") if code == 1006) == sorted(
        id(peer.connection) for peer in peers
    )
    assert all(peer.ended() for peer in peers)


def test_a_hub_that_is_closed_adopts_nobody(handler: Handler) -> None:
    hub = new_hub(handler)
    Peer(hub)
    refused = []

    def adopt(*_: Any) -> None:
        theirs, ours = tcp_pair()
        with theirs, pytest.raises(ValueError, match="open hub"):
            hub.adopt(Connection(), ours.detach())
        refused.append(True)

    handler.react["on_closed"] = adopt
    hub.close()
    adopt()
    assert refused == [True, True]


def test_a_hub_that_is_closed_in_on_open(handler: Handler) -> None:
    hub = new_hub(handler)
    handler.react["on_open"] = lambda connection: hub.close()
    peer = Peer(hub, masked(OPCODE_TEXT))
    assert handler.names() == ["on_open", "on_closed"]
    assert hub.fileno() == -1
    assert peer.ended()


def test_events_that_wait_go_with_the_hub(handler: Handler) -> None:
    hub = new_hub(handler, slice_us=1)
    room = hub.new_room()
    peers = [Peer(hub, connection=Tracked()) for _ in range(100)]
    for peer in peers:
        peer.connection.join(room)
    for number in range(20):
        room.broadcast(b"\x81\x01a", exclude=peers[number].connection, only=peers[number + 50].connection)
    hub.run_once(0)
    for number in range(20):
        room.broadcast(b"\x81\x01b", exclude=peers[number].connection)
    hub.close()
    assert room.queued_bytes == 0
    watched = [weakref.ref(peer.connection) for peer in peers]
    handler.calls.clear()
    del peers, peer
    assert [one() for one in watched] == [None] * 100  # without a collection: nothing holds them in a cycle


class Tracked(Connection):
    __slots__ = ("__weakref__",)


# --- a turn inside


def test_a_turn_inside_on_open_is_refused_so_that_the_head_comes_first(hub: Hub, handler: Handler) -> None:
    handler.react["on_open"] = lambda connection: hub.run_once(0)
    handler.react["on_message"] = lambda connection, data, opcode: hub.run_once(0)
    peer = Peer(hub, masked(OPCODE_TEXT, b"head"))
    assert [str(error)[:6] for _, error in handler.of("on_error")] == ["a turn"]
    assert peer.frames(1) == [(OPCODE_CLOSE, (1011).to_bytes(2))]
    assert handler.of("on_message") == []


def test_adoption_inside_a_callback_decodes_its_own_bytes(hub: Hub, handler: Handler) -> None:
    extra: list[Peer] = []

    def adopt(connection: Connection, data: bytes, opcode: int) -> None:
        if data == b"one":
            extra.append(Peer(hub, masked(OPCODE_TEXT, b"theirs") + masked(OPCODE_TEXT, b"half")[:6]))

    handler.react["on_message"] = adopt
    peer = Peer(hub)
    peer.send(masked(OPCODE_TEXT, b"one") + masked(OPCODE_TEXT, b"two") + masked(OPCODE_TEXT, b"three"))
    turn_until(hub, lambda: len(handler.of("on_message")) == 4)
    assert [data for _, data, _ in handler.of("on_message")] == [b"one", b"theirs", b"two", b"three"]
    extra[0].send(masked(OPCODE_TEXT, b"half")[6:])
    turn_until(hub, lambda: len(handler.of("on_message")) == 5)


def test_a_descriptor_number_that_is_used_again_within_a_turn_gets_no_strange_events(
    hub: Hub, handler: Handler
) -> None:
    first, second = Peer(hub), Peer(hub)
    for peer in (first, second):
        peer.send(masked(OPCODE_TEXT, b"old"))
    fresh: list[tuple[socket.socket, Connection]] = []

    def swap(connection: Connection, data: bytes, opcode: int) -> None:
        if not fresh:
            other = second if connection is first.connection else first
            theirs, ours = tcp_pair()
            other.connection.abort()  # its event is queued in this very turn
            fresh.append((theirs, Connection()))
            hub.adopt(fresh[0][1], os.dup(ours.fileno()))
            ours.close()

    handler.react["on_message"] = swap
    turn_until(hub, lambda: fresh)
    hub.run_once(0)
    theirs, connection = fresh[0]
    assert connection.is_open
    assert [data for _, data, _ in handler.of("on_message")] == [b"old"]
    theirs.sendall(masked(OPCODE_TEXT, b"new"))
    turn_until(hub, lambda: len(handler.of("on_message")) == 2)
    assert handler.of("on_message")[1] == (connection, b"new", OPCODE_TEXT)
    theirs.close()


# --- what callbacks raise


class Stop(BaseException):
    """As KeyboardInterrupt, without the risk of ending the test run."""


@pytest.mark.parametrize("trigger", Scene.TRIGGERS[:-1])
def test_what_is_no_exception_is_raised_behind_the_turn_and_loses_nothing(trigger: str) -> None:
    scene = Scene()
    raised = []

    def stop(*_: Any) -> None:
        raised.append(True)
        raise Stop(trigger)

    scene.handler.react[trigger] = stop
    caught = 0
    scene.provoke()
    try:
        scene.adopt(masked(OPCODE_TEXT, b"head"))
    except Stop:
        caught += 1
        assert trigger in ("on_open", "on_message")
        scene.handler.react.pop(trigger)
        assert len(scene.hub) == 31  # it was adopted, and ends as any other
        [late] = [one for one in scene.hub.members() if all(one is not peer.connection for peer in scene.peers)]
        assert late.state == "closing"
        scene.handler.react[trigger] = stop
    for _ in range(20):
        try:
            scene.hub.run_once(2)
        except Stop:
            caught += 1
    assert caught >= 1
    assert raised
    assert scene.handler.of("on_error") == []
    scene.handler.react.clear()
    scene.hub.close()
    closed = [connection for connection, _ in scene.handler.of("on_closed")]
    assert len(closed) == len(set(map(id, closed))) >= 30


def test_the_messages_behind_an_interrupted_one_are_not_lost_for_others(hub: Hub, handler: Handler) -> None:
    peers = [Peer(hub) for _ in range(3)]

    def stop(connection: Connection, data: bytes, opcode: int) -> None:
        if connection is peers[1].connection:
            raise Stop

    handler.react["on_message"] = stop
    for peer in peers:
        peer.send(masked(OPCODE_TEXT, b"1") + masked(OPCODE_TEXT, b"2"))
    with pytest.raises(Stop):
        turn_until(hub, lambda: False)
    turn_until(hub, lambda: len(handler.of("on_message")) == 5)
    assert peers[1].frames(1) == [(OPCODE_CLOSE, (1011).to_bytes(2))]


def test_on_error_that_raises_is_reported_with_what_it_raised(
    hub: Hub, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("on_error" if len(arguments) == 2 else "on_message")

    handler.react["on_message"] = fail
    handler.react["on_error"] = fail
    peer = Peer(hub)
    peer.send(masked(OPCODE_TEXT))
    assert peer.frames(1) == [(OPCODE_CLOSE, (1011).to_bytes(2))]
    assert [str(error) for error in reported] == ["on_error"]


def test_a_drained_room_that_nobody_can_be_told_of_closes_nobody(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = new_hub(handler, max_room_queue_bytes=100)
    room = hub.new_room()
    peer = Peer(hub)
    peer.connection.join(room)

    def fail(room: Room) -> None:
        raise RuntimeError("drained")

    handler.react["on_room_drained"] = fail
    room.broadcast(encode_frame(OPCODE_TEXT, b"x" * 100))
    assert not room.broadcast(encode_frame(OPCODE_TEXT, b"y"))
    turn_until(hub, lambda: handler.of("on_error"))
    assert [(connection, str(error)) for connection, error in handler.of("on_error")] == [(None, "drained")]
    assert peer.connection.is_open
    hub.close()


# --- finalisers: Python code that runs where an object goes, which is wherever the hub lets go of it


class Tag:
    """Runs something when it goes."""

    def __init__(self, last: Callable[[], None]) -> None:
        self.last = last

    def __del__(self) -> None:
        self.last()


@pytest.mark.parametrize("way", ["abort", "close", "leave", "vanish", "deadline", "hub"])
def test_a_room_that_goes_with_its_last_member_may_do_anything(hub: Hub, handler: Handler, way: str) -> None:
    peer, bystander = Peer(hub), Peer(hub)
    other_room = hub.new_room()
    bystander.connection.join(other_room)
    gone = []

    def last() -> None:
        gone.append((peer.connection.state, peer.connection.room))
        peer.connection.abort()
        bystander.connection.close(4000)
        other_room.broadcast(encode_frame(OPCODE_TEXT, b"never"))
        hub.close()

    peer.connection.join(hub.new_room(Tag(last)))
    if way == "vanish":
        peer.reset()
    elif way == "deadline":
        peer.connection.set_alarm(0)
        handler.react["on_deadline"] = lambda connection, deadline: connection.abort()
    elif way == "hub":
        hub.close()
    else:
        getattr(peer.connection, way)()
    if not gone:
        turn_until(hub, lambda: gone)
    hub.close()
    assert len(gone) == 1
    assert gone[0][1] is None  # a room that is going is nobody's room
    assert len(handler.of("on_closed")) == 2


def test_the_finaliser_of_an_excluded_connection_may_broadcast_into_the_room_that_held_it(hub: Hub) -> None:
    room = hub.new_room()
    peer = Peer(hub)
    peer.connection.join(room)

    class Holder(Connection):
        __slots__ = ("tag",)

    sent = []

    def last() -> None:
        for _ in range(50):  # enough for the room's list to move
            sent.append(room.broadcast(encode_frame(OPCODE_TEXT, b"last")))

    for _ in range(3):
        holder = Holder()
        holder.tag = Tag(last)
        room.broadcast(encode_frame(OPCODE_TEXT, b"first"), exclude=holder)
        del holder
    turn_until(hub, lambda: len(peer.texts()) == 153)
    assert peer.texts() == [b"first"] * 3 + [b"last"] * 150
    assert len(sent) == 150


# --- the collector


def test_live_connections_are_no_garbage_and_ended_ones_are(hub: Hub, handler: Handler) -> None:
    class Agent(Connection):
        __slots__ = ("__weakref__", "itself", "peer")

    watched = []
    sockets = []
    room = hub.new_room()
    for _ in range(20):
        agent = Agent()
        agent.itself = [agent]  # a cycle of its own
        peer = Peer(hub, connection=agent)
        agent.peer = peer
        agent.join(room)
        agent.start_heartbeat()
        agent.set_alarm(60_000)
        watched.append(weakref.ref(agent))
        sockets.append(peer.socket)
    del agent, peer
    handler.calls.clear()
    gc.collect()
    assert all(one() is not None for one in watched)
    assert len(room) == 20
    for agent in hub.members():
        assert (agent.is_open, agent.room) == (True, room)
        agent.abort()
    del agent
    turn_until(hub, lambda: len(handler.of("on_closed")) == 20)
    handler.calls.clear()
    gc.collect()
    assert [one() for one in watched] == [None] * 20


def test_a_hub_in_a_cycle_with_its_handler_is_collected_with_its_descriptors() -> None:
    before = set(os.listdir("/proc/self/fd"))

    class Cycle(Handler):
        hub: Hub

    def leave_garbage() -> weakref.ref[Cycle]:
        handler = Cycle()
        handler.hub = new_hub(handler)
        room = handler.hub.new_room(handler)
        peer = Peer(handler.hub)
        peer.connection.join(room)
        room.broadcast(encode_frame(OPCODE_PONG, b""))
        peer.connection.abort()
        handler.hub.run_once(0)
        return weakref.ref(handler)

    watched = leave_garbage()
    gc.collect()
    assert watched() is None
    assert set(os.listdir("/proc/self/fd")) == before
