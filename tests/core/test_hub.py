"""The hub over real sockets: adoption, messages, close handshakes from either side, peers that vanish, limits, errors."""

from __future__ import annotations

import gc
import os
import socket
import weakref
from collections.abc import Iterator

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
from presence_core.hub import Connection, Hub


@pytest.fixture
def hub(handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler)
    yield hub
    hub.close()


def close_frame(code: int) -> bytes:
    return masked(OPCODE_CLOSE, code.to_bytes(2))


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# --- adoption and messages


def test_a_message_reaches_the_handler_and_its_answer_the_peer(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.send(masked(OPCODE_TEXT, b"hello"))
    turn_until(hub, lambda: handler.of("on_message"))
    assert handler.of("on_message") == [(peer.connection, b"hello", OPCODE_TEXT)]
    assert peer.connection.send(encode_frame(OPCODE_BINARY, b"back"))
    assert peer.frames(1) == [(OPCODE_BINARY, b"back")]


def test_on_open_comes_before_the_bytes_behind_the_upgrade_request(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub, masked(OPCODE_TEXT, b"first") + masked(OPCODE_TEXT, b"second")[:5])
    assert handler.names() == ["on_open", "on_message"]
    peer.send(masked(OPCODE_TEXT, b"second")[5:])
    turn_until(hub, lambda: len(handler.of("on_message")) == 2)
    assert [data for _, data, _ in handler.of("on_message")] == [b"first", b"second"]


def test_byte_by_byte_is_the_same_as_at_once(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    stream = masked(OPCODE_TEXT, b"frag", fin=False) + masked(OPCODE_PING, b"?") + masked(0, b"ment" * 50)
    for index in range(len(stream)):
        peer.send(stream[index : index + 1])
        hub.run_once(1000)
    assert handler.of("on_message") == [(peer.connection, b"frag" + b"ment" * 50, OPCODE_TEXT)]
    assert peer.frames(1) == [(OPCODE_PONG, b"?")]


def test_many_messages_in_one_packet_keep_their_order(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.send(b"".join(masked(OPCODE_TEXT, b"%d" % number) for number in range(500)))
    turn_until(hub, lambda: len(handler.of("on_message")) == 500)
    assert [int(data) for _, data, _ in handler.of("on_message")] == list(range(500))


def test_a_connection_is_adopted_once(hub: Hub) -> None:
    peer = Peer(hub)
    before = open_descriptors()
    theirs, ours = tcp_pair()
    with pytest.raises(ValueError, match="once"):
        hub.adopt(peer.connection, ours.detach())
    theirs.close()
    assert open_descriptors() == before  # the refused descriptor was the hub's to close


def test_a_descriptor_that_cannot_be_watched_is_refused(hub: Hub, tmp_path: os.PathLike[str]) -> None:
    with open(os.path.join(tmp_path, "file"), "wb") as file, pytest.raises(PermissionError):  # epoll takes no files
        hub.adopt(Connection(), os.dup(file.fileno()))
    assert len(hub) == 0


def test_nothing_can_be_sent_before_adoption_or_after_the_end(hub: Hub) -> None:
    connection = Connection()
    assert not connection.send(b"\x81\x00")
    assert not connection.close()
    connection.abort()
    connection.finish()
    connection.leave()
    peer = Peer(hub, connection=connection)
    connection.abort()
    assert connection.state == "closed"
    assert not connection.send(b"\x81\x00")
    with pytest.raises(ValueError, match="open connection"):
        connection.join(hub.new_room())
    peer.close()


# --- the end, from either side


def test_peer_closes_and_the_handler_decides_when_to_answer(hub: Hub, handler: Handler) -> None:
    handler.react["on_close"] = lambda connection, code: None
    peer = Peer(hub)
    peer.send(close_frame(3001) + masked(OPCODE_TEXT, b"too late"))
    turn_until(hub, lambda: handler.of("on_close"))
    assert peer.connection.state == "close_received"
    assert handler.of("on_message") == []
    hub.run_once(0)
    peer.read()
    assert peer.received == b""
    peer.connection.finish()
    assert peer.frames(1) == [(OPCODE_CLOSE, (3001).to_bytes(2))]
    turn_until(hub, lambda: handler.of("on_closed"))
    assert peer.ended()
    assert handler.of("on_closed") == [(peer.connection, 3001)]


def test_an_empty_close_is_answered_by_an_empty_close(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.send(masked(OPCODE_CLOSE))
    assert peer.frames(1) == [(OPCODE_CLOSE, b"")]
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.calls[-2:] == [("on_close", peer.connection, 1005), ("on_closed", peer.connection, 1005)]


def test_a_half_closed_peer_does_not_keep_the_loop_awake(hub: Hub, handler: Handler) -> None:
    handler.react["on_close"] = lambda connection, code: None
    peer = Peer(hub)
    peer.send(close_frame(1000))
    peer.socket.shutdown(socket.SHUT_WR)
    turn_until(hub, lambda: handler.of("on_close"))
    import select

    hub.run_once(0)
    assert select.select([hub.fileno()], [], [], 0.05)[0] == []  # readable again only for the close deadline


def test_an_answer_that_never_comes_from_the_handler_ends_at_the_close_deadline(handler: Handler) -> None:
    handler.react["on_close"] = lambda connection, code: None
    hub = new_hub(handler, close_timeout_ms=30)
    peer = Peer(hub)
    peer.send(close_frame(1000))
    turn_until(hub, lambda: handler.of("on_closed"))
    assert peer.ended()
    hub.close()


def test_our_close_waits_for_the_peers_answer(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    assert peer.connection.close(4505, b"why", encode_frame(OPCODE_TEXT, b"last words"))
    assert not peer.connection.close(4505)
    frames = peer.frames(2)
    assert frames == [(OPCODE_TEXT, b"last words"), (OPCODE_CLOSE, (4505).to_bytes(2) + b"why")]
    peer.send(masked(OPCODE_TEXT, b"not heard") + close_frame(4505))
    turn_until(hub, peer.ended)
    assert handler.names() == ["on_open", "on_closed"]
    assert handler.of("on_closed") == [(peer.connection, 4505)]


def test_a_peer_that_does_not_answer_our_close_is_dropped_at_the_deadline(handler: Handler) -> None:
    hub = new_hub(handler, close_timeout_ms=30)
    peer = Peer(hub)
    peer.connection.close(1001)
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, 1001)]
    hub.close()


@pytest.mark.parametrize("way", ["close", "reset"])
def test_a_peer_that_vanishes_is_lost(hub: Hub, handler: Handler, way: str) -> None:
    peer = Peer(hub)
    getattr(peer, way)()
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, 1006)]
    assert len(hub) == 0


def test_writing_to_a_socket_that_was_reset_ends_it_without_a_signal(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.reset()
    while peer.connection.send(encode_frame(OPCODE_TEXT, b"x" * 1000)):
        pass
    turn_until(hub, lambda: handler.of("on_closed"))


def test_both_sides_close_at_once(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.send(close_frame(1000))
    peer.connection.close(1001)
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.names() == ["on_open", "on_closed"]


def test_abort_inside_a_callback_ends_the_packet_there(hub: Hub, handler: Handler) -> None:
    handler.react["on_message"] = lambda connection, data, opcode: connection.abort()
    peer = Peer(hub)
    peer.send(masked(OPCODE_TEXT, b"1") + masked(OPCODE_TEXT, b"2", fin=False) + masked(OPCODE_TEXT, b"3"))
    turn_until(hub, lambda: handler.of("on_closed"))
    assert len(handler.of("on_message")) == 1


# --- violations, limits, errors


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x01x", 1002),  # not masked
        (b"\xc1\x80" + b"\0" * 4, 1002),  # a reserved bit
        (masked(0x3), 1002),  # a reserved opcode
        (masked(OPCODE_PING, b"x" * 126), 1002),
        (masked(OPCODE_TEXT, b"\xff"), 1007),
        (masked(OPCODE_TEXT, b"x" * 70_000), 1009),
    ],
)
def test_a_violation_gets_the_rfcs_code(hub: Hub, handler: Handler, data: bytes, code: int) -> None:
    peer = Peer(hub)
    peer.send(masked(OPCODE_TEXT, b"fine") + data)
    assert peer.frames(1) == [(OPCODE_CLOSE, code.to_bytes(2))]
    assert handler.of("on_violation") == [(peer.connection, code)]
    assert len(handler.of("on_message")) == 1
    peer.send(b"more garbage that nobody decodes" + close_frame(1000))
    turn_until(hub, peer.ended)  # the end of the stream, not a reset, which would take the close frame with it
    assert peer.connection.state == "closing"
    peer.close()
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, code)]
    assert len(handler.of("on_violation")) == 1


