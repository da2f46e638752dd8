"""Session rows: what one caller costs, of 256 and of 4,096 that come at once.

Without a database: what the batcher itself costs a caller, beside a task for each. With one, a real PostgreSQL on this
machine that writes to disk: rows through the gateway's store, each caller with its own answer, beside single INSERTs over ten
connections, and beside COPY, which answers nobody.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uvloop

from conftest import Loop, Report
from presence.embedded import Embedded
from presence.metrics import Metrics
from presence.migrate import migrate
from presence.store import Elsewhere, Store
from presence.store.batch import Batcher

SIZES = [256, 4_096]
CONNECTIONS = 10
INSERT = (
    "INSERT INTO agent_session (agent_id, classroom_id, replica_id, started_at) VALUES ($1, $2, $3, $4) RETURNING id"
)
COLUMNS = ["agent_id", "classroom_id", "replica_id", "started_at"]
EMPTY = "TRUNCATE agent_session"

Rows = Sequence[tuple[str, uuid.UUID]]
WriteAll = Callable[[Rows], Coroutine[Any, Any, object]]


@dataclass(frozen=True)
class Caller:
    key: Hashable
    answer: asyncio.Future[int]

    @property
    def is_wanted(self) -> bool:
        return not self.answer.done()


def fail(batch: list[Caller], error: Exception) -> None:
    raise error


async def settle(batch: list[Caller]) -> None:
    for caller in batch:
        caller.answer.set_result(1)


async def through_batcher(size: int) -> None:
    loop, batcher = asyncio.get_running_loop(), Batcher[Caller](settle, fail)
    callers = [Caller(number, loop.create_future()) for number in range(size)]
    for caller in callers:
        batcher.add(caller)
    await callers[-1].answer
    await batcher.idle()


async def answer() -> int:
    await asyncio.sleep(0)
    return 1


async def task_each(size: int) -> None:
    await asyncio.gather(*(answer() for _ in range(size)))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.mark.benchmark(group="batch of callers")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", ["Batcher", "a task each"])
def test_batcher(ns_each: Report, runner: asyncio.Runner, who: str, size: int) -> None:
    run = through_batcher if who == "Batcher" else task_each

    async def rounds() -> float:
        count = 20_000 // size
        begun_ns = time.perf_counter_ns()
        for _ in range(count):
            await run(size)
        return (time.perf_counter_ns() - begun_ns) / (count * size)

    ns_each(lambda: runner.run(rounds()))


# --- with a database


@pytest.fixture(scope="module")
def database_url(runner: asyncio.Runner) -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="presence-bench-"))
    folder.chmod(0o711)  # PostgreSQL's own user passes through
    embedded = Embedded(folder, nats=False)
    try:
        runner.run(embedded.__aenter__())
        assert embedded.database_url is not None
        runner.run(migrate(embedded.database_url))
        yield embedded.database_url
        runner.run(embedded.__aexit__(None, None, None))
    finally:
        shutil.rmtree(folder)


async def ask_nobody(owner: uuid.UUID, sessions: Sequence[Elsewhere]) -> Sequence[int]:
    return ()


@asynccontextmanager
async def by_store(url: str) -> AsyncIterator[WriteAll]:
    store = await Store.open(
        url, uuid.uuid4(), "bench", on_owned=lambda rows: None, ask_owner=ask_nobody, metrics=Metrics()
    )

    async def write(rows: Rows) -> None:
        await asyncio.gather(*(store.open_session(*row) for row in rows))

    yield write
    await store.close()


@asynccontextmanager
async def by_insert(url: str) -> AsyncIterator[WriteAll]:
    replica_id = uuid.uuid4()
    async with asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:

        async def write_next(rows: Iterator[tuple[str, uuid.UUID]]) -> None:
            async with pool.acquire() as connection:
                for agent_id, classroom_id in rows:
                    await connection.fetchval(INSERT, agent_id, classroom_id, replica_id, datetime.now(UTC))

        async def write(rows: Rows) -> None:
            left = iter(rows)
            await asyncio.gather(*(write_next(left) for _ in range(CONNECTIONS)))

        yield write


@asynccontextmanager
async def by_copy(url: str) -> AsyncIterator[WriteAll]:
    replica_id = uuid.uuid4()
    connection = await asyncpg.connect(url)

    async def write(rows: Rows) -> None:
        now = datetime.now(UTC)
        records = [(agent_id, classroom_id, replica_id, now) for agent_id, classroom_id in rows]
        await connection.copy_records_to_table("agent_session", records=records, columns=COLUMNS)

    yield write
    await connection.close()


BY = {"Store": by_store, "single INSERTs": by_insert, "COPY": by_copy}


@contextmanager
def writing(runner: asyncio.Runner, url: str, who: str, size: int) -> Iterator[Loop]:
    """The rows are removed between two rounds, off the clock; all of them must have been there."""
    opened = BY[who](url)
    rows = [
        (f"web.student-{number}.presence", uuid.uuid5(uuid.NAMESPACE_DNS, str(number // 30))) for number in range(size)
    ]

    async def once(write: WriteAll, table: asyncpg.Connection) -> float:
        begun_ns = time.perf_counter_ns()
        await write(rows)
        took_ns = time.perf_counter_ns() - begun_ns
        assert await table.fetchval("SELECT count(*) FROM agent_session") == size
        await table.execute(EMPTY)
        return took_ns / size

    table = runner.run(asyncpg.connect(url))
    write = runner.run(opened.__aenter__())
    try:
        yield lambda: runner.run(once(write, table))
    finally:
        runner.run(opened.__aexit__(None, None, None))
        runner.run(table.close())


@pytest.mark.benchmark(group="session row")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who", BY)
def test_session_rows(ns_each: Report, runner: asyncio.Runner, database_url: str, who: str, size: int) -> None:
    with writing(runner, database_url, who, size) as loop:
        ns_each(loop)
