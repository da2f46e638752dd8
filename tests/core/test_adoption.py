"""Adoption from picows: nothing that comes behind the upgrade request is lost, nothing of picows stays, failures are told."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import picows
import pytest

from peers import OPCODE_BINARY, OPCODE_CLOSE, OPCODE_TEXT, TIMEOUT_S, Handler, masked, new_hub
from presence_core.frames import encode_frame
from presence_core.hub import Connection, Hub
from presence_core.upgrade import READ_BUFFER_INIT_BYTES, Upgrade

HEAD = (
    b"GET /ws?x=1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 section 1.3


class Server:
    """picows and a hub on the running loop, listening on a port of its own."""

    def __init__(self, hub: Hub, handler: Handler, port: int) -> None:
        self.hub = hub
        self.handler = handler
        self.port = port
        self.failures: list[Exception] = []
        self.accepted: Callable[[picows.WSUpgradeRequest], Connection] = lambda request: Connection()

    def accept(self, upgrade_request: picows.WSUpgradeRequest) -> Connection:
        return self.accepted(upgrade_request)


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    loop = asyncio.get_running_loop()
    handler = Handler()
    hub = new_hub(handler, max_message_bytes=1 << 20)
    loop.add_reader(hub.fileno(), hub.on_readable)
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(hub, handler, listener.getsockname()[1])
    upgrade = Upgrade(hub, server.accept, server.failures.append)
    picows_server = await picows.ws_create_server(
        lambda request: upgrade,
        sock=listener,
        read_buffer_init_size=READ_BUFFER_INIT_BYTES,
        enable_auto_pong=False,
        logger_name=logging.LoggerAdapter(logging.getLogger("test.picows")),  # type: ignore[arg-type]
    )
    try:
        yield server
    finally:
        loop.remove_reader(hub.fileno())
        hub.close()
        picows_server.close()
        await picows_server.wait_closed()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0)


async def the_end(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other side closes."""
    async with asyncio.timeout(TIMEOUT_S):
        return await reader.read()


def request(padding: int = 0) -> bytes:
    """An upgrade request, longer by that many bytes."""
    return HEAD + (b"X-Padding: " + b"p" * (padding - 13) + b"\r\n" if padding else b"") + b"\r\n"


async def upgraded(server: Server, data: bytes, *pieces: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for piece in (data, *pieces):
        writer.write(piece)
        await writer.drain()
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: " + ACCEPT in answer
    return reader, writer


async def descriptors(server: Server) -> int:
    """How many are open when nobody is connected, and the loop has opened what it opens once."""
    accepted, server.accepted = server.accepted, lambda request: Connection()
    _, writer = await upgraded(server, request())
    writer.close()
    await until(lambda: server.handler.of("on_closed"))
    await writer.wait_closed()
    server.accepted = accepted
    server.handler.calls.clear()
    return len(os.listdir("/proc/self/fd"))


async def test_a_socket_is_adopted_and_speaks() -> None:
    async with serving() as server:
        reader, writer = await upgraded(server, request())
        await until(lambda: server.handler.of("on_open"))
        writer.write(masked(OPCODE_TEXT, b"hello"))
        await until(lambda: server.handler.of("on_message"))
        [(connection, data, opcode)] = server.handler.of("on_message")
        assert (data, opcode) == (b"hello", OPCODE_TEXT)
        connection.send(encode_frame(OPCODE_BINARY, b"back"))
        assert await reader.readexactly(6) == b"\x82\x04back"
        connection.close(4000)
        assert await reader.readexactly(4) == b"\x88\x02" + (4000).to_bytes(2)
        writer.write(masked(OPCODE_CLOSE, (4000).to_bytes(2)))
        assert await reader.read() == b""
        writer.close()
        assert server.failures == []


@pytest.mark.parametrize("padding", [0, 100, 5_000, 15_900])
@pytest.mark.parametrize("behind", [0, 1, 5, 6, 100, 3_000, 4_200, 18_000, 19_500, 20_224, 20_225, 40_000, 100_000])
async def test_no_byte_behind_the_request_is_lost(padding: int, behind: int) -> None:
    """In one write: how much of it picows reads along with the request is up to the kernel."""
    sizes = [behind // 3, behind // 7, 0, behind // 2]
    payloads = [bytes([65 + index]) * size for index, size in enumerate(sizes)]
    stream = b"".join(masked(OPCODE_TEXT, payload) for payload in payloads)[: behind or None]
    whole = masked(OPCODE_TEXT, b"whole message")
    async with serving() as server:
        _, writer = await upgraded(server, request(padding) + whole + stream)
        writer.write(b"".join(masked(OPCODE_TEXT, payload) for payload in payloads)[len(stream) :])
        await until(lambda: len(server.handler.of("on_message")) == 5)
        assert [data for _, data, _ in server.handler.of("on_message")] == [b"whole message", *payloads]
        assert server.handler.names()[:1] == ["on_open"]
        writer.close()


async def test_a_request_that_comes_in_pieces() -> None:
    async with serving() as server:
        data = request(3000) + masked(OPCODE_TEXT, b"first") + masked(OPCODE_TEXT, b"second")
        _, writer = await upgraded(server, data[:50], data[50:2000], data[2000:-9], data[-9:])
        await until(lambda: len(server.handler.of("on_message")) == 2)
        writer.close()


async def test_the_request_reaches_whoever_makes_the_connection() -> None:
    async with serving() as server:
        made: list[tuple[bytes, Connection]] = []

        def accept(upgrade_request: picows.WSUpgradeRequest) -> Connection:
            made.append((upgrade_request.path, Connection()))
            return made[-1][1]

        server.accepted = accept
        _, writer = await upgraded(server, request())
        await until(lambda: server.handler.of("on_open"))
        assert made == [(b"/ws?x=1", server.handler.of("on_open")[0][0])]
        writer.close()


async def test_a_failed_adoption_is_told_and_closes_the_socket() -> None:
    async with serving() as server:

        def refuse(upgrade_request: picows.WSUpgradeRequest) -> Connection:
            raise RuntimeError("refused")

        server.accepted = refuse
        before = await descriptors(server)
        reader, writer = await upgraded(server, request())
        assert await the_end(reader) == b""
        assert [str(error) for error in server.failures] == ["refused"]
        server.accepted = lambda request: adopted
        adopted = Connection()
        _, other_writer = await upgraded(server, request())
        await until(lambda: server.handler.of("on_open"))
        reader, again = await upgraded(server, request())  # the same connection a second time
        assert await the_end(reader) == b""
        assert isinstance(server.failures[1], ValueError)
        server.accepted = lambda request: None  # type: ignore[assignment,return-value]
        reader, nobodys = await upgraded(server, request())
        assert await the_end(reader) == b""
        assert isinstance(server.failures[2], TypeError)
        for one in (writer, other_writer, again, nobodys):
            one.close()
        await until(lambda: len(server.hub) == 0)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_nothing_stays_of_an_upgrade() -> None:
    class Session(Connection):
        __slots__ = ("__weakref__",)

    async with serving() as server:
        made: list[weakref.ref[Session]] = []

        def accept(upgrade_request: picows.WSUpgradeRequest) -> Connection:
            session = Session()
            made.append(weakref.ref(session))
            return session

        server.accepted = accept
        before = await descriptors(server)
        for _ in range(20):
            _, writer = await upgraded(server, request())
            writer.close()
            await writer.wait_closed()
        await until(lambda: len(server.hub) == 0 and len(made) == 20)
        server.handler.calls.clear()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
        gc.collect()
        assert [one() for one in made] == [None] * 20
