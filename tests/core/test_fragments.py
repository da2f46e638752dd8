"""Messages in many pieces: a few hundred are nothing special, more count as messages do, empty ones too."""

from __future__ import annotations

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
    turn_until,
)
from presence_core.hub import Hub

CONTINUATION = 0
FREE = 256  # fragments that a message may have for its one token
BURST = 4
EMPTY = masked(CONTINUATION, fin=False)


@pytest.fixture
def hub(handler: Handler) -> Iterator[Hub]:
    hub = new_hub(handler, messages_per_s=1e-6, message_burst=BURST, close_timeout_ms=10_000)
    yield hub
    hub.close()


def begun(payload: bytes = b"") -> bytes:
    return masked(OPCODE_TEXT, payload, fin=False)


def message(fragments: int) -> bytes:
    """An empty message in so many fragments before the last."""
    return begun() + EMPTY * (fragments - 1) + masked(CONTINUATION)


@pytest.mark.parametrize("piece", [b"", b"x"])
def test_fragments_without_end_are_a_flood(hub: Hub, handler: Handler, piece: bytes) -> None:
    peer = Peer(hub)
    peer.send(begun(piece))
    room = FREE + BURST * FREE - 1
    peer.send(masked(CONTINUATION, piece, fin=False) * room)
    turn_until(hub, lambda: hub.stats()["counters"]["frames_received"] == room + 1)
    assert handler.of("on_limit") == []
    peer.send(masked(CONTINUATION, piece, fin=False))
    turn_until(hub, lambda: handler.of("on_limit"))
    assert handler.of("on_limit") == [(peer.connection, "messages")]
    assert handler.of("on_message") == []
    assert peer.connection.state == "closing"
    assert peer.frames(1) == [(OPCODE_CLOSE, (1008).to_bytes(2))]


def test_a_message_in_some_hundred_fragments_counts_once(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.send(message(FREE) * BURST)
    turn_until(hub, lambda: len(handler.of("on_message")) == BURST)
    assert handler.of("on_limit") == []
    peer.send(message(1))
    turn_until(hub, lambda: handler.of("on_limit"))


def test_a_message_in_more_counts_as_more(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.send(message(FREE + (BURST - 1) * FREE))  # all the others' tokens, and its own
    turn_until(hub, lambda: handler.of("on_message"))
    assert handler.of("on_limit") == []
    peer.send(message(1))
    turn_until(hub, lambda: handler.of("on_limit"))
    assert len(handler.of("on_message")) == 1


@pytest.mark.parametrize("cut", [1, 7, 4096])
def test_how_the_stream_is_cut_changes_nothing(hub: Hub, handler: Handler, cut: int) -> None:
    data = message(FREE) + message(2 * FREE) + message(FREE) + EMPTY
    first, second = Peer(hub), Peer(hub, data)
    assert handler.of("on_violation") == [(second.connection, 1002)]  # the last one continues nothing: so far it came
    for at in range(0, len(data), cut):
        first.send(data[at : at + cut])
        hub.run_once(0)
    turn_until(hub, lambda: len(handler.of("on_violation")) == 2)
    assert handler.of("on_limit") == []
    assert len(handler.of("on_message")) == 6


def test_control_frames_between_the_fragments_do_not_start_the_count_again(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    peer.send(begun())
    for _ in range(BURST + 1):
        peer.send(EMPTY * (FREE - 1) + masked(OPCODE_PING, b"p"))
    assert peer.frames(BURST + 1) == [(OPCODE_PONG, b"p")] * (BURST + 1)
    peer.send(EMPTY * FREE)
    turn_until(hub, lambda: handler.of("on_limit"))
    assert handler.of("on_limit") == [(peer.connection, "messages")]


def test_behind_the_limit_the_stream_is_read_on_to_the_peers_close_frame(hub: Hub, handler: Handler) -> None:
    peer = Peer(hub)
    flood = message(FREE + (BURST + 1) * FREE)
    peer.send(flood + masked(OPCODE_BINARY, b"unheard") + masked(OPCODE_CLOSE, (1000).to_bytes(2)))
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, 1008)]
    assert handler.of("on_message") == handler.of("on_violation") == []
    assert len(handler.of("on_limit")) == 1


@pytest.mark.parametrize("way", ["abort", "close"])
def test_a_handler_may_end_the_connection_where_the_flood_is_told(hub: Hub, handler: Handler, way: str) -> None:
    handler.react["on_limit"] = lambda connection, limit: getattr(connection, way)()
    peer = Peer(hub)
    peer.send(message(FREE + (BURST + 1) * FREE) + masked(OPCODE_CLOSE, (1000).to_bytes(2)))
    turn_until(hub, lambda: handler.of("on_closed"))
    assert handler.of("on_closed") == [(peer.connection, {"abort": 1006, "close": 1000}[way])]
    assert handler.of("on_message") == handler.of("on_close") == []
