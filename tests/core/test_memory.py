"""What the core holds and gives back: allocations that fail one after the other, bytes, references, descriptors, sizes."""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client_frames import client_frame

from peers import OPCODE_PING, OPCODE_TEXT, Handler, Peer, masked, new_hub, turn_until
from presence_core.backlog import Backlog
from presence_core.frames import Decoder, encode_close, encode_frame
from presence_core.hub import Connection, Hub, Room

BIG = encode_frame(OPCODE_TEXT, b"b" * 50_000)


class Session(Connection):
    __slots__ = ("__weakref__",)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# --- allocations that fail


class Scene:
    """A hub about to do all it can in one turn, for five connections; the first two sockets are full."""

    def __init__(self) -> None:
        self.handler = Handler()
        self.hub = new_hub(self.handler, ping_interval_ms=8, pong_timeout_ms=4, max_backlog_bytes=200_000)
        self.room = self.hub.new_room()
        self.peers = [Peer(self.hub, connection=Session(), buffers=4096) for _ in range(5)]
        for peer in self.peers:
            peer.connection.join(self.room)
        for peer in self.peers[:2]:
            while peer.connection.backlog_bytes == 0:
                peer.connection.send(BIG)
        for number in range(8):
            self.room.broadcast(encode_frame(OPCODE_TEXT, b"%d" % number), exclude=self.peers[number % 3].connection)
        self.peers[2].send(masked(OPCODE_TEXT, b"m") * 2 + masked(OPCODE_PING, b"p") + masked(OPCODE_TEXT, b"half")[:8])
        self.peers[3].send(masked(OPCODE_TEXT, b"part", fin=False) + b"\xff\xff")
        self.peers[4].send(masked(8, b"\x03\xe8"))
        self.peers[0].connection.set_alarm(0)
        self.peers[1].connection.start_heartbeat()
        self.spare = Session()

    def turn(self) -> None:
        self.hub.run_once(0)

    def broadcast(self) -> None:
        for _ in range(20):
            self.room.broadcast(BIG, only=self.peers[0].connection)

    def send_and_close(self) -> None:
        self.peers[0].connection.send(BIG)
        self.peers[1].connection.close(4000, b"why")
        self.peers[2].connection.close(4001, b"", BIG)

    def adopt(self) -> None:
        self.peers.append(
            Peer(self.hub, masked(OPCODE_TEXT, b"head") * 2 + masked(OPCODE_TEXT)[:3], connection=self.spare)
        )

    def close(self) -> None:
        self.hub.close()

    def rooms(self) -> None:
        other = self.hub.new_room()
        for peer in self.peers:
            if peer.connection.is_open:
                peer.connection.leave()
                peer.connection.join(other)


