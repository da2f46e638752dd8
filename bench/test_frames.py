"""Frames of 16 B, 190 B and 4 KB, ASCII text, beside picows' and wsproto's own parsers and writers.

Decoding: a buffer of masked frames. `hub` is what the hub does: a loop in C, UTF-8 validated, each frame copied first, as
recv() would. `Decoder` is the same through its Python seam, which makes bytes and a tuple of each. picows' parser runs on
a stub transport with a listener that does nothing, also in C; it validates no UTF-8 and makes one object of each frame.
wsproto's FrameProtocol gives str.

Encoding: a server's frame as bytes. picows' send() writes to a stub transport that says it has data buffered, so that no
system call is measured.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from picows import WSListener, WSMsgType
from picows.picows import WSAutoPingStrategy, WSProtocol
from wsproto.frame_protocol import FrameProtocol

from conftest import Loop, Report
from presence_core.frames import OPCODE_TEXT, Decoder, bench_decode, bench_encode, encode_frame

SIZES = [16, 190, 4096]
BATCH = 64  # frames in one buffer
MASK = b"\x37\xfa\x21\x3d"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def text_of(size: int) -> bytes:
    return (b'{"type":"event","subject":"classrooms.chat","payload":{"text":"hello"}}' * 60)[:size]


def masked_frame(payload: bytes) -> bytes:
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return b"\x81" + length + MASK + bytes(byte ^ MASK[i % 4] for i, byte in enumerate(payload))


def timed(run: Callable[[], object], count: int) -> float:
    begun_ns = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begun_ns) / count


class StubTransport:
    """As much of a transport as picows asks for; whatever is written is forgotten."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.write = deque[bytes](maxlen=0).append

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self.sock if name == "socket" else None

    def get_write_buffer_size(self) -> int:
        return 1

    def close(self) -> None:
        raise AssertionError("picows closed the connection")

    abort = close


def picows_protocol(sock: socket.socket) -> Any:
    """picows' protocol, past the upgrade. Called inside a running loop."""
    protocol = WSProtocol(
        "bench",
        "/",
        False,
        lambda request: WSListener(),
        logging.LoggerAdapter(logging.getLogger("bench"), {}),
        True,
        None,
        False,
        10,
        10,
        WSAutoPingStrategy.PING_WHEN_IDLE,
        False,
        1 << 20,
        None,
        1 << 20,
    )
    protocol.connection_made(StubTransport(sock))
    picows_feed(protocol, UPGRADE)
    return protocol


def picows_feed(protocol: Any, data: bytes) -> None:
    protocol.get_buffer(-1)[: len(data)] = data
    protocol.buffer_updated(len(data))


async def with_picows(measure: Callable[[Any], None]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        measure(picows_protocol(sock))


def decode_by_decoder(data: bytes) -> Loop:
    decoder = Decoder()
    assert len(decoder.feed(data)) == BATCH
    return lambda: timed(lambda: [decoder.feed(data) for _ in range(20)], 20 * BATCH)


def decode_by_wsproto(data: bytes) -> Loop:
    protocol = FrameProtocol(client=False, extensions=[])

    def read() -> int:
        protocol.receive_bytes(data)
        return sum(1 for _ in protocol.received_frames())

    assert read() == BATCH
    return lambda: timed(lambda: [read() for _ in range(3)], 3 * BATCH)


def measure_picows_decode(ns_each: Report, data: bytes) -> Callable[[Any], None]:
    def measure(protocol: Any) -> None:
        ns_each(lambda: timed(lambda: [picows_feed(protocol, data) for _ in range(50)], 50 * BATCH))

    return measure


@pytest.mark.benchmark(group="frame decode")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", ["hub", "Decoder", "picows", "wsproto"])
def test_decode(ns_each: Report, who: str, size: int) -> None:
    frame = masked_frame(text_of(size))
    if who == "hub":
        ns_each(lambda: bench_decode(frame, 100_000))
    elif who == "picows":
        asyncio.run(with_picows(measure_picows_decode(ns_each, frame * BATCH)))
    else:
        ns_each((decode_by_decoder if who == "Decoder" else decode_by_wsproto)(frame * BATCH))


def measure_picows_encode(ns_each: Report, payload: bytes) -> Callable[[Any], None]:
    def measure(protocol: Any) -> None:
        send = protocol.transport.send
        ns_each(lambda: timed(lambda: [send(WSMsgType.TEXT, payload) for _ in range(5_000)], 5_000))

    return measure


def encode_by_wsproto(payload: bytes) -> Loop:
    text = payload.decode()
    protocol = FrameProtocol(client=False, extensions=[])
    return lambda: timed(lambda: [protocol.send_data(text, fin=True) for _ in range(1_000)], 1_000)


@pytest.mark.benchmark(group="frame encode")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", ["hub", "encode_frame", "picows", "wsproto"])
def test_encode(ns_each: Report, who: str, size: int) -> None:
    payload = text_of(size)
    if who == "hub":
        ns_each(lambda: bench_encode(OPCODE_TEXT, payload, 100_000))
    elif who == "encode_frame":
        ns_each(lambda: timed(lambda: [encode_frame(OPCODE_TEXT, payload) for _ in range(5_000)], 5_000))
    elif who == "picows":
        asyncio.run(with_picows(measure_picows_encode(ns_each, payload)))
    else:
        ns_each(encode_by_wsproto(payload))