@pytest.mark.parametrize(
    ("frame", "limit"),
    [
        (masked(OPCODE_TEXT, b"{}"), "messages"),
        (masked(OPCODE_PING), "pings"),
        (masked(OPCODE_PONG, b"unasked"), "pings"),
    ],
)
def test_floods_empty_the_bucket(handler: Handler, frame: bytes, limit: str) -> None:
    hub = new_hub(handler, messages_per_s=1.0, message_burst=5, pings_per_s=1.0, ping_burst=5)
    peer = Peer(hub)
    peer.send(frame * 5)
    hub.run_once(1000)
    assert handler.of("on_limit") == []
    peer.send(frame * 3)
    turn_until(hub, lambda: handler.of("on_limit"))
    assert handler.of("on_limit") == [(peer.connection, limit)]
    assert peer.connection.state == "closing"  # the handler did nothing: the hub does not go on with it
    hub.close()


def test_the_bucket_fills_again(handler: Handler) -> None:
    hub = new_hub(handler, messages_per_s=100.0, message_burst=1)
    peer = Peer(hub)
    peer.connection.set_alarm(40)
    peer.send(masked(OPCODE_TEXT))
    turn_until(hub, lambda: handler.of("on_deadline"))
    peer.send(masked(OPCODE_TEXT))
    turn_until(hub, lambda: len(handler.of("on_message")) == 2)
    assert handler.of("on_limit") == []
    hub.close()


