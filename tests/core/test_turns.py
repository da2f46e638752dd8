"""A turn of the hub, and its end: closed inside callbacks, turned inside callbacks, descriptors used again within a turn."""

from __future__ import annotations

import os
import socket
import weakref
from typing import Any

import pytest

from peers import OPCODE_CLOSE, OPCODE_TEXT, Handler, Peer, masked, new_hub, tcp_pair, turn_until
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub

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
