"""What the hub's tests share: a recording handler, the agent's side of a socket pair, and turning until something is so."""

from __future__ import annotations

import socket
import struct
import time
import weakref
from collections.abc import Callable
from typing import Any

from presence_core.frames import OPCODE_BINARY, OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG, OPCODE_TEXT
from presence_core.hub import Connection, Hub, Room

__all__ = [
    "OPCODE_BINARY",
    "OPCODE_CLOSE",
    "OPCODE_PING",
    "OPCODE_PONG",
    "OPCODE_TEXT",
    "Handler",
    "Peer",
    "masked",
    "new_hub",
    "turn_until",
]

TIMEOUT_S = 10.0
MASK = b"\x12\x34\x56\x78"
SERVER_FIRST_BYTES = {0x80 | opcode for opcode in (OPCODE_TEXT, OPCODE_BINARY, OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG)}


class Handler:
    """Records every callback; `react` may say what to do in one, by its name."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.react: dict[str, Callable[..., None]] = {}

    def _record(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.react:
            self.react[name](*arguments)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def on_open(self, connection: Connection) -> None:
        self._record("on_open", connection)

    def on_message(self, connection: Connection, data: bytes, opcode: int) -> None:
        self._record("on_message", connection, data, opcode)

    def on_close(self, connection: Connection, code: int) -> None:
        self._record("on_close", connection, code)
        if "on_close" not in self.react:
            connection.finish()

    def on_closed(self, connection: Connection, code: int) -> None:
        self._record("on_closed", connection, code)

    def on_violation(self, connection: Connection, code: int) -> None:
        self._record("on_violation", connection, code)

    def on_deadline(self, connection: Connection, deadline: str) -> None:
        self._record("on_deadline", connection, deadline)

    def on_limit(self, connection: Connection, limit: str) -> None:
        self._record("on_limit", connection, limit)

    def on_error(self, connection: Connection | None, error: Exception) -> None:
        self._record("on_error", connection, error)

    def on_room_drained(self, room: Room) -> None:
        self._record("on_room_drained", room)


def new_hub(handler: Handler | None = None, **options: Any) -> Hub:
    defaults = {"messages_per_s": 1e9, "message_burst": 1e9, "pings_per_s": 1e9, "ping_burst": 1e9, "seed": 7}
    return Hub(handler or Handler(), **{**defaults, **options})


def turn_until(hub: Hub, condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Turn the hub until the condition holds; the hub's own descriptor is what it waits on."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the hub did not get there in time"
        hub.run_once(5)


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A client's frame (RFC 6455 section 5.2)."""
    head = bytes([(0x80 if fin else 0) | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    elif len(payload) < 1 << 16:
        head += b"\xfe" + struct.pack("!H", len(payload))
    else:
        head += b"\xff" + struct.pack("!Q", len(payload))
    key = (MASK * (len(payload) // 4 + 1))[: len(payload)]
    body = (int.from_bytes(payload) ^ int.from_bytes(key)).to_bytes(len(payload)) if payload else b""
    return head + MASK + body


class Peer:
    """The agent's side of an adopted socket: sends bytes, reads frames."""

    def __init__(self, hub: Hub, head: bytes = b"", *, connection: Connection | None = None, buffers: int = 0) -> None:
        self.hub = hub
        self.socket, ours = tcp_pair(buffers)
        # In a circle of garbage the socket may be collected before its peer: this holds it until it is closed.
        weakref.finalize(self, self.socket.close)
        self.connection = connection or Connection()
        self.received = b""
        self.taken: list[tuple[int, bytes]] = []
        hub.adopt(self.connection, ours.detach(), head)
        self.socket.setblocking(False)

    def send(self, data: bytes) -> None:
        self.socket.setblocking(True)
        self.socket.sendall(data)
        self.socket.setblocking(False)

    def read(self) -> bool:
        """Read what is there; False at the end of the stream."""
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not data:
                return False
            self.received += data

    def frames(self, count: int) -> list[tuple[int, bytes]]:
        """Turn the hub until that many frames have come."""
        turn_until(self.hub, lambda: (self.read() and False) or len(self.parse()[0]) >= count)
        frames, _ = self.parse()
        taken = frames[:count]
        self.received = self.received[sum(length for _, _, length in taken) :]
        return [(opcode, payload) for opcode, payload, _ in taken]

    def take(self) -> list[tuple[int, bytes]]:
        """Read what is there, without turning the hub: every frame that `take` has seen so far."""
        self.read()
        frames, used = self.parse()
        self.received = self.received[used:]
        self.taken += [(opcode, payload) for opcode, payload, _ in frames]
        return self.taken

    def texts(self) -> list[bytes]:
        """The text messages of `take`."""
        return [payload for opcode, payload in self.take() if opcode == OPCODE_TEXT]

    def ended(self) -> bool:
        return not self.read()

    def parse(self) -> tuple[list[tuple[int, bytes, int]], int]:
        frames, at, data = [], 0, self.received
        while len(data) - at >= 2:
            assert data[at] in SERVER_FIRST_BYTES
            size, header = data[at + 1], 2
            assert size < 128  # a server does not mask
            if size == 126:
                header = 4
                size = int.from_bytes(data[at + 2 : at + 4])
            elif size == 127:
                header = 10
                size = int.from_bytes(data[at + 2 : at + 10])
            if len(data) - at < header + size:
                break
            frames.append((data[at] & 0x0F, data[at + header : at + header + size], header + size))
            at += header + size
        return frames, at

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Vanish with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def tcp_pair(buffers: int = 0) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.socket()
        if buffers:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        theirs.connect(listening.getsockname())
        ours, _ = listening.accept()
    if buffers:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
    ours.setblocking(False)
    return theirs, ours
