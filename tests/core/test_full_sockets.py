"""Sockets that take no more: what waits, its bound, slow consumers, and every way to end while something waits."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator

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

BOUND = 100_000
CLOSE_3000 = masked(OPCODE_CLOSE, (3000).to_bytes(2))


@pytest.fixture
def hub(handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler, max_backlog_bytes=BOUND, close_timeout_ms=10_000)
    yield hub
    hub.close()


def text(number: int, size: int = 0) -> bytes:
    return encode_frame(OPCODE_TEXT, b"%d" % number + b" " * size)


def numbers(peer: Peer) -> list[int]:
    return [int(payload) for payload in peer.texts()]


def fill(peer: Peer, size: int = 3000) -> int:
    """Send numbered texts until so much waits that the kernel does not take it by and by; how many."""
    number = 0
    while peer.connection.backlog_bytes < BOUND / 5:
        assert peer.connection.send(text(number, size))
        number += 1
    return number


def test_what_waits_goes_out_in_order_as_the_peer_reads(hub: Hub) -> None:
    peer = Peer(hub, buffers=4096)
    first = fill(peer)
    count = first
    while peer.connection.backlog_bytes + 3100 < BOUND:
        assert peer.connection.send(text(count, 3000))
        count += 1
    hub.run_once(0)
    assert peer.connection.backlog_bytes > BOUND / 2
    assert select.select([hub.fileno()], [], [], 0)[0] == []  # a full socket wakes nobody
    turn_until(hub, lambda: len(numbers(peer)) == count)
    assert numbers(peer) == list(range(count))
    assert peer.connection.backlog_bytes == 0
    turn_until(hub, lambda: not select.select([hub.fileno()], [], [], 0)[0])  # nor does one with nothing to write


def test_many_small_pieces_wait_too(hub: Hub) -> None:
    peer = Peer(hub, buffers=4096)
    count = fill(peer, 1)
    for number in range(count, count + 1000):  # more than one sendmsg takes
        assert peer.connection.send(text(number))
    turn_until(hub, lambda: len(numbers(peer)) == count + 1000)
    assert numbers(peer) == list(range(count + 1000))


def test_nothing_is_something_that_can_be_sent(hub: Hub) -> None:
    peer = Peer(hub, buffers=4096)
    assert peer.connection.send(b"")
    count = fill(peer)
    assert peer.connection.send(b"")
    turn_until(hub, lambda: len(numbers(peer)) == count)
    turn_until(hub, lambda: peer.connection.backlog_bytes == 0)
    assert peer.connection.is_open


def test_one_item_may_pass_the_bound_when_nothing_waits(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub, buffers=4096)
    large = encode_frame(OPCODE_BINARY, bytes(5 * BOUND))
    assert peer.connection.send(large)
    assert peer.connection.backlog_bytes > 4 * BOUND
    assert peer.frames(1) == [(OPCODE_BINARY, bytes(5 * BOUND))]
    assert handler.of("on_limit") == []
    assert peer.connection.send(large)
    assert not peer.connection.send(text(1))  # the next one may not


@pytest.mark.parametrize("handled", [True, False])
def test_a_slow_consumer_is_told_once_loses_what_waits_and_gets_whole_frames(
    hub: Hub, handler: Handler, handled: bool
) -> None:
    last_words = encode_frame(OPCODE_TEXT, b"-1")
    if handled:
        handler.react["on_limit"] = lambda connection, limit: connection.close(4002, b"slow", last_words)
    peer, healthy = Peer(hub, buffers=4096), Peer(hub)
    room = hub.new_room()
    for one in (peer, healthy):
        one.connection.join(room)
    count = 0
    while not handler.of("on_limit"):
        assert room.broadcast(text(count, 3000))
        count += 1
        hub.run_once(0)
    assert handler.of("on_limit") == [(peer.connection, "backlog")]
    assert hub.stats()["counters"]["backlogs_refused"] == 1
    assert peer.connection.state == "closing"
    assert peer.connection.backlog_bytes < 3000 + 100  # the frame that was begun, and ours
    assert len(room) == 1
    for number in range(count, count + 10):
        room.broadcast(text(number, 3000))
    turn_until(hub, lambda: len(numbers(healthy)) == count + 10)
    assert numbers(healthy) == list(range(count + 10))
    turn_until(hub, lambda: peer.take()[-1:] and peer.take()[-1][0] == OPCODE_CLOSE)
    assert peer.take()[-1][1][:2] == (4002 if handled else 1008).to_bytes(2)
    heard = numbers(peer)
    if handled:
        assert heard.pop() == -1
    assert heard == list(range(len(heard)))
    assert len(heard) < count
    assert peer.received == b""


def test_past_its_bound_a_connection_takes_nothing_until_it_is_closed(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub, buffers=4096)
    fill(peer)
    sent = True
    while sent:
        sent = peer.connection.send(text(1, 3000))
    assert peer.connection.is_open  # the handler is told with the next turn
    waiting = peer.connection.backlog_bytes
    assert waiting < 3100
    assert not peer.connection.send(text(2))
    assert peer.connection.backlog_bytes == waiting
    assert handler.of("on_limit") == []
    assert peer.connection.close(4000)  # before it: then there is nothing to tell
    hub.run_once(0)
    assert handler.of("on_limit") == []
    assert peer.connection.backlog_bytes == waiting + 4


def test_a_peer_that_pings_and_does_not_read_is_a_slow_consumer(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub, buffers=4096)
    fill(peer)
    while not handler.of("on_limit"):
        peer.send(masked(OPCODE_PING, b"x" * 125) * 10)
        hub.run_once(0)
    assert handler.of("on_limit") == [(peer.connection, "backlog")]


def test_pongs_wait_their_turn(hub: Hub) -> None:
    peer = Peer(hub, buffers=4096)
    count = fill(peer)
    peer.send(masked(OPCODE_PING, b"p"))
    turn_until(hub, lambda: len(peer.take()) == count + 1)
    assert peer.take()[-1] == (OPCODE_PONG, b"p")


# --- every end while something waits


def test_our_close_frame_comes_behind_what_waits(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub, buffers=4096)
    count = fill(peer)
    assert peer.connection.close(4001, b"", text(count))
    assert peer.connection.backlog_bytes
    turn_until(hub, lambda: len(peer.take()) == count + 2)
    assert numbers(peer) == list(range(count + 1))
    assert peer.take()[-1] == (OPCODE_CLOSE, (4001).to_bytes(2))
    peer.send(masked(OPCODE_CLOSE, (4001).to_bytes(2)))
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, 4001)]


def test_the_answer_to_the_peers_close_comes_behind_what_waits(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub, buffers=4096)
    count = fill(peer)
    peer.send(CLOSE_3000)
    peer.socket.shutdown(socket.SHUT_WR)  # all is said on that side
    turn_until(hub, lambda: handler.of("on_close"))
    assert peer.connection.state == "finishing"
    hub.run_once(0)
    assert select.select([hub.fileno()], [], [], 0)[0] == []  # the half-closed socket does not keep the loop awake
    turn_until(hub, lambda: len(peer.take()) == count + 1)
    assert peer.take()[-1] == (OPCODE_CLOSE, (3000).to_bytes(2))
    turn_until(hub, peer.ended)
    assert handler.of("on_closed") == [(peer.connection, 3000)]


def test_the_last_words_of_a_violation_come_behind_what_waits(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub, buffers=4096)
    count = fill(peer)
    peer.send(b"\xff")
    turn_until(hub, lambda: handler.of("on_violation"))
    peer.send(b"more" * 1000)
    turn_until(hub, lambda: len(peer.take()) == count + 1)
    assert peer.take()[-1] == (OPCODE_CLOSE, (1002).to_bytes(2))
    turn_until(hub, peer.ended)
    peer.close()
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, 1002)]


def test_a_violation_does_not_reset_the_connection(hub: Hub, handler: Handler) -> None:
    """A reset would throw away the close frame before the peer has read it."""
    peer = Peer(hub)
    for _ in range(50):
        peer.send(b"\xff" * 10_000)
        hub.run_once(0)
    assert peer.connection.state == "closing"
    peer.socket.setblocking(True)
    peer.socket.shutdown(socket.SHUT_WR)
    turn_until(hub, lambda: handler.of("on_closed"))
    assert peer.socket.recv(100) == b"\x88\x02" + (1002).to_bytes(2)
    assert peer.socket.recv(100) == b""


def in_state(state: str, hub: Hub, handler: Handler, peer: Peer) -> None:
    fill(peer)
    if state == "closing":
        peer.connection.close(4000)
    elif state in ("close_received", "finishing"):
        handler.react["on_close"] = lambda connection, code: None
        peer.send(CLOSE_3000)
        turn_until(hub, lambda: handler.of("on_close"))
        if state == "finishing":
            peer.connection.finish()
    elif state == "failing":
        peer.send(b"\xff")
        turn_until(hub, lambda: handler.of("on_violation"))
    assert peer.connection.state == state.replace("failing", "closing")
    assert peer.connection.backlog_bytes


STATES = {"open": 1006, "closing": 4000, "close_received": 3000, "finishing": 3000, "failing": 1002}


def reset(peer: Peer) -> None:
    peer.reset()


def vanish(peer: Peer) -> None:
    peer.close()  # with bytes unread: the kernel resets


def half_close_then_reset(peer: Peer) -> None:
    peer.socket.shutdown(socket.SHUT_WR)
    peer.hub.run_once(0)
    peer.reset()


@pytest.mark.parametrize(("state", "code"), STATES.items())
@pytest.mark.parametrize("way", [reset, vanish, half_close_then_reset])
def test_a_peer_that_goes_while_something_waits(
    hub: Hub, handler: Handler, state: str, code: int, way: Callable[[Peer], None]
) -> None:
    peer = Peer(hub, buffers=4096)
    in_state(state, hub, handler, peer)
    way(peer)
    turn_until(hub, lambda: handler.of("on_closed"), 1)  # at once, not at the close deadline
    assert handler.of("on_closed") == [(peer.connection, code)]
    peer.connection.finish()
    assert peer.connection.state == "closed"
    hub.run_once(0)
    assert select.select([hub.fileno()], [], [], 0)[0] == []


@pytest.mark.parametrize(("state", "code"), [item for item in STATES.items() if item[0] != "open"])
def test_the_close_handshake_has_an_end_in_every_state(handler: Handler, state: str, code: int) -> None:
    hub = new_hub(handler, close_timeout_ms=40)
    peer = Peer(hub, buffers=4096)
    in_state(state, hub, handler, peer)
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, code)]
    assert hub.stats()["gauges"]["timers"] == 0
    hub.close()


@pytest.mark.parametrize("state", STATES)
def test_the_hub_closes_in_every_state(handler: Handler, state: str) -> None:
    hub = new_hub(handler)
    peer = Peer(hub, buffers=4096)
    in_state(state, hub, handler, peer)
    hub.close()
    assert [connection for connection, _ in handler.of("on_closed")] == [peer.connection]
    assert peer.connection.backlog_bytes == 0


@pytest.mark.parametrize("state", STATES)
def test_an_abort_in_every_state(hub: Hub, handler: Handler, state: str) -> None:
    peer = Peer(hub, buffers=4096)
    in_state(state, hub, handler, peer)
    peer.connection.abort()
    peer.connection.abort()
    assert handler.of("on_closed") == []  # never inside the call
    hub.run_once(0)
    assert handler.of("on_closed") == [(peer.connection, 1006)]


def test_a_descriptor_that_is_no_socket_ends_with_its_first_event(hub: Hub, handler: Handler) -> None:
    reading, writing = os.pipe()
    connection = Connection()
    hub.adopt(connection, reading)
    os.write(writing, b"x")
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(connection, 1006)]
    os.close(writing)


def test_closing_a_duplicate_leaves_the_other_descriptor_alone(hub: Hub, handler: Handler) -> None:
    """Whoever did the upgrade may still hold the socket: its events must not come for a connection that is gone."""
    theirs, ours = tcp_pair()
    connection = Connection()
    hub.adopt(connection, ours.dup().detach())
    connection.abort()
    hub.run_once(0)
    theirs.sendall(masked(OPCODE_TEXT, b"for the other one"))
    assert select.select([hub.fileno()], [], [], 0.02)[0] == []
    assert ours.recv(100)
    theirs.close()
    ours.close()
