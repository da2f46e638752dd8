"""Fan-out in bulk, an io_uring's many sends in one system call, and one by one where there can be none: nobody notices which."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator

import pytest

from peers import OPCODE_TEXT, Handler, Peer, new_hub, turn_until
from presence_core.frames import encode_frame
from presence_core.hub import Hub, Room

MEMBERS = 200


@pytest.fixture(params=[True, False], ids=["in bulk", "one by one"])
def hub(request: pytest.FixtureRequest, handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler, bulk_sends=request.param, max_backlog_bytes=300_000)
    if request.param and not hub.sends_in_bulk:
        hub.close()
        pytest.skip("this kernel allows no io_uring")
    yield hub
    hub.close()


def crowd(hub: Hub, count: int = MEMBERS, *, buffers: int = 0) -> tuple[Room, list[Peer]]:
    room, peers = hub.new_room(), [Peer(hub, buffers=buffers) for _ in range(count)]
    for peer in peers:
        peer.connection.join(room)
    return room, peers


def broadcast(room: Room, *numbers: int, size: int = 0, exclude: Peer | None = None) -> None:
    for number in numbers:
        frame = encode_frame(OPCODE_TEXT, b"%d" % number + b" " * size)
        room.broadcast(frame, exclude=None if exclude is None else exclude.connection)


def heard(peer: Peer) -> list[int]:
    return [int(text) for text in peer.texts()]


def settle(hub: Hub, room: Room) -> None:
    turn_until(hub, lambda: room.queued_bytes == 0)
    hub.run_once(0)


@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 65, MEMBERS])
def test_rooms_of_every_size_are_served_in_order(hub: Hub, count: int) -> None:
    room, peers = crowd(hub, count)
    before = hub.stats()["counters"]
    for number in range(5):
        broadcast(room, number)
        settle(hub, room)
    turn_until(hub, lambda: all(len(heard(peer)) == 5 for peer in peers))
    assert all(heard(peer) == list(range(5)) for peer in peers)
    after = hub.stats()["counters"]
    assert after["sends"] - before["sends"] == 5 * count
    assert after["bytes_sent"] - before["bytes_sent"] == 5 * count * 3


def test_members_that_are_named_gone_or_full_are_served_among_the_others(hub: Hub, handler: Handler) -> None:
    room, peers = crowd(hub)
    full = [Peer(hub, buffers=4096) for _ in range(20)]
    for peer in full:
        peer.connection.join(room)
    for number in range(20):
        broadcast(room, number, size=3_000)
        settle(hub, room)
        for peer in peers:
            peer.take()
    assert all(peer.connection.backlog_bytes for peer in full)
    for peer in peers[::10]:
        peer.reset()
    broadcast(room, 20, 21, exclude=peers[1])
    broadcast(room, 22)
    turn_until(hub, lambda: len(handler.of("on_closed")) == len(peers[::10]) and room.queued_bytes == 0)
    alive = [peer for number, peer in enumerate(peers) if number % 10 and number != 1] + full
    turn_until(hub, lambda: all(len(heard(peer)) == 23 for peer in alive))
    assert all(heard(peer) == list(range(23)) for peer in alive)
    assert heard(peers[1]) == [*range(20), 22]
    assert {connection for connection, _ in handler.of("on_closed")} == {peer.connection for peer in peers[::10]}


def test_an_event_larger_than_the_sockets_goes_out_in_parts(hub: Hub) -> None:
    room, peers = crowd(hub, 20, buffers=8_192)
    payload = bytes(range(32, 126)) * 500
    room.broadcast(encode_frame(OPCODE_TEXT, payload))
    settle(hub, room)
    assert all(0 < peer.connection.backlog_bytes < len(payload) for peer in peers)
    turn_until(hub, lambda: all(peer.texts() for peer in peers))
    assert all(peer.texts() == [payload] for peer in peers)


@pytest.mark.parametrize("named", [None, 10], ids=["all", "all but one"])
def test_another_thread_may_not_use_the_ring_and_sends_one_by_one(handler: Handler, named: int | None) -> None:
    hub = new_hub(handler)
    if not hub.sends_in_bulk:
        hub.close()
        pytest.skip("this kernel allows no io_uring")
    room, peers = crowd(hub)
    broadcast(room, 1)
    settle(hub, room)
    broadcast(room, 2, exclude=None if named is None else peers[named])
    thread = threading.Thread(target=settle, args=(hub, room))
    thread.start()
    thread.join()
    assert not hub.sends_in_bulk  # the kernel has refused, and nothing was lost
    broadcast(room, 3)
    settle(hub, room)
    expected = [[1, 3] if number == named else [1, 2, 3] for number in range(MEMBERS)]
    turn_until(hub, lambda: [heard(peer) for peer in peers] == expected)
    hub.close()


def test_no_descriptor_is_left_for_a_ring() -> None:
    if not (allowed := new_hub()).sends_in_bulk:
        pytest.skip("this kernel allows no io_uring")
    allowed.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(4)]
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[2] + 1, hard))
    try:
        hub = new_hub()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not hub.sends_in_bulk
    room, peers = crowd(hub, 70)
    broadcast(room, 1)
    turn_until(hub, lambda: all(heard(peer) == [1] for peer in peers))
    hub.close()