@pytest.fixture
def frozen() -> Iterator[None]:
    """Whole collections that cost next to nothing: they do not look at what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(
    "step", [Scene.turn, Scene.broadcast, Scene.send_and_close, Scene.adopt, Scene.close, Scene.rooms]
)
def test_an_allocation_that_fails_costs_no_more_than_its_connection(
    step: Callable[[Scene], None], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    testcapi = pytest.importorskip("_testcapi")
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    failed = 0
    for number in range(0, 240, 1 if width == 1 else 4):
        scene = Scene()
        watched = [weakref.ref(peer.connection) for peer in scene.peers]
        testcapi.set_nomemory(number, number + width)
        try:
            step(scene)
        except MemoryError:
            failed += 1
        finally:
            testcapi.remove_mem_hooks()
        for _ in range(4):
            if scene.hub.fileno() >= 0:
                scene.hub.run_once(2)
        check_end(scene)
        del scene
        gc.collect()
        assert [one() for one in watched] == [None] * len(watched)
        if failed and number > 30 and step is not Scene.turn:
            break
    assert failed or step in (Scene.turn, Scene.close)


def check_end(scene: Scene) -> None:
    for peer in scene.peers:
        texts = [int(text) for text in peer.texts() if len(text) == 1]
        assert texts == sorted(texts)  # whatever was lost, the order was not
    scene.handler.calls.clear()
    scene.hub.close()
    assert len(scene.hub) == len(scene.room) == 0
    assert scene.hub.fileno() == -1
    assert scene.hub.stats()["gauges"] == {"connections_open": 0, "connections_closing": 0, "timers": 0}


@pytest.mark.parametrize("number", range(12))
def test_the_decoder_survives_an_allocation_that_fails(number: int) -> None:
    testcapi = pytest.importorskip("_testcapi")
    data = (
        client_frame(OPCODE_TEXT, b"a" * 300, final=False)
        + client_frame(OPCODE_PING, b"p")
        + client_frame(0, b"b" * 900)
    )
    pieces = [data[:1], data[1:100], data[100:400], data[400:]]
    decoder = Decoder()
    testcapi.set_nomemory(number, number + 1)
    try:
        for piece in pieces:
            decoder.feed(piece)
    except MemoryError:
        pass
    finally:
        testcapi.remove_mem_hooks()
    if decoder.finished:
        assert decoder.memory_bytes == 0
        assert decoder.feed(data) == []


def test_a_backlog_that_cannot_grow_is_as_it_was() -> None:
    testcapi = pytest.importorskip("_testcapi")
    backlog = Backlog()
    frame = encode_frame(OPCODE_TEXT, b"x" * 10)
    backlog.push(frame + frame, 3)
    for action in (lambda: backlog.push(frame), backlog.truncate):
        testcapi.set_nomemory(0, 0)
        try:
            action()
            outcome = "done"
        except MemoryError:
            outcome = "no memory"
        finally:
            testcapi.remove_mem_hooks()
        assert outcome == "no memory"
        assert backlog.pending_bytes == 21
        assert backlog.vectors(9) == [(frame + frame)[3:]]


# --- what is given back


def lives(hub: Hub, room: Room, rounds: int) -> None:
    """Whole lives of connections that end in every way, with all that can be under way at the end."""
    for number in range(rounds):
        peer = Peer(hub, masked(OPCODE_TEXT, b"head"), connection=Session(), buffers=4096)
        peer.connection.join(room)
        peer.connection.start_heartbeat()
        peer.connection.set_alarm(60_000)
        peer.send(masked(OPCODE_TEXT, b"first", fin=False) + masked(OPCODE_TEXT, b"x" * 300)[:100])
        for _ in range(5):
            room.broadcast(BIG, exclude=peer.connection if number % 2 else None)
        hub.run_once(0)
        match number % 5:
            case 0:
                peer.close()
            case 1:
                peer.reset()
            case 2:
                peer.connection.close(4000, b"why", BIG)
                peer.close()
            case 3:
                peer.connection.abort()
            case 4:
                peer.send(b"\xff" * 100)
                peer.socket.shutdown(1)
                hub.run_once(0)
                peer.close()
    turn_until(hub, lambda: len(hub) == 0)


def traced_bytes() -> int:
    """What is allocated now, but for the table of the test sockets' finalisers, which grows when it likes."""
    gc.collect()
    not_ours = (weakref.__file__, tracemalloc.__file__)
    return sum(
        trace.size for trace in tracemalloc.take_snapshot().traces if trace.traceback[0].filename not in not_ours
    )


def test_bytes_references_and_descriptors_return_to_what_they_were() -> None:
    handler = Quiet()
    hub = new_hub(handler, max_room_queue_bytes=1 << 20)
    room = hub.new_room()
    lives(hub, room, 20)  # whatever is made once is made now
    gc.collect()
    before_descriptors = descriptors()
    frames = sys.getrefcount(BIG)
    tracemalloc.start()
    try:
        lives(hub, room, 5)
        before = traced_bytes()
        lives(hub, room, 100)
        after = traced_bytes()
    finally:
        tracemalloc.stop()
    assert after - before < 100 * 16  # less than the least that any of a hundred connections could leave
    assert sys.getrefcount(BIG) == frames
    assert descriptors() == before_descriptors
    assert len(room) == room.queued_bytes == 0
    hub.close()


class Quiet(Handler):
    """Keeps nothing."""

    def _record(self, name: str, *arguments: Any) -> None:
        pass


