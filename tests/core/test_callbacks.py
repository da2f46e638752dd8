"""Callbacks that do their worst: close, abort, leave, join, adopt, broadcast, turn, close the hub or raise, wherever they come.

What must hold after each: every adopted connection is told closed once, nobody else notices, everything is given back.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
from scene import Scene

from peers import OPCODE_BINARY, OPCODE_CLOSE, OPCODE_PING, OPCODE_TEXT, Handler, Peer, masked, new_hub, turn_until
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub, Room


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
