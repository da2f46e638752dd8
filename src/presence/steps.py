"""Work under way in tasks: started, remembered until done, and never lost silently. Owns the tasks, not what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from presence.log import get

log = get("steps")


class Steps:
    """One task for each connect, refresh or leave under way: as many as there are connections that change state."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, step: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(step)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("step_failed", limited=True, error=repr(error), exc_info=error)

    async def settled(self) -> None:
        """Return when nothing is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)
