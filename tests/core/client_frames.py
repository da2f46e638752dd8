"""Frames as a client sends them, right or wrong on purpose; independent of the code under test."""

from __future__ import annotations

import struct
from itertools import cycle

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = b"\x37\xfa\x21\x3d"  # the key of the examples in RFC 6455 section 5.7


def client_frame(
    opcode: int,
    payload: bytes = b"",
    *,
    final: bool = True,
    key: bytes | None = KEY,
    reserved: int = 0,
    length_bytes: int | None = None,
    declared: int | None = None,
) -> bytes:
    """One frame; no `key`: not masked. `length_bytes` (0, 2 or 8) and `declared` make the length a wrong one."""
    size = len(payload) if declared is None else declared
    if length_bytes is None:
        length_bytes = 0 if size < 126 else 2 if size < 65536 else 8
    first = bytes([(0x80 if final else 0) | reserved << 4 | opcode])
    mask_bit = 0x80 if key is not None else 0
    if length_bytes == 0:
        length = struct.pack("!B", mask_bit | size)
    elif length_bytes == 2:
        length = struct.pack("!BH", mask_bit | 126, size)
    else:
        length = struct.pack("!BQ", mask_bit | 127, size)
    if key is None:
        return first + length + payload
    return first + length + key + bytes(byte ^ mask for byte, mask in zip(payload, cycle(key), strict=False))


def close_payload(code: int, reason: bytes = b"") -> bytes:
    """What a close frame carries."""
    return struct.pack("!H", code) + reason
