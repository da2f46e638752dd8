"""The servers behind a gateway that was given none: a real nats-server and a real PostgreSQL, from wheels.

Owns their start, their end and the data directory they share. Knows nothing of the gateway.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from presence.data_dir import DataDir, Lock
from presence.embedded.nats import Nats
from presence.embedded.postgres import Postgres

__all__ = ["Embedded"]


class Embedded:
    """`async with Embedded(data_dir) as embedded:` gives `nats_url`, `database_url`, `auth_keys_path`, `api_token`.

    A URL is None where that server was not wanted. Starting again over the same directory finds the same data and keys,
    also after a SIGKILL. Must be entered in the main thread. Raises StartError: one line.
    """

    def __init__(self, data_dir: Path, *, nats: bool = True, postgres: bool = True) -> None:
        self.data_dir = DataDir(data_dir)
        self.auth_keys_path = self.data_dir.auth_keys_path
        self.api_token = ""
        self.hurried = False
        self.nats_url: str | None = None
        self.database_url: str | None = None
        self._nats = Nats(self.data_dir.path) if nats else None
        self._postgres = Postgres(self.data_dir.path) if postgres else None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.data_dir.create()
        self._stack.enter_context(Lock(self.data_dir))
        self._stack.push_async_callback(self._stop)
        try:
            self.data_dir.create_keys()
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def hurry(self) -> None:
        """Cuts short whatever time the servers would still get to end; what they have committed is kept."""
        self.hurried = True
        for server in self._servers():
            server.hurry()

    async def _start(self) -> None:
        self.api_token = self.data_dir.api_token()
        # return_exceptions: the other one must have finished starting before it can be stopped.
        for result in await asyncio.gather(*(server.start() for server in self._servers()), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        self.nats_url = self._nats.url if self._nats else None
        self.database_url = self._postgres.url if self._postgres else None

    async def _stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self._servers()))

    def _servers(self) -> list[Nats | Postgres]:
        return [server for server in (self._nats, self._postgres) if server is not None]
