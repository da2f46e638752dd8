"""Rooms over real sockets: who gets which event, in which order, while members come and go; bounds and fairness."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator

import pytest

from peers import OPCODE_CLOSE, OPCODE_TEXT, Handler, Peer, masked, new_hub, turn_until
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub, Room

MEMBERS_PER_TURN = 64  # of the hub: with a slice of next to nothing, a turn serves just that many


@pytest.fixture
def hub(handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler)
    yield hub
    hub.close()


@pytest.fixture
def slow_hub(handler: Handler) -> Iterator[Hub]:
    """One that serves at most MEMBERS_PER_TURN members of one room in a turn."""
    hub = new_hub(handler, slice_us=1, max_room_queue_bytes=100_000)
    yield hub
    hub.close()


def text(payload: bytes | int) -> bytes:
    return encode_frame(OPCODE_TEXT, payload if isinstance(payload, bytes) else b"%d" % payload)


def join(hub: Hub, room: Room, count: int) -> list[Peer]:
    peers = [Peer(hub) for _ in range(count)]
    for peer in peers:
        peer.connection.join(room)
    return peers


def settle(hub: Hub) -> None:
    """Turn until nothing is left to do."""
    while select.select([hub.fileno()], [], [], 0)[0]:
        hub.run_once(0)


def numbers(peer: Peer) -> list[int]:
    return [int(payload) for payload in peer.texts()]


# --- order


def test_every_member_hears_every_event_in_order(hub: Hub) -> None:
    room = hub.new_room()
    peers = join(hub, room, 30)
    for number in range(200):
        assert room.broadcast(text(number))
        if number % 7 == 0:
            hub.run_once(0)
    turn_until(hub, lambda: all(len(numbers(peer)) == 200 for peer in peers))
    assert all(numbers(peer) == list(range(200)) for peer in peers)


def test_a_room_knows_how_many_events_everyone_has_been_sent(hub: Hub) -> None:
    room = hub.new_room()
    assert (room.events_taken, room.events_served) == (0, 0)
    peers = join(hub, room, 1000)
    for number in range(3):
        room.broadcast(text(number))
    assert (room.events_taken, room.events_served) == (3, 0)
    served = 0
    while served < 3:
        hub.run_once(0)
        served = room.events_served
        assert all(len(numbers(peer)) >= served for peer in peers)
    room.broadcast(text(3), only=peers[0].connection)
    assert (room.events_taken, room.events_served) == (4, 3)
    settle(hub)
    assert (room.events_taken, room.events_served) == (4, 4)


def test_events_that_wait_go_out_in_one_send(hub: Hub) -> None:
    room = hub.new_room()
    peers = join(hub, room, 10)
    for number in range(50):
        room.broadcast(text(number))
    settle(hub)
    assert hub.stats()["counters"]["sends"] == 10
    assert all(numbers(peer) == list(range(50)) for peer in peers)


def test_one_send_is_bounded_and_a_large_event_goes_alone(hub: Hub) -> None:
    room = hub.new_room()
    [peer] = join(hub, room, 1)
    sizes = [30_000, 30_000, 10_000, 200_000, 1, 2]
    frames = [text(b"%d" % number * size) for number, size in enumerate(sizes)]
    for frame in frames:
        room.broadcast(frame)
    turn_until(hub, lambda: len(peer.texts()) == len(sizes))
    assert [text(payload) for payload in peer.texts()] == frames


def test_exclude_and_only_keep_the_order(hub: Hub) -> None:
    room = hub.new_room()
    first, second, third = join(hub, room, 3)
    room.broadcast(text(0))
    room.broadcast(text(1), exclude=first.connection)
    room.broadcast(text(2), only=first.connection)
    room.broadcast(text(3), exclude=second.connection)
    room.broadcast(text(4), only=second.connection, exclude=second.connection)
    room.broadcast(text(5))
    settle(hub)
    assert [numbers(peer) for peer in (first, second, third)] == [[0, 2, 3, 5], [0, 1, 5], [0, 1, 3, 5]]
    room.broadcast(text(6))  # nobody is named any more
    settle(hub)
    assert all(numbers(peer)[-1] == 6 for peer in (first, second, third))


def test_an_event_for_one_member_only(hub: Hub) -> None:
    room = hub.new_room()
    first, second = join(hub, room, 2)
    room.broadcast(text(1), only=second.connection)
    settle(hub)
    assert (numbers(first), numbers(second)) == ([], [1])
    assert hub.stats()["counters"]["sends"] == 1


def test_a_named_connection_may_be_elsewhere_or_gone(hub: Hub) -> None:
    room, other_room = hub.new_room(), hub.new_room()
    (peer,), (elsewhere,) = join(hub, room, 1), join(hub, other_room, 1)
    never_adopted, gone = Connection(), Peer(hub)
    gone.connection.abort()
    room.broadcast(text(1), exclude=never_adopted)
    room.broadcast(text(2), only=never_adopted)
    room.broadcast(text(3), exclude=gone.connection)
    room.broadcast(text(4), only=elsewhere.connection)
    room.broadcast(text(5), exclude=elsewhere.connection)
    other_room.broadcast(text(6))  # its only member is named in a batch of the other room
    other_room.broadcast(text(7))
    settle(hub)
    assert numbers(peer) == [1, 3, 5]
    assert numbers(elsewhere) == [6, 7]


def test_a_broadcast_to_nobody_is_nothing(hub: Hub) -> None:
    room = hub.new_room()
    assert room.broadcast(text(1))
    assert room.queued_bytes == 0
    assert hub.stats()["counters"]["room_events_queued"] == 0
    assert select.select([hub.fileno()], [], [], 0)[0] == []
    [peer] = join(hub, room, 1)
    settle(hub)
    assert numbers(peer) == []


def test_everyone_leaves_before_the_event_is_served(hub: Hub) -> None:
    room = hub.new_room()
    peers = join(hub, room, 3)
    room.broadcast(text(1))
    for peer in peers:
        peer.connection.leave()
        peer.connection.leave()
    settle(hub)
    assert [numbers(peer) for peer in peers] == [[], [], []]
    assert len(room) == room.queued_bytes == 0


def test_the_descriptor_wakes_for_a_broadcast(hub: Hub) -> None:
    room = hub.new_room()
    [peer] = join(hub, room, 1)
    settle(hub)
    room.broadcast(text(1))
    assert select.select([hub.fileno()], [], [], 0)[0]
    settle(hub)
    assert numbers(peer) == [1]


def test_a_callback_may_broadcast(hub: Hub, handler: Handler) -> None:
    room = hub.new_room()
    peers = join(hub, room, 2)
    handler.react["on_message"] = lambda connection, data, opcode: room.broadcast(text(data), exclude=connection)
    peers[0].send(masked(OPCODE_TEXT, b"1"))
    turn_until(hub, lambda: numbers(peers[1]) == [1])
    assert numbers(peers[0]) == []


# --- comings and goings in the middle of a pass


def leave(peer: Peer) -> None:
    peer.connection.leave()


def close(peer: Peer) -> None:
    peer.connection.close(4000)


def abort(peer: Peer) -> None:
    peer.connection.abort()


def vanish(peer: Peer) -> None:
    peer.reset()


@pytest.mark.parametrize("way", [leave, close, abort, vanish])
@pytest.mark.parametrize("turns", [0, 1, 2, 4, 5])
def test_members_that_go_during_a_pass_let_nobody_be_skipped_or_served_twice(
    slow_hub: Hub, way: Callable[[Peer], None], turns: int
) -> None:
    room = slow_hub.new_room()
    peers = join(slow_hub, room, 5 * MEMBERS_PER_TURN)
    settle(slow_hub)
    for number in range(3):
        room.broadcast(text(number))
    for _ in range(turns):
        slow_hub.run_once(0)
    served = sum(len(numbers(peer)) == 3 for peer in peers)
    assert served == turns * MEMBERS_PER_TURN
    gone = set(range(0, len(peers), 3)) | {1, 63, 64, 65, 127, 128, 319}
    for index in sorted(gone, key=lambda index: index * 7919 % 331):
        way(peers[index])
    room.broadcast(text(3))
    staying = [peer for index, peer in enumerate(peers) if index not in gone]
    turn_until(slow_hub, lambda: all(len(numbers(peer)) == 4 for peer in staying))
    settle(slow_hub)
    assert all(numbers(peer) == [0, 1, 2, 3] for peer in staying)
    assert len(room) == len(staying)
    if way is not vanish:
        assert all(numbers(peers[index]) in ([], [0, 1, 2]) for index in gone)


def test_a_newcomer_gets_what_came_after_it_joined(slow_hub: Hub) -> None:
    room = slow_hub.new_room()
    peers = join(slow_hub, room, 2 * MEMBERS_PER_TURN)
    settle(slow_hub)
    room.broadcast(text(1))
    [with_events_queued] = join(slow_hub, room, 1)
    room.broadcast(text(2))
    slow_hub.run_once(0)
    [during_the_pass] = join(slow_hub, room, 1)
    room.broadcast(text(3))
    settle(slow_hub)
    assert numbers(with_events_queued) == [2, 3]
    assert numbers(during_the_pass) == [3]
    assert all(numbers(peer) == [1, 2, 3] for peer in peers)


def test_leaving_and_joining_again_during_a_pass_gives_nothing_twice(slow_hub: Hub) -> None:
    room = slow_hub.new_room()
    peers = join(slow_hub, room, 3 * MEMBERS_PER_TURN)
    settle(slow_hub)
    room.broadcast(text(1))
    slow_hub.run_once(0)
    served = [peer for peer in peers if numbers(peer)]
    waiting = [peer for peer in peers if not numbers(peer)]
    again = served[:10] + waiting[:10]
    for peer in again:
        peer.connection.leave()
        peer.connection.join(room)
    room.broadcast(text(2))
    settle(slow_hub)
    assert all(numbers(peer) == ([2] if peer in waiting[:10] else [1, 2]) for peer in peers)


def test_moving_to_another_room_takes_no_event_along(slow_hub: Hub) -> None:
    first, second = slow_hub.new_room("first"), slow_hub.new_room("second")
    peers = join(slow_hub, first, 4)
    join(slow_hub, second, 1)
    settle(slow_hub)
    for number in range(5):  # the rooms count their events apart
        second.broadcast(text(90 + number))
    first.broadcast(text(1))
    mover = peers[0].connection
    mover.leave()
    mover.join(second)
    assert mover.room is second
    assert second.tag == "second"
    second.broadcast(text(2))
    first.broadcast(text(3))
    settle(slow_hub)
    assert numbers(peers[0]) == [2]
    assert numbers(peers[1]) == [1, 3]


def test_joining_is_refused_where_it_makes_no_sense(hub: Hub) -> None:
    room = hub.new_room()
    [peer] = join(hub, room, 1)
    with pytest.raises(ValueError, match="already"):
        peer.connection.join(hub.new_room())
    other_hub = new_hub()
    peer.connection.leave()
    with pytest.raises(ValueError, match="another hub"):
        peer.connection.join(other_hub.new_room())
    with pytest.raises(ValueError, match="open connection"):
        Connection().join(room)
    with pytest.raises(ValueError, match="another hub"):
        peer.connection.join(Room())
    peer.connection.close()
    with pytest.raises(ValueError, match="open connection"):
        peer.connection.join(room)
    other_hub.close()


# --- bounds


def test_a_room_refuses_what_passes_its_bound_and_tells_when_it_is_empty(handler: Handler, slow_hub: Hub) -> None:
    room = slow_hub.new_room()
    peers = join(slow_hub, room, MEMBERS_PER_TURN + 1)
    settle(slow_hub)
    accepted = [number for number in range(120) if room.broadcast(text(b"%03d" % number * 333))]
    assert accepted == list(range(len(accepted)))
    assert 90_000 < room.queued_bytes <= 100_000
    assert slow_hub.stats()["counters"]["room_events_refused"] == 120 - len(accepted)
    slow_hub.run_once(0)
    assert handler.of("on_room_drained") == []
    turn_until(slow_hub, lambda: handler.of("on_room_drained"))
    assert handler.of("on_room_drained") == [(room,)]
    assert room.queued_bytes == 0
    assert room.broadcast(text(b"%03d" % 500 * 333))
    settle(slow_hub)
    for peer in peers:
        assert [int(payload[:3]) for payload in peer.texts()] == [*accepted, 500]
    assert handler.of("on_room_drained") == [(room,)]  # once for each time that something was refused


def test_one_event_may_pass_the_rooms_bound_when_nothing_waits(slow_hub: Hub) -> None:
    room = slow_hub.new_room()
    [peer] = join(slow_hub, room, 1)
    assert room.broadcast(text(b"x" * 150_000))
    assert not room.broadcast(text(b"y"))
    turn_until(slow_hub, lambda: len(peer.texts()) == 1)


def test_a_handler_that_raises_in_on_room_drained_is_told_of_it(handler: Handler, slow_hub: Hub) -> None:
    def fail(room: Room) -> None:
        raise RuntimeError("drained")

    handler.react["on_room_drained"] = fail
    rooms = [slow_hub.new_room(number) for number in range(2)]
    peers = [join(slow_hub, room, 1)[0] for room in rooms]
    for room in rooms:
        room.broadcast(text(b"x" * 150_000))
        assert not room.broadcast(text(b"y"))
    turn_until(slow_hub, lambda: [peer.read() for peer in peers] and len(handler.of("on_error")) == 2)
    assert [(connection, str(error)) for connection, error in handler.of("on_error")] == [(None, "drained")] * 2


# --- fairness


def test_a_small_room_does_not_wait_for_a_flooded_one(handler: Handler) -> None:
    hub = new_hub(handler, slice_us=1)
    crowd, couple = hub.new_room(), hub.new_room()
    many, two = join(hub, crowd, 2_000), join(hub, couple, 2)
    settle(hub)
    for _ in range(300):
        crowd.broadcast(text(b"flood" * 200))
    for _ in range(3):
        hub.run_once(0)
    couple.broadcast(text(1))
    turns = 0
    while not all(numbers(peer) == [1] for peer in two):
        hub.run_once(0)
        turns += 1
    assert turns <= 2  # one of the flooded room's, then theirs
    assert sum(bool(peer.texts()) for peer in many) <= 5 * MEMBERS_PER_TURN
    hub.close()


def test_messages_and_deadlines_are_served_while_a_room_is_flooded(handler: Handler) -> None:
    hub = new_hub(handler, slice_us=1)
    crowd = hub.new_room()
    members = join(hub, crowd, 500)
    agent = Peer(hub)
    settle(hub)
    for _ in range(100):
        crowd.broadcast(text(b"flood" * 200))
    agent.send(masked(OPCODE_TEXT, b"hello"))
    agent.connection.set_alarm(0)
    turn_until(hub, lambda: len(handler.names()) == 503)
    assert sorted(handler.names()[501:]) == ["on_deadline", "on_message"]
    assert crowd.queued_bytes  # it is still far from done
    assert len(crowd) == len(members)
    hub.close()


def test_rooms_take_turns(handler: Handler) -> None:
    hub = new_hub(handler, slice_us=1)
    rooms = [hub.new_room() for _ in range(4)]
    groups = [join(hub, room, 3 * MEMBERS_PER_TURN) for room in rooms]
    settle(hub)
    for room in rooms:
        room.broadcast(text(1))
    for passes in range(1, 4):
        for _ in rooms:
            hub.run_once(0)
        served = [sum(len(numbers(peer)) for peer in group) for group in groups]
        assert served == [passes * MEMBERS_PER_TURN] * 4
    hub.close()


def test_a_close_frame_comes_behind_the_events_that_went_before(hub: Hub) -> None:
    room = hub.new_room()
    [peer] = join(hub, room, 1)
    room.broadcast(text(1))
    hub.run_once(0)
    room.broadcast(text(2))
    peer.connection.close(4000)
    settle(hub)
    assert peer.take() == [(OPCODE_TEXT, b"1"), (OPCODE_CLOSE, (4000).to_bytes(2))]


def test_delivery_times_are_counted(hub: Hub) -> None:
    room = hub.new_room()
    peers = join(hub, room, 3)
    room.broadcast(text(1))
    room.broadcast(text(2), received_ns=0)
    room.broadcast(text(3), received_ns=(1 << 64) - 1)  # from the future: counts as none
    settle(hub)
    bounds, counts, total_s = hub.stats()["histograms"]["delivery_seconds"]
    assert sum(counts) == len(peers)
    assert len(counts) == len(bounds) + 1
    assert counts[-1] == 1
    assert total_s > 1
    with pytest.raises(OverflowError):
        room.broadcast(text(1), received_ns=-1)
