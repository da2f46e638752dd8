"""A TCP proxy in front of a real server: it loses answers, cuts connections, refuses new ones, goes silent, records.

Owns its listening socket and the connections through it. Knows nothing of the protocol inside.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65_536


class Proxy:
    """`async with Proxy(port) as proxy:` and connect to `proxy.port` of 127.0.0.1."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        # While true, new connections are closed at once.
        self.refuses = False
        # When it says yes to what a client sends, the server gets that, and its answer is lost with the connection.
        self.loses_answer_to: Callable[[bytes], bool] | None = None
        self.lost_answers = 0
        # All that clients have sent, in order, when recording.
        self.recorded: bytearray | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.silent = False
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def silent(self) -> bool:
        """While true, connections stay open, new ones too, and nothing comes through; it does when this ends."""
        return not self._flowing.is_set()

    @silent.setter
    def silent(self, silent: bool) -> None:
        (self._flowing.clear if silent else self._flowing.set)()

    def cut(self) -> None:
        """Reset every connection that goes through here."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        try:
            if self.refuses:
                return
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            self._writers.add(server_writer)
            with contextlib.suppress(ConnectionError):
                await self._relay(reader, writer, server_reader, server_writer)
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
    ) -> None:
        is_losing = False

        async def up() -> None:
            nonlocal is_losing
            while data := await reader.read(CHUNK_BYTES):
                if self.recorded is not None:
                    self.recorded += data
                if self.loses_answer_to is not None and self.loses_answer_to(data):
                    self.loses_answer_to = None
                    is_losing = True
                await self._flowing.wait()
                server_writer.write(data)
                await server_writer.drain()
            await self._flowing.wait()

        async def down() -> None:
            while data := await server_reader.read(CHUNK_BYTES):
                if is_losing:
                    self.lost_answers += 1
                    return
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
            await self._flowing.wait()

        directions = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            writer.transport.abort()
            server_writer.transport.abort()
            self._writers -= {writer, server_writer}
