"""The benchmarks' client: what it says when a server does not do what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from presence_core.frames import OPCODE_TEXT, encode_frame

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from clients import Crowd

UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
EVENT = b"x" * 10

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(UPGRADED)


@contextlib.asynccontextmanager
async def crowd_of(script: Script, sockets: int) -> AsyncIterator[Crowd]:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await script(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        with Crowd(server.sockets[0].getsockname()[1], sockets) as crowd:
            crowd.add_sockets(sockets)
            yield crowd
    finally:
        server.close()
        for writer in writers:
            writer.close()


def telling(events: int) -> Script:
    """Each is sent so many events when it says something."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        if await reader.read(1024):
            writer.write(encode_frame(OPCODE_TEXT, EVENT) * events)

    return script


async def test_what_was_measured_is_what_came() -> None:
    async with crowd_of(telling(20), 3) as crowd:
        opened = await asyncio.to_thread(lambda: crowd.connect(in_flight=2, count=2))
        assert (opened.count, opened.latencies.count) == (2, 2)
        assert 0 < opened.took_s < 60
        assert opened.rate == pytest.approx(2 / opened.took_s)
        assert (await asyncio.to_thread(lambda: crowd.connect(in_flight=2))).count == 1
        assert (await asyncio.to_thread(lambda: crowd.connect(in_flight=2))).count == 0
        heard = await asyncio.to_thread(lambda: crowd.hear(b"go", 20, len(EVENT)))
        assert heard.count == 20
        assert 0 < heard.took_s < 60


async def test_one_who_is_refused_ends_the_measurement() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")

    async with crowd_of(script, 2) as crowd:
        with pytest.raises(ConnectionError, match="refused"):
            await asyncio.to_thread(lambda: crowd.connect(in_flight=2))


async def test_one_who_is_lost_ends_the_measurement() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        await reader.read(1024)
        writer.close()

    async with crowd_of(script, 2) as crowd:
        await asyncio.to_thread(lambda: crowd.connect(in_flight=2))
        with pytest.raises(ConnectionError, match="1006"):
            await asyncio.to_thread(lambda: crowd.hear(b"go", 20, len(EVENT)))


async def test_too_much_and_too_little_are_no_measurement() -> None:
    async with crowd_of(telling(20), 1) as crowd:
        await asyncio.to_thread(lambda: crowd.connect(in_flight=1))
        with pytest.raises(AssertionError, match="10 bytes too many"):
            await asyncio.to_thread(lambda: crowd.hear(b"go", 19, len(EVENT)))
    async with crowd_of(telling(20), 1) as crowd:
        await asyncio.to_thread(lambda: crowd.connect(in_flight=1))
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(lambda: crowd.hear(b"go", 21, len(EVENT), timeout_s=0.3))


async def test_connects_that_are_not_answered_end_it_too() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with crowd_of(script, 1) as crowd:
        with pytest.raises(TimeoutError, match="upgrading"):
            await asyncio.to_thread(lambda: crowd.connect(in_flight=1, timeout_s=0.3))
