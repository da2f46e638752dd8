"""A real HTTP server on a free local port, whose answers a test decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Reply:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


async def never(_request: Request) -> Reply:
    """An answer that does not come."""
    await asyncio.Event().wait()
    raise AssertionError


@dataclass
class LocalHttp:
    answer: Callable[[Request], Awaitable[Reply]]
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def always(self, reply: Reply) -> None:
        async def answer(_request: Request) -> Reply:
            return reply

        self.answer = answer

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                request = Request(method, path, headers, body)
                self.requests.append(request)
                self.arrived.set()
                await self.send(await self.answer(request), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def send(self, reply: Reply, writer: asyncio.StreamWriter) -> None:
        headers = {"Content-Length": str(len(reply.body))} | reply.headers
        lines = [f"HTTP/1.1 {reply.status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + reply.body)
        await writer.drain()


@asynccontextmanager
async def serving(reply: Reply | Callable[[Request], Awaitable[Reply]]) -> AsyncIterator[LocalHttp]:
    """The server runs inside the block; conversations that are still open end with it."""
    server = LocalHttp(never)
    if isinstance(reply, Reply):
        server.always(reply)
    else:
        server.answer = reply
    conversations: set[asyncio.Task[None]] = set()

    def on_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.add(asyncio.create_task(server.converse(reader, writer)))

    listener = await asyncio.start_server(on_connected, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/path"
    try:
        yield server
    finally:
        listener.close()
        await listener.wait_closed()
        for conversation in conversations:
            conversation.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)


def unused_url() -> str:
    """Where nobody listens: port 1 is privileged and left alone."""
    return "http://127.0.0.1:1/path"
