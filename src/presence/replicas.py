"""This replica's lease: a row that says it lives, renewed while it does.

Owns when the lease is renewed. Knows nothing of agents or SQL.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from presence.errors import SessionError
from presence.log import get

if TYPE_CHECKING:
    from presence.config import Settings
    from presence.store import Store

log = get("replicas")

RENEWALS_PER_TTL: Final = 3  # two may fail before the lease runs out


class Lease:
    def __init__(self, settings: Settings, store: Store) -> None:
        self._interval_s = settings.lease_ttl_s / RENEWALS_PER_TTL
        self._store = store
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._store.heartbeat()
            except SessionError as error:
                log.warning("lease_not_renewed", limited=True, error=error.title)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
