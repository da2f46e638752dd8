"""Batches alone: order, size, distinct keys, faults, and the end."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from presence.store.batch import Batcher, run_in_parts
from waiting import eventually, within


@dataclass(eq=False)
class Item:
    key: object
    is_wanted: bool = True


@dataclass
class Runs:
    """Records batches, and holds each back until it is let go."""

    batches: list[list[Item]] = field(default_factory=list)
    failed: list[Item] = field(default_factory=list)
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def run(self, batch: list[Item]) -> None:
        self.batches.append(batch)
        await self.gate.acquire()

    def on_failed(self, batch: list[Item], error: Exception) -> None:
        self.failed += batch


@pytest.fixture
async def runs() -> Runs:
    return Runs()


@pytest.fixture
async def batcher(runs: Runs) -> AsyncIterator[Batcher[Item]]:
    batcher = Batcher(runs.run, runs.on_failed, max_size=3)
    yield batcher
    await batcher.close()


async def test_what_arrives_while_a_batch_is_under_way_forms_the_next(batcher: Batcher[Item], runs: Runs) -> None:
    items = [Item(number) for number in range(6)]
    batcher.add(items[0])
    batcher.add(items[1])
    await eventually(lambda: runs.batches)
    for item in items[2:]:
        batcher.add(item)
    assert runs.batches == [items[:2]]
    assert len(batcher) == 6
    runs.gate.release()
    await eventually(lambda: len(runs.batches) == 2)
    assert runs.batches[1] == items[2:5]
    for _ in range(2):
        runs.gate.release()
    await within(batcher.idle())
    assert runs.batches[2] == items[5:]
    assert len(batcher) == 0


async def test_a_key_is_once_in_a_batch(batcher: Batcher[Item], runs: Runs) -> None:
    a1, a2, b, a3 = Item("a"), Item("a"), Item("b"), Item("a")
    for item in (a1, a2, b, a3):
        batcher.add(item)
    for _ in range(3):
        runs.gate.release()
    await within(batcher.idle())
    assert runs.batches == [[a1, b], [a2], [a3]]


async def test_items_nobody_wants_any_more_are_dropped(batcher: Batcher[Item], runs: Runs) -> None:
    gone, there = Item("a"), Item("a")
    batcher.add(gone)
    batcher.add(there)
    gone.is_wanted = False
    runs.gate.release()
    await within(batcher.idle())
    assert runs.batches == [[there]]


async def test_a_failing_batch_does_not_stop_the_next() -> None:
    failed: list[Item] = []
    seen: list[Item] = []

    async def run(batch: list[Item]) -> None:
        if batch[0].key == "bad":
            raise ValueError("no")
        seen.extend(batch)

    batcher: Batcher[Item] = Batcher(run, lambda batch, error: failed.extend(batch), max_size=1)
    bad, good = Item("bad"), Item("good")
    batcher.add(bad)
    batcher.add(good)
    await within(batcher.idle())
    assert (failed, seen) == ([bad], [good])


async def test_close_fails_what_waits_and_what_is_under_way(batcher: Batcher[Item], runs: Runs) -> None:
    items = [Item(number) for number in range(5)]
    for item in items:
        batcher.add(item)
    await eventually(lambda: runs.batches)
    await within(batcher.close())
    late = Item("late")
    batcher.add(late)
    assert runs.failed == [*items, late]


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_only_the_items_at_fault_fail(good: list[bool]) -> None:
    items = [Item(is_good) for is_good in good]
    done: list[Item] = []
    failed: list[Item] = []
    runs = 0

    async def run(part: list[Item]) -> None:
        nonlocal runs
        runs += 1
        if not all(item.key for item in part):
            raise ValueError
        done.extend(part)

    asyncio.run(run_in_parts(items, run, ValueError, lambda item, error: failed.append(item)))
    assert done == [item for item in items if item.key]
    assert failed == [item for item in items if not item.key]
    assert runs <= 1 + 2 * len(failed) * max(1, len(items).bit_length())


async def test_other_errors_are_raised() -> None:
    async def run(part: list[Item]) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await run_in_parts([Item(1)], run, ValueError, lambda item, error: None)
