"""Batches: whatever arrives while one is under way forms the next.

Owns the items that wait and the one task that works on them; an idle batcher owns no task. Knows nothing of SQL.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, Protocol, TypeVar

MAX_BATCH_SIZE: Final = 512


class Item(Protocol):
    """What a batch is made of."""

    @property
    def key(self) -> Hashable:
        """No two items of one batch have the same key: the second waits for the next batch."""

    @property
    def is_wanted(self) -> bool:
        """False: nobody waits for it any more, and it is dropped when its batch is formed."""


T = TypeVar("T", bound=Item)


class Batcher(Generic[T]):
    """Hands what was added, in order, to `run`: one batch at a time, `max_size` items at the most, all keys distinct.

    `run` settles every item of its batch. Should it raise, `on_failed` gets the batch and the error, and the next batch
    goes on.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Awaitable[None]],
        on_failed: Callable[[list[T], Exception], None],
        *,
        max_size: int = MAX_BATCH_SIZE,
    ) -> None:
        self._run = run
        self._on_failed = on_failed
        self._max_size = max_size
        self._waiting: deque[T] = deque()
        self._under_way = 0
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        """How many items wait or are under way."""
        return len(self._waiting) + self._under_way

    def add(self, item: T) -> None:
        """Queue an item; its batch starts in the next turn of the loop, or when the one under way is done."""
        if self._is_closed:
            self._on_failed([item], RuntimeError("closed"))
            return
        self._waiting.append(item)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def idle(self) -> None:
        """Return when nothing waits and nothing is under way."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Stop at once; what waits or is under way fails."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        left = [*self._waiting]
        self._waiting.clear()
        if left:
            self._on_failed(left, RuntimeError("closed"))

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch = self._next_batch()
                if not batch:
                    continue
                self._under_way = len(batch)
                try:
                    await self._run(batch)
                except asyncio.CancelledError:
                    self._on_failed(batch, RuntimeError("closed"))
                    raise
                except Exception as error:
                    self._on_failed(batch, error)
                finally:
                    self._under_way = 0
        finally:
            self._task = None

    def _next_batch(self) -> list[T]:
        waiting = self._waiting
        batch: dict[Hashable, T] = {}
        held_back: list[T] = []
        while waiting and len(batch) < self._max_size:
            item = waiting.popleft()
            if not item.is_wanted:
                continue
            if batch.setdefault(item.key, item) is not item:
                held_back.append(item)
        waiting.extendleft(reversed(held_back))
        return list(batch.values())


async def run_in_parts(
    batch: list[T],
    run: Callable[[list[T]], Awaitable[None]],
    fault_of_one: type[Exception],
    fail: Callable[[T, Exception], None],
) -> None:
    """Run a batch; while it fails with `fault_of_one`, run its halves, until the item at fault has failed alone.

    One bad item among n costs about 2 log2(n) runs. Any other error is raised, and the items not run yet are left.
    """
    parts = [batch]
    while parts:
        part = parts.pop()
        try:
            await run(part)
        except fault_of_one as error:
            if len(part) == 1:
                fail(part[0], error)
            else:
                middle = len(part) // 2
                parts += part[middle:], part[:middle]
