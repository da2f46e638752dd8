"""Clients that send what no library would: heads and frames byte by byte, over a real socket.

Owns: how a request head is written, how an answer and a frame are read. Knows nothing of the gateway.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from websockets.frames import Frame, Opcode

from waiting import within

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455 section 1.3
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
UPGRADE: Mapping[str, str] = {
    "Host": "127.0.0.1",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


def head(
    path: str = "/ws",
    headers: Mapping[str, str | None] | None = None,
    *,
    method: str = "GET",
    version: str = "HTTP/1.1",
    more: bytes = b"",
) -> bytes:
    """An upgrade request; a header given as None is left out, `more` are further lines as they are."""
    fields = {**UPGRADE, **(headers or {})}
    lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n" + more + b"\r\n"


def frame(data: bytes | str, opcode: Opcode = Opcode.TEXT, *, fin: bool = True, mask: bool = True) -> bytes:
    payload = data.encode() if isinstance(data, str) else data
    return Frame(opcode, payload, fin).serialize(mask=mask)


@dataclass
class Answer:
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Raw:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await within(self.writer.drain())

    async def say(self, message: Any) -> None:
        await self.send(frame(json.dumps(message)))

    async def answer(self, seconds: float = 5.0) -> Answer:
        lines = (await within(self.reader.readuntil(b"\r\n\r\n"), seconds)).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
        body = await within(self.reader.readexactly(int(headers.get("content-length", "0"))), seconds)
        return Answer(int(lines[0].split(" ")[1]), headers, body)

    async def upgrade(self, behind: bytes = b"", **options: Any) -> Raw:
        """Send a good upgrade request with these bytes behind it, and take the 101."""
        await self.send(head(**options) + behind)
        answer = await self.answer()
        assert (answer.status, answer.headers["sec-websocket-accept"]) == (101, ACCEPT), answer
        return self

    async def frame(self, seconds: float = 5.0) -> tuple[Opcode, bytes]:
        """The next frame of the server: (opcode, payload)."""
        first, size = await within(self.reader.readexactly(2), seconds)
        assert first & 0x80, "the gateway never fragments"
        assert size < 0x80, "a server never masks"
        if size > 125:
            size = int.from_bytes(await within(self.reader.readexactly(2 if size == 126 else 8), seconds), "big")
        return Opcode(first & 0x0F), await within(self.reader.readexactly(size), seconds)

    async def hear(self, seconds: float = 5.0) -> Any:
        """The next message, whatever pings come before it."""
        while True:
            opcode, payload = await self.frame(seconds)
            if opcode is Opcode.TEXT:
                return json.loads(payload)
            assert opcode in (Opcode.PING, Opcode.PONG), (opcode, payload)

    async def refused(self, seconds: float = 5.0) -> tuple[list[dict[str, Any]], int]:
        """What the gateway still says until its close frame, and the code in it; then the end of the stream."""
        messages: list[dict[str, Any]] = []
        while True:
            opcode, payload = await self.frame(seconds)
            if opcode is Opcode.CLOSE:
                await self.send(frame(payload[:2], Opcode.CLOSE))
                assert await self.ended(seconds) == b""
                return messages, int.from_bytes(payload[:2], "big")
            if opcode is Opcode.TEXT:
                messages.append(json.loads(payload))

    async def ended(self, seconds: float = 5.0) -> bytes:
        """What comes until the other side closes; a reset is an end too."""
        try:
            return await within(self.reader.read(), seconds)
        except ConnectionResetError:
            return b""

    def abort(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def dialled(port: int, count: int = 1) -> AsyncIterator[list[Raw]]:
    """So many connections to a port of 127.0.0.1, gone in the end."""
    sockets: list[Raw] = []
    try:
        for _ in range(count):
            sockets.append(Raw(*await within(asyncio.open_connection("127.0.0.1", port))))
        yield sockets
    finally:
        for socket in sockets:
            socket.abort()