def test_a_hub_gives_its_descriptors_back() -> None:
    before = descriptors()
    for _ in range(20):
        hub = new_hub()
        assert len(descriptors() - before) == 3 + hub.sends_in_bulk
        hub.close()
        hub.close()
        del hub
    hub = new_hub()
    del hub  # nobody closed it
    assert descriptors() == before


@pytest.mark.parametrize(
    "options",
    [
        {"ping_interval_ms": 10, "pong_timeout_ms": 10},
        {"pong_timeout_ms": 0},
        {"close_timeout_ms": 0},
        {"max_message_bytes": -1},
        {"slice_us": -1},
        {"seed": -1},
        {"seed": 1 << 64},
        {"messages_per_s": "many"},
        {"unknown": 1},
    ],
)
def test_options_that_make_no_sense_make_no_hub(options: dict[str, Any]) -> None:
    before = descriptors()
    with pytest.raises((ValueError, OverflowError, TypeError)):
        Hub(Handler(), **options)
    assert descriptors() == before


def test_a_hub_that_was_never_initialised_does_nothing() -> None:
    hub = Hub.__new__(Hub)
    assert hub.fileno() == -1
    assert len(hub) == 0
    assert hub.members() == []
    hub.close()
    with pytest.raises(RuntimeError):
        hub.run_once(0)
    with pytest.raises(ValueError, match="open hub"):
        hub.adopt(Connection(), os.open("/dev/null", os.O_RDONLY))
    initialised = new_hub()
    for _ in range(2):  # closed, it is not new
        with pytest.raises(RuntimeError, match="once"):
            initialised.__init__(Handler())  # type: ignore[misc]
        initialised.close()


# --- sizes


def test_the_size_of_a_connection() -> None:
    # With the collector's header this is the largest that still fits pymalloc's class of 256 bytes.
    assert Connection.__basicsize__ + 16 <= 256


def test_a_connection_shares_what_it_waits_for() -> None:
    hub = new_hub(Quiet(), max_backlog_bytes=1 << 30)
    room = hub.new_room()
    peers = [Peer(hub, buffers=4096) for _ in range(50)]
    for peer in peers:
        peer.connection.join(room)
    turn_until(hub, lambda: hub.stats()["gauges"]["connections_open"] == 50)
    frames = [encode_frame(OPCODE_TEXT, bytes([number]) * 500_000) for number in range(4)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for frame in frames:
            room.broadcast(frame)
            hub.run_once(0)
            hub.run_once(0)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert all(peer.connection.backlog_bytes > 1_000_000 for peer in peers)
    assert grown < 50 * 1000
    hub.close()


def test_an_idle_connection_holds_nothing_but_itself() -> None:
    hub = new_hub(Quiet())
    room = hub.new_room()
    count = 1000
    connections = [Connection() for _ in range(count)]
    pairs = []
    import socket

    pairs = [socket.socketpair() for _ in range(count)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for connection, (_, ours) in zip(connections, pairs, strict=True):
            hub.adopt(connection, os.dup(ours.fileno()))
            connection.start_heartbeat()
            connection.set_alarm(60_000)
            connection.join(room)
        held = (tracemalloc.get_traced_memory()[0] - before) / count
        for theirs, _ in pairs:  # a message and a ping leave nothing behind
            theirs.sendall(masked(OPCODE_TEXT, b"x" * 100) + masked(OPCODE_PING))
        turn_until(hub, lambda: hub.stats()["counters"]["frames_received"] == 2 * count)
        assert (tracemalloc.get_traced_memory()[0] - before) / count < held + 1
    finally:
        tracemalloc.stop()
        hub.close()
        for theirs, ours in pairs:
            theirs.close()
            ours.close()
    assert held <= 2 * 8 * 1.1  # one pointer in the list of everyone and one in the room's, both at most doubled


def test_encoders_hold_no_reference() -> None:
    payload = b"payload" * 10
    count = sys.getrefcount(payload)
    for _ in range(10):
        encode_frame(OPCODE_TEXT, payload)
        encode_frame(OPCODE_TEXT, bytearray(payload))
        encode_close(1000, payload)
    assert sys.getrefcount(payload) == count
