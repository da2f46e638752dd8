"""Mutations of streams of client frames: of single bytes, of slices, and of whole frames with their lengths and masks.

Owns what a mutation is; the randomness is an argument. Knows nothing of what is fed with the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

__all__ = ["MAX_BYTES", "frame", "mutated"]

MAX_BYTES = 4096  # of one input: small ones say more a second
INTERESTING = (0, 1, 2, 124, 125, 126, 127, 128, 255)
LENGTHS = (0, 1, 125, 126, 127, 128, 255, 256, 1023, 65_535, 65_536, 1 << 31, (1 << 63) - 1, 1 << 63)
PAYLOADS = (
    b"",
    b"{}",
    b"x" * 125,
    b"x" * 126,
    "žluťoučký kůň 😀".encode(),
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98",
    b"\xff",
    b"\x03\xe8",
    b"\x03\xed",
    b"\x0f\xa0why",
    b"\x03",
)
OPCODES = (0, 0, 1, 1, 2, 8, 9, 9, 10, 10, 3, 7, 11, 15)


def frame(
    opcode: int, payload: bytes, *, final: bool = True, key: bytes = bytes(4), declared: int | None = None
) -> bytes:
    """A client's frame; `declared` is a length that need not be the payload's."""
    size = len(payload) if declared is None else declared
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 1 << 16:
        length = b"\xfe" + size.to_bytes(2)
    else:
        length = b"\xff" + size.to_bytes(8)
    body = bytes(byte ^ key[i & 3] for i, byte in enumerate(payload))
    return bytes([(0x80 if final else 0) | opcode]) + length + key + body


def _random_frame(rng: random.Random) -> bytes:
    payload = rng.choice(PAYLOADS) + rng.choice(PAYLOADS) * (rng.random() < 0.2)
    declared = rng.choice(LENGTHS) if rng.random() < 0.1 else None
    key = rng.choice((bytes(4), rng.randbytes(4)))
    return frame(rng.choice(OPCODES), payload, final=rng.random() < 0.7, key=key, declared=declared)


def _place(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


def _flip_a_bit(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _set_a_byte(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes([rng.choice(INTERESTING)]) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    begin, end = sorted((_place(rng, data), _place(rng, data)))
    return data[:begin] + data[end:]


def _repeat(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    begin, end = sorted((_place(rng, data), _place(rng, data)))
    return data[:end] + data[begin:end] * rng.choice((1, 1, 2, 8, 300)) + data[end:]


def _insert_a_frame(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.choice((0, len(data), _place(rng, data)))
    return data[:at] + _random_frame(rng) * rng.choice((1, 1, 1, 2, 30)) + data[at:]


def _splice(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    other = rng.choice(corpus)
    return data[: _place(rng, data)] + other[_place(rng, other) :]


MUTATIONS: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (
    _flip_a_bit,
    _set_a_byte,
    _cut,
    _repeat,
    _insert_a_frame,
    _insert_a_frame,
    _splice,
)


def mutated(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the corpus after a few mutations."""
    data = rng.choice(corpus)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        data = rng.choice(MUTATIONS)(rng, data, corpus)[:MAX_BYTES]
    return data