@pytest.mark.parametrize(
    "callback", ["on_open", "on_message", "on_close", "on_violation", "on_closed", "on_deadline", "on_limit"]
)
def test_a_callback_that_raises_ends_that_connection_only(handler: Handler, callback: str) -> None:
    hub = new_hub(handler, pings_per_s=0.001, ping_burst=1, close_timeout_ms=50)
    other = Peer(hub)

    def fail(connection: Connection, *_: object) -> None:
        if connection is not other.connection:
            raise RuntimeError(callback)

    handler.react[callback] = fail
    peer = Peer(hub)
    peer.connection.set_alarm(0)
    for data in (masked(OPCODE_TEXT), masked(OPCODE_PING) * 3, close_frame(1000)):
        if peer.connection.is_open and not (callback == "on_close" and data[0] == masked(OPCODE_PING)[0]):
            peer.send(data)
            hub.run_once(20)
            hub.run_once(20)
    if callback == "on_violation":
        peer = Peer(hub)
        peer.send(b"\x81\x00")
    turn_until(hub, lambda: any(call[0] is peer.connection for call in handler.of("on_closed")))
    assert [str(error) for _, error in handler.of("on_error")] == [callback]
    assert other.connection.is_open
    hub.close()


# --- ownership


def test_everything_is_given_back(handler: Handler) -> None:
    gc.collect()
    before = open_descriptors()
    hub = new_hub(handler)
    room = hub.new_room("tag")
    gone = []
    for number in range(50):
        connection = type("Session", (Connection,), {"__slots__": ("__weakref__",)})()
        gone.append(weakref.ref(connection))
        peer = Peer(hub, connection=connection)
        connection.join(room)
        connection.start_heartbeat()
        connection.set_alarm(100_000)
        peer.send(masked(OPCODE_TEXT, b"partial" * 100)[: 10 + number])
        hub.run_once(10)
        room.broadcast(encode_frame(OPCODE_TEXT, b"x"), exclude=connection if number % 2 else None)
        peer.close()
        del connection, peer
    turn_until(hub, lambda: len(hub) == 0)
    assert len(room) == 0
    assert hub.stats()["gauges"] == {"connections_open": 0, "connections_closing": 0, "timers": 0}
    handler.calls.clear()
    room.broadcast(encode_frame(OPCODE_TEXT, b"to nobody"))
    hub.run_once(0)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 50
    hub.close()
    hub.close()
    assert open_descriptors() == before


def test_closing_the_hub_tells_of_every_connection(handler: Handler) -> None:
    hub = new_hub(handler)
    peers = [Peer(hub) for _ in range(10)]
    hub.close()
    assert len(handler.of("on_closed")) == 10
    assert all(peer.ended() for peer in peers)
    with pytest.raises(RuntimeError):
        hub.run_once(0)


def test_a_turn_inside_a_turn_is_refused(hub: Hub, handler: Handler) -> None:
    handler.react["on_message"] = lambda *_: hub.run_once(0)
    peer = Peer(hub)
    peer.send(masked(OPCODE_TEXT))
    turn_until(hub, lambda: handler.of("on_error"))
    assert isinstance(handler.of("on_error")[0][1], RuntimeError)
    assert peer.frames(1) == [(OPCODE_CLOSE, (1011).to_bytes(2))]
