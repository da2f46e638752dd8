"""Frames of a WebSocket server (RFC 6455); the hub links to the C functions of frames.pxd."""

from typing import Final

from typing_extensions import disjoint_base

OPCODE_CONTINUATION: Final = 0
OPCODE_TEXT: Final = 1
OPCODE_BINARY: Final = 2
OPCODE_CLOSE: Final = 8
OPCODE_PING: Final = 9
OPCODE_PONG: Final = 10

class ProtocolError(Exception):
    """The stream broke the protocol: `close_code` is what to close with, `events` came before, in the same call."""

    close_code: int
    events: list[tuple[int, bytes, int]]

    def __init__(self, close_code: int, events: list[tuple[int, bytes, int]]) -> None: ...

@disjoint_base
class Decoder:
    """A streaming decoder of what one client sends, for tests and benchmarks.

    However the stream is cut into pieces, the events, the error and the byte at which it is found are the same.
    """

    def __new__(cls, max_message_bytes: int = 65536) -> Decoder: ...
    def feed(self, data: bytes) -> list[tuple[int, bytes, int]]:
        """The events that `data` completes: opcode, payload, and for a close frame its code (1005: none was sent).

        Raises ProtocolError where the stream breaks the protocol. After that, or after a close frame, all is ignored.
        """

    @property
    def frames(self) -> int:
        """Headers of frames completed so far."""

    @property
    def finished(self) -> bool:
        """Whether a close frame or an error has ended the stream."""

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated for what is unfinished; 0 at a message boundary."""

def encode_frame(opcode: int, payload: bytes | bytearray | memoryview | str) -> bytes:
    """One final, unmasked frame. Opcodes 1 (text), 2 (binary), 8 (close), 9 (ping) and 10 (pong).

    Raises ValueError for another opcode or a control frame of more than 125 bytes. Whether the bytes of a text frame
    are UTF-8 is not looked at. Cost: one copy of the payload.
    """

def encode_close(code: int, reason: bytes = b"") -> bytes:
    """A close frame; code 1005 stands for none. Raises ValueError for a code that must not be sent, or a bad reason."""

def bench_decode(frame: bytes, rounds: int) -> float:
    """Nanoseconds to decode that masked frame, its copy into the read buffer included."""

def bench_encode(opcode: int, payload: bytes, rounds: int) -> float:
    """Nanoseconds for encode_frame(), called from C."""
