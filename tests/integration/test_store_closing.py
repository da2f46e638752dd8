"""How sessions close, against a real PostgreSQL: fenced, told first, never lost."""

import asyncio
import uuid
from datetime import timedelta

import pytest
from store_kit import ROOM, NewReplica, Replica, Tables, ask_nobody, now

from presence.errors import SessionError, Unavailable
from presence.metrics import Metrics
from presence.store import ClosedSession, Store
from servers import PostgresDatabase
from waiting import within


async def test_a_close_moves_the_row_to_history(replica: Replica, tables: Tables) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    ended_at = opened.started_at + timedelta(minutes=5)
    assert await replica.store.close_session(opened.session_id, "pong_timed_out", ended_at)
    assert await tables.sessions() == []
    [past] = await tables.history()
    assert (past["id"], past["agent_id"], past["classroom_id"]) == (opened.session_id, "web.alice.aud", ROOM)
    assert (past["lifetime"].lower, past["lifetime"].upper) == (opened.started_at, ended_at)
    assert past["reason"] == "pong_timed_out"
    assert replica.told == [
        ClosedSession(opened.session_id, "web.alice.aud", ROOM, opened.started_at, ended_at, "pong_timed_out")
    ]


async def test_an_end_before_the_start_is_the_start(replica: Replica, tables: Tables) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    assert await replica.store.close_session(opened.session_id, "lost", opened.started_at - timedelta(hours=1))
    [past] = await tables.history()
    assert not past["lifetime"].isempty
    assert past["lifetime"].lower == past["lifetime"].upper == opened.started_at
    assert replica.told[0].ended_at == opened.started_at


async def test_a_second_close_changes_nothing(replica: Replica, tables: Tables) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    answers = await asyncio.gather(
        *(replica.store.close_session(opened.session_id, reason, now()) for reason in ("closed", "lost", "removed"))
    )
    assert answers == [True, False, False]
    assert not await replica.store.close_session(opened.session_id, "lost", now())
    assert [row["reason"] for row in await tables.history()] == ["closed"]
    assert len(replica.told) == 1


async def test_a_close_by_a_replica_that_lost_the_row_changes_and_tells_nothing(
    new_replica: NewReplica, tables: Tables
) -> None:
    old, new = await new_replica(), await new_replica()
    first = await old.store.open_session("web.alice.aud", ROOM)
    second = await new.store.open_session("web.alice.aud", ROOM)
    assert not await old.store.close_session(first.session_id, "lost", now())
    assert not await old.store.close_session(second.session_id, "lost", now())
    assert [row["id"] for row in await tables.sessions()] == [second.session_id]
    assert [row["reason"] for row in await tables.history()] == ["replaced"]
    assert old.told == new.told == []


async def test_the_others_are_told_before_history_shows_it(postgres: PostgresDatabase, database_url: str) -> None:
    seen = []

    def on_owned(rows: object) -> None:
        seen.append(postgres.psql("SELECT count(*) FROM agent_session_history", database_url))

    store = await Store.open(
        database_url, uuid.uuid4(), "test", on_owned=on_owned, ask_owner=ask_nobody, metrics=Metrics()
    )
    try:
        opened = await store.open_session("web.alice.aud", ROOM)
        assert await store.close_session(opened.session_id, "closed", now())
        assert seen == ["0"]
        assert postgres.psql("SELECT count(*) FROM agent_session_history", database_url) == "1"
    finally:
        await store.close()


async def test_a_leave_that_was_proven_is_not_told_again(database_url: str, tables: Tables) -> None:
    told: list[ClosedSession] = []
    attempts = 0

    async def confirm() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:  # the COMMIT that follows fails
            await tables.connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND state = 'idle in transaction'"
            )
        elif attempts == 2:
            raise Unavailable("NATS is away")

    store = await Store.open(
        database_url,
        uuid.uuid4(),
        "test",
        on_owned=told.extend,
        ask_owner=ask_nobody,
        metrics=Metrics(),
        confirm=confirm,
    )
    try:
        opened = await store.open_session("web.alice.aud", ROOM)
        assert await within(store.close_session(opened.session_id, "closed", now()))
        assert attempts == 3
        assert [each.session_id for each in told] == [opened.session_id]
    finally:
        await store.close()


async def test_a_fault_in_on_owned_does_not_keep_rows_from_history(database_url: str, tables: Tables) -> None:
    def on_owned(rows: object) -> None:
        raise ValueError("a fault")

    store = await Store.open(
        database_url, uuid.uuid4(), "test", on_owned=on_owned, ask_owner=ask_nobody, metrics=Metrics()
    )
    try:
        opened = await store.open_session("web.alice.aud", ROOM)
        assert await within(store.close_session(opened.session_id, "closed", now()))
        assert len(await tables.history()) == 1
    finally:
        await store.close()


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1])
async def test_a_bad_close_fails_for_its_caller_alone(replica: Replica, tables: Tables, bad: int) -> None:
    opened = [await replica.store.open_session(f"web.agent-{number}.aud", ROOM) for number in range(20)]
    ids = [each.session_id for each in opened]
    ids[13] = bad
    answers = await asyncio.gather(
        *(replica.store.close_session(each, "closed", now()) for each in ids), return_exceptions=True
    )
    assert isinstance(answers.pop(13), SessionError)
    assert answers == [True] * 19
    assert len(await tables.sessions()) == 1
    assert replica.store.queued_closes == 0


async def test_close_later_is_written_too(replica: Replica, tables: Tables) -> None:
    opened = [await replica.store.open_session(f"web.agent-{number}.aud", ROOM) for number in range(3)]
    for each in opened:
        replica.store.close_later(each.session_id, "closed", now())
    assert await replica.store.flush(5)
    assert len(await tables.history()) == 3


async def test_a_cancelled_close_goes_on(replica: Replica, tables: Tables) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    closing = asyncio.create_task(replica.store.close_session(opened.session_id, "closed", now()))
    await asyncio.sleep(0)
    closing.cancel()
    assert await replica.store.flush(5)
    assert len(await tables.history()) == 1


async def test_a_row_that_is_locked_elsewhere_delays_no_other(replica: Replica, tables: Tables) -> None:
    first, second = [await replica.store.open_session(f"web.{name}.aud", ROOM) for name in ("alice", "bob")]
    async with tables.connection.transaction():
        await tables.connection.execute("SELECT FROM agent_session WHERE id = $1 FOR UPDATE", first.session_id)
        waiting = asyncio.create_task(replica.store.close_session(first.session_id, "closed", now()))
        assert await within(replica.store.close_session(second.session_id, "closed", now()), 2)
        third = await replica.store.open_session("web.carol.aud", ROOM)
        assert await within(replica.store.close_session(third.session_id, "closed", now()), 2)
        assert not waiting.done()
    assert await within(waiting)
    assert [close.session_id for close in replica.told] == [second.session_id, third.session_id, first.session_id]
    assert len(await tables.history()) == 3
