"""Python code that runs where an object goes, which is wherever the hub lets go of it; and what the collector finds."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable

import pytest

from peers import OPCODE_PONG, OPCODE_TEXT, Handler, Peer, new_hub, turn_until
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub

# --- finalisers


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


def test_a_hub_that_is_being_closed_is_not_turned_by_what_it_lets_go_of(handler: Handler) -> None:
    """A turn in between would tell of connections, and take them off the list that is gone through."""
    hub = new_hub(handler)
    peers = [Peer(hub) for _ in range(50)]
    refused = []

    def turn() -> None:
        with pytest.raises(RuntimeError, match="a turn inside a turn"):
            hub.run_once(0)
        refused.append(handler.of("on_closed"))

    for peer in peers:
        peer.connection.join(hub.new_room(Tag(turn)))
    hub.close()
    assert refused == [[]] * 50
    assert [connection for connection, _ in handler.of("on_closed")] == [peer.connection for peer in peers]
    assert len(hub) == 0


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
