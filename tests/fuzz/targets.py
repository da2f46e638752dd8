"""What is fuzzed: the frame decoder, and the hub's whole input path over a socket pair. Each target judges one input.

A target returns a signature of what happened: an input with a new one is worth keeping. Owns what must hold for every input.
Knows nothing of where inputs come from.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Hashable
from typing import Any

from presence_core.frames import Decoder, ProtocolError, encode_frame
from presence_core.hub import Connection, Hub

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
LIMITS = (0, 1, 125, 126, 1024, 65_536)
PARTIAL_MAX_BYTES = 512  # what the decoder itself takes for an unfinished frame, without the message
CLOSE_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000), 1005}
TURNS_MAX = 1_000

Events = list[tuple[int, bytes, int]]


def bucket(size: int) -> int:
    return size.bit_length()


# --- the decoder


def _decoded(stream: bytes, limit: int, cuts: list[int]) -> tuple[Events, int | None, int]:
    decoder, events, error = Decoder(limit), [], None
    try:
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            events += decoder.feed(stream[begin:end])
            assert decoder.memory_bytes <= limit + PARTIAL_MAX_BYTES
    except ProtocolError as failure:
        events += failure.events
        error = failure.close_code
        assert error in (1002, 1007, 1009)
        assert decoder.finished
    assert not (decoder.finished and decoder.memory_bytes)
    return events, error, decoder.frames


def decode(data: bytes) -> Hashable:
    """The first byte chooses the limit, the second where the stream is cut; the rest is the stream."""
    limit, rng, stream = LIMITS[data[0] % len(LIMITS)] if data else 0, random.Random(data[1:2]), data[2:]
    whole = _decoded(stream, limit, [])
    cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(1, 6)))
    assert _decoded(stream, limit, cuts) == whole
    if len(stream) < 300:
        assert _decoded(stream, limit, list(range(1, len(stream)))) == whole or not stream
    events, error, frames = whole
    for opcode, payload, code in events:
        assert opcode in (TEXT, 2, CLOSE, PING, PONG)
        assert len(payload) <= (limit if opcode < CLOSE else 125)
        if opcode in (TEXT, CLOSE):
            payload.decode()
        assert code in CLOSE_CODES if opcode == CLOSE else code == 0
    assert all(opcode != CLOSE for opcode, _, _ in events[:-1])
    kinds = tuple((opcode, bucket(len(payload)), code and code // 1000) for opcode, payload, code in events[:6])
    return kinds, error, bucket(frames), limit


# --- the hub


class Echo:
    """Sends everything back and notes what it is told; how it answers a limit or a message depends on the input."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.mood = 0

    def on_open(self, connection: Connection) -> None:
        self.calls.append(("open",))
        if self.mood & 1:
            connection.start_heartbeat()

    def on_message(self, connection: Connection, data: bytes, opcode: int) -> None:
        self.calls.append(("message", opcode, bucket(len(data))))
        assert len(data) <= 1024
        if self.mood & 2 and data.startswith(b"{}"):
            connection.abort()
        elif self.mood & 4 and data.startswith(b"{}"):
            connection.close(4000, b"enough")
        elif self.mood & 8 and data.startswith(b"{}"):
            raise RuntimeError("on purpose")
        connection.send(encode_frame(opcode, data))

    def on_close(self, connection: Connection, code: int) -> None:
        assert code in CLOSE_CODES
        self.calls.append(("close", code // 1000))
        connection.finish()

    def on_closed(self, connection: Connection, code: int) -> None:
        assert connection.state == "closed"
        self.calls.append(("closed", code))

    def on_violation(self, connection: Connection, code: int) -> None:
        self.calls.append(("violation", code))

    def on_deadline(self, connection: Connection, deadline: str) -> None:
        self.calls.append(("deadline", deadline))

    def on_limit(self, connection: Connection, limit: str) -> None:
        self.calls.append(("limit", limit))
        if self.mood & 16:
            connection.close(4506, b"", encode_frame(TEXT, b"limit"))

    def on_error(self, connection: Connection | None, error: Exception) -> None:
        assert str(error) == "on purpose", repr(error)
        self.calls.append(("error",))

    def on_room_drained(self, room: object) -> None:
        self.calls.append(("drained",))


class InputPath:
    """One hub for all inputs: each is a connection of its own, beside one that must never notice."""

    def __init__(self) -> None:
        self.handler = Echo()
        self.hub = Hub(
            self.handler,
            max_message_bytes=1024,
            max_backlog_bytes=4096,
            ping_interval_ms=40,
            pong_timeout_ms=20,
            close_timeout_ms=30_000,
            messages_per_s=1e-6,
            message_burst=12,
            pings_per_s=1e-6,
            ping_burst=8,
            seed=1,
        )
        self.bystander, ours = socket.socketpair()
        self.bystander.setblocking(False)
        self.hub.adopt(Connection(), ours.detach())
        self.honest = self.hub.members()[0]

    def close(self) -> None:
        assert self.honest.is_open
        self.hub.close()
        self.bystander.close()

    def __call__(self, data: bytes) -> Hashable:
        """The first byte is the handler's mood, the second how the stream is cut, the third how much is in the head."""
        mood, rng, in_head, stream = data[:1], random.Random(data[1:2]), data[2:3], data[3:]
        self.handler.calls, self.handler.mood = [], mood[0] if mood else 0
        theirs, ours = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048 if self.handler.mood & 32 else 65_536)
        theirs.setblocking(False)
        connection = Connection()
        head = stream[: in_head[0]] if in_head else b""
        try:
            self.hub.adopt(connection, ours.detach(), head)
            received = self._talk(theirs, stream[len(head) :], rng)
        finally:
            theirs.close()
        for _ in range(TURNS_MAX):
            if connection.state == "closed" and self.handler.calls[-1][:1] == ("closed",):
                break
            self.hub.run_once(1)
        return self._judged(connection, received)

    def _talk(self, theirs: socket.socket, stream: bytes, rng: random.Random) -> bytes:
        """Send in pieces, turn, and read now and then."""
        received, at = b"", 0
        while at < len(stream):
            size = rng.choice((1, 2, 7, 100, 1_000, 4_096))
            try:
                at += theirs.send(stream[at : at + size])
            except BlockingIOError:
                pass
            except OSError:
                break
            self.hub.run_once(0)
            if rng.random() < 0.7:
                received += _read(theirs)
        self.hub.run_once(0)
        return received + _read(theirs)

    def _judged(self, connection: Connection, received: bytes) -> Hashable:
        calls = self.handler.calls
        assert calls[0] == ("open",)
        assert [call[0] for call in calls].count("closed") == 1
        assert calls[-1][0] == "closed"
        assert len(self.hub) == 1
        assert self.hub.stats()["gauges"]["timers"] == 0
        assert connection.backlog_bytes == 0
        opcodes = _opcodes(received)
        assert CLOSE not in opcodes[:-1]  # nothing comes behind a close frame
        assert [call[0] for call in calls].count("message") <= 12
        assert opcodes.count(PONG) <= 8
        return tuple(calls[:8]), tuple(opcodes[:6]), bucket(len(received)), self.handler.mood & 32


def _read(theirs: socket.socket) -> bytes:
    received = b""
    try:
        while data := theirs.recv(1 << 16):
            received += data
    except OSError:  # nothing more for now, or for ever
        pass
    return received


def _opcodes(received: bytes) -> list[int]:
    """Of the frames that came whole; a server's are final, not masked, and of the shortest form."""
    opcodes, at = [], 0
    while len(received) - at >= 2:
        assert received[at] & 0x70 == 0
        assert received[at] & 0x80
        size, start = received[at + 1], at + 2
        assert size < 127
        if size == 126:
            size, start = int.from_bytes(received[at + 2 : at + 4]), at + 4
            assert size > 125 or len(received) < start
        if len(received) < start + size:
            break
        opcodes.append(received[at] & 0x0F)
        assert opcodes[-1] in (TEXT, 2, CLOSE, PING, PONG)
        at = start + size
    return opcodes
