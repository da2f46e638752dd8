"""The store against a real PostgreSQL: what its answers mean, and who owns which row."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest
from store_kit import NewReplica, Replica, Tables, ask_nobody, now, replica_of, tables_of

from presence import reasons
from presence.errors import SessionError, StartError, Unavailable
from presence.metrics import Metrics
from presence.store import ClosedSession, LetGo, SessionRow, Store
from servers import PostgresDatabase, free_port
from waiting import eventually, within

ROOM = uuid.UUID("aaaaaaaa-0000-4000-8000-000000000001")


@pytest.fixture
async def tables(database_url: str) -> AsyncIterator[Tables]:
    async with tables_of(database_url) as tables:
        yield tables


@pytest.fixture
async def new_replica(database_url: str) -> AsyncIterator[NewReplica]:
    async with AsyncExitStack() as stack:

        async def make() -> Replica:
            return await stack.enter_async_context(replica_of(database_url))

        yield make


@pytest.fixture
async def replica(new_replica: NewReplica) -> Replica:
    return await new_replica()


# --- open


async def test_the_first_open_creates_a_row(replica: Replica, tables: Tables) -> None:
    before = now()
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    assert opened.outcome == "created"
    assert before <= opened.started_at <= now()
    [row] = await tables.sessions()
    assert dict(row) == {
        "id": opened.session_id,
        "agent_id": "web.alice.aud",
        "classroom_id": ROOM,
        "replica_id": replica.id,
        "started_at": opened.started_at,
    }


async def test_a_second_open_on_the_same_replica_keeps_the_session(replica: Replica, tables: Tables) -> None:
    first = await replica.store.open_session("web.alice.aud", ROOM)
    second = await replica.store.open_session("web.alice.aud", ROOM)
    assert second.outcome == "kept"
    assert (second.session_id, second.started_at) == (first.session_id, first.started_at)
    assert len(await tables.sessions()) == 1
    assert await tables.history() == []


async def test_an_open_on_another_replica_takes_over(new_replica: NewReplica, tables: Tables) -> None:
    old, new = await new_replica(), await new_replica()
    first = await old.store.open_session("web.alice.aud", ROOM)
    second = await new.store.open_session("web.alice.aud", ROOM)
    assert second.outcome == "taken_over"
    assert second.session_id > first.session_id
    [row] = await tables.sessions()
    assert (row["id"], row["replica_id"], row["started_at"]) == (second.session_id, new.id, second.started_at)
    [past] = await tables.history()
    assert (past["id"], past["agent_id"], past["classroom_id"]) == (first.session_id, "web.alice.aud", ROOM)
    assert (past["lifetime"].lower, past["lifetime"].upper) == (first.started_at, second.started_at)
    assert past["reason"] == "replaced"
    # Silent to the others, on both sides.
    assert old.told == new.told == []


async def test_the_owner_is_asked_before_a_session_is_taken_over(new_replica: NewReplica, tables: Tables) -> None:
    old, new = await new_replica(), await new_replica()
    agents = [f"web.agent-{number}.aud" for number in range(100)]
    firsts = await asyncio.gather(*(old.store.open_session(agent, ROOM) for agent in agents))
    await asyncio.gather(*(new.store.open_session(agent, ROOM) for agent in agents))
    assert {owner for owner, _ in new.asked} == {old.id}
    assert sorted(session_id for _, ids in new.asked for session_id in ids) == sorted(
        each.session_id for each in firsts
    )
    assert old.asked == []
    assert {row["replica_id"] for row in await tables.sessions()} == {new.id}


async def test_a_session_is_not_taken_from_an_owner_that_was_not_asked(
    database_url: str, new_replica: NewReplica, tables: Tables
) -> None:
    old, middle = await new_replica(), await new_replica()
    async with replica_of(database_url) as new:

        async def moves_on_while_it_is_asked(owner: uuid.UUID, sessions: object) -> LetGo:
            new.asked.append((owner, []))
            if owner == old.id:
                await middle.store.open_session("web.alice.aud", ROOM)
            return LetGo()

        new.store._openings._ask_owner = moves_on_while_it_is_asked
        await old.store.open_session("web.alice.aud", ROOM)
        opened = await within(new.store.open_session("web.alice.aud", ROOM))
        assert [owner for owner, _ in new.asked] == [old.id, middle.id]
        assert [row["id"] for row in await tables.sessions()] == [opened.session_id]
        assert [row["reason"] for row in await tables.history()] == ["replaced", "replaced"]


async def test_an_owner_that_does_not_answer_delays_only_its_own(database_url: str, new_replica: NewReplica) -> None:
    frozen, old = await new_replica(), await new_replica()
    async with replica_of(database_url) as new:
        answered = asyncio.Event()

        async def ask(owner: uuid.UUID, sessions: object) -> LetGo:
            if owner == frozen.id:
                await answered.wait()
            return LetGo()

        new.store._openings._ask_owner = ask
        await frozen.store.open_session("web.alice.aud", ROOM)
        await old.store.open_session("web.bob.aud", ROOM)
        waiting = asyncio.create_task(new.store.open_session("web.alice.aud", ROOM))
        await within(new.store.open_session("web.bob.aud", ROOM))
        assert not waiting.done()
        answered.set()
        assert (await within(waiting)).outcome == "taken_over"


# --- leases


def expire(url: str, replica: Replica, postgres: PostgresDatabase, seconds: float = 60) -> None:
    """As if its last heartbeat were that long ago."""
    postgres.psql(f"UPDATE replica SET heartbeat_at = now() - interval '{seconds} s' WHERE id = '{replica.id}'", url)


async def test_a_dead_replicas_sessions_end_at_its_last_heartbeat(
    new_replica: NewReplica, tables: Tables, postgres: PostgresDatabase, database_url: str
) -> None:
    dead, alive = await new_replica(), await new_replica()
    opened = [await dead.store.open_session(f"web.agent-{number}.aud", ROOM) for number in range(3)]
    kept = await alive.store.open_session("web.kept.aud", ROOM)
    assert await alive.store.sweep(15) is None
    postgres.psql("UPDATE agent_session SET started_at = now() - interval '2 minutes'", database_url)
    expire(database_url, dead, postgres)
    assert await alive.store.sweep(15) == (dead.id, 3)
    history = await tables.history()
    assert [row["id"] for row in history] == [each.session_id for each in opened]
    assert {row["reason"] for row in history} == {"replica_lost"}
    assert all(50 < (now() - row["lifetime"].upper).total_seconds() < 70 for row in history)
    assert {row.session_id for row in alive.told} == {each.session_id for each in opened}
    assert [row["id"] for row in await tables.sessions()] == [kept.session_id]
    assert await alive.store.sweep(15) is None
    assert not await dead.store.heartbeat()


async def test_of_many_survivors_one_sweeps(
    new_replica: NewReplica, tables: Tables, postgres: PostgresDatabase, database_url: str
) -> None:
    dead, *alive = [await new_replica() for _ in range(5)]
    agents = [f"web.agent-{number}.aud" for number in range(500)]
    await asyncio.gather(*(dead.store.open_session(agent, ROOM) for agent in agents))
    expire(database_url, dead, postgres)
    swept = await asyncio.gather(*(replica.store.sweep(15) for replica in alive for _ in range(3)))
    assert sorted(count for each in swept if each is not None for count in [each[1]]) == [500]
    told = [row.agent_id for replica in alive for row in replica.told]
    assert sorted(told) == sorted(agents)
    assert len(await tables.history()) == 500


async def test_a_swept_replica_writes_nothing_in_its_old_name(
    new_replica: NewReplica, tables: Tables, postgres: PostgresDatabase, database_url: str
) -> None:
    woken, alive = await new_replica(), await new_replica()
    mine = await woken.store.open_session("web.alice.aud", ROOM)
    theirs = await alive.store.open_session("web.bob.aud", ROOM)
    expire(database_url, woken, postgres)
    assert await alive.store.sweep(15) == (woken.id, 1)
    for agent in ("web.alice.aud", "web.bob.aud", "web.new.aud"):
        with pytest.raises(Unavailable):
            await woken.store.open_session(agent, ROOM)
    assert woken.store.swept.is_set()
    assert not await woken.store.close_session(mine.session_id, "closed", now())
    assert [row["id"] for row in await tables.sessions()] == [theirs.session_id]
    assert len(await tables.history()) == 1
    assert woken.told == []


async def test_it_goes_on_under_a_new_identity(
    new_replica: NewReplica, tables: Tables, postgres: PostgresDatabase, database_url: str
) -> None:
    woken, alive = await new_replica(), await new_replica()
    for agent in ("web.alice.aud", "web.bob.aud"):
        await woken.store.open_session(agent, ROOM)
    expire(database_url, woken, postgres)
    await alive.store.sweep(15)
    taken = await alive.store.open_session("web.bob.aud", ROOM)
    anew = uuid.uuid4()
    await woken.store.begin_anew(anew)
    assert not woken.store.swept.is_set()
    restored = await woken.store.restore_session("web.alice.aud", ROOM)
    assert restored is not None
    assert restored.outcome == "created"
    assert await woken.store.restore_session("web.bob.aud", ROOM) is None  # it is elsewhere by now
    owners = {row["id"]: row["replica_id"] for row in await tables.sessions()}
    assert owners == {taken.session_id: alive.id, restored.session_id: anew}
    assert [row.session_id for row in await woken.store.owned()] == [restored.session_id]
    assert await woken.store.heartbeat()


async def test_when_the_next_lease_runs_out(
    new_replica: NewReplica, postgres: PostgresDatabase, database_url: str
) -> None:
    one = await new_replica()
    assert await one.store.next_expiry_s(15) is None
    two = await new_replica()
    left = await one.store.next_expiry_s(15)
    assert left is not None
    assert 14 < left <= 15
    expire(database_url, two, postgres, 10)
    left = await one.store.next_expiry_s(15)
    assert left is not None
    assert 4 < left <= 5


async def test_one_agent_may_be_in_many_classrooms(replica: Replica) -> None:
    rooms = [uuid.uuid4() for _ in range(20)]
    opened = await asyncio.gather(*(replica.store.open_session("web.alice.aud", room) for room in rooms))
    assert {each.outcome for each in opened} == {"created"}
    assert len({each.session_id for each in opened}) == 20


async def test_a_thousand_at_once_each_get_their_own(replica: Replica, tables: Tables) -> None:
    agents = [f"web.agent-{number}.aud" for number in range(1500)]
    opened = await asyncio.gather(*(replica.store.open_session(agent, ROOM) for agent in agents))
    rows = {row["agent_id"]: row["id"] for row in await tables.sessions()}
    assert rows == {agent: each.session_id for agent, each in zip(agents, opened, strict=True)}


async def test_the_same_key_many_times_at_once_is_one_session(replica: Replica, tables: Tables) -> None:
    opened = await asyncio.gather(*(replica.store.open_session("web.alice.aud", ROOM) for _ in range(50)))
    assert Counter(each.outcome for each in opened) == {"created": 1, "kept": 49}
    assert len({each.session_id for each in opened}) == 1
    assert len(await tables.sessions()) == 1


@pytest.mark.parametrize("bad", ["web.nul\0.aud", "web.\ud800.aud"])
async def test_a_bad_row_fails_for_its_caller_alone(replica: Replica, tables: Tables, bad: str) -> None:
    agents = [f"web.agent-{number}.aud" for number in range(300)]
    agents[137] = bad
    answers = await asyncio.gather(
        *(replica.store.open_session(agent, ROOM) for agent in agents), return_exceptions=True
    )
    error = answers.pop(137)
    assert isinstance(error, SessionError)
    assert error.reason is reasons.INTERNAL_ERROR
    assert {answer.outcome for answer in answers if not isinstance(answer, BaseException)} == {"created"}
    assert len(await tables.sessions()) == 299
    assert replica.store.healthy


async def test_replicas_that_race_for_the_same_agents_leave_one_row_each(
    new_replica: NewReplica, tables: Tables
) -> None:
    replicas = [await new_replica() for _ in range(3)]
    agents = [f"web.agent-{number}.aud" for number in range(150)]
    chance = random.Random(7)

    async def storm(replica: Replica) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for _ in range(4):
            order = chance.sample(agents, len(agents))
            opened = await asyncio.gather(*(replica.store.open_session(agent, ROOM) for agent in order))
            outcomes.update(each.outcome for each in opened)
        return outcomes

    outcomes = sum(await within(asyncio.gather(*map(storm, replicas)), 60), Counter[str]())
    assert outcomes["created"] == len(agents)
    assert outcomes.total() == 3 * 4 * len(agents)
    assert len(await tables.sessions()) == len(agents)
    past = await tables.history()
    assert len(past) == outcomes["taken_over"]
    assert all(row["reason"] == "replaced" for row in past)


async def test_opens_and_closes_of_many_replicas_at_once_stay_consistent(
    new_replica: NewReplica, tables: Tables
) -> None:
    replicas = [await new_replica() for _ in range(3)]
    agents = [f"web.agent-{number}.aud" for number in range(40)]
    chance = random.Random(11)

    async def live(replica: Replica) -> tuple[int, int]:
        made = closed = 0
        for _ in range(6):
            order = chance.sample(agents, len(agents))
            opened = await asyncio.gather(*(replica.store.open_session(agent, ROOM) for agent in order))
            made += sum(each.outcome != "kept" for each in opened)
            answers = await asyncio.gather(
                *(replica.store.close_session(each.session_id, "closed", now()) for each in opened[::2])
            )
            closed += sum(answers)
        return made, closed

    results = await within(asyncio.gather(*map(live, replicas)), 60)
    made = sum(each[0] for each in results)
    closed = sum(each[1] for each in results)
    left, past = await tables.sessions(), await tables.history()
    assert made == len(left) + len(past)
    assert closed == sum(row["reason"] == "closed" for row in past) == sum(len(r.told) for r in replicas)


# --- close


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


# --- opens and closes that meet


async def test_an_open_behind_a_queued_close_is_a_new_session(replica: Replica, tables: Tables) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    closing, opening = await asyncio.gather(
        replica.store.close_session(opened.session_id, "closed", now()),
        replica.store.open_session("web.alice.aud", ROOM),
    )
    assert closing
    assert opening.outcome == "created"
    assert opening.session_id != opened.session_id
    assert [row["id"] for row in await tables.sessions()] == [opening.session_id]


async def test_an_open_waits_for_the_close_of_its_row(replica: Replica, tables: Tables, database_url: str) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    async with tables_of(database_url) as locker:
        async with locker.connection.transaction():
            await locker.connection.execute("SELECT FROM agent_session_history")
            await locker.connection.execute("LOCK TABLE agent_session_history IN SHARE MODE")
            closing = asyncio.create_task(replica.store.close_session(opened.session_id, "closed", now()))
            await eventually(tables.waiting_for_locks)
            opening = asyncio.create_task(replica.store.open_session("web.alice.aud", ROOM))
            await within(replica.store.open_session("web.bob.aud", uuid.uuid4()))  # others go on
            assert not opening.done()
        assert await within(closing)
        assert (await within(opening)).outcome == "created"


async def test_a_row_locked_elsewhere_delays_no_other(
    new_replica: NewReplica, tables: Tables, database_url: str
) -> None:
    old, new = await new_replica(), await new_replica()
    first = await old.store.open_session("web.alice.aud", ROOM)
    async with tables_of(database_url) as locker:
        async with locker.connection.transaction():
            await locker.connection.execute("SELECT FROM agent_session WHERE id = $1 FOR UPDATE", first.session_id)
            waiting = asyncio.create_task(new.store.open_session("web.alice.aud", ROOM))
            await eventually(tables.waiting_for_locks)
            assert (await within(new.store.open_session("web.bob.aud", ROOM))).outcome == "created"
            assert not waiting.done()
        assert (await within(waiting)).outcome == "taken_over"


async def test_a_row_that_vanishes_while_it_is_taken_over_is_made_anew(
    new_replica: NewReplica, tables: Tables, database_url: str
) -> None:
    old, new = await new_replica(), await new_replica()
    first = await old.store.open_session("web.alice.aud", ROOM)
    async with tables_of(database_url) as locker:
        async with locker.connection.transaction():
            await locker.connection.execute("SELECT FROM agent_session WHERE id = $1 FOR UPDATE", first.session_id)
            waiting = asyncio.create_task(new.store.open_session("web.alice.aud", ROOM))
            await eventually(tables.waiting_for_locks)
            await locker.connection.execute("DELETE FROM agent_session WHERE id = $1", first.session_id)
        opened = await within(waiting)
    assert opened.outcome == "created"
    assert [row["id"] for row in await tables.sessions()] == [opened.session_id]
    assert await tables.history() == []


# --- callers that go away


async def test_a_caller_cancelled_before_its_batch_leaves_nothing(replica: Replica, tables: Tables) -> None:
    opening = asyncio.create_task(replica.store.open_session("web.alice.aud", ROOM))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening])
    await replica.store.open_session("web.bob.aud", ROOM)
    assert [row["agent_id"] for row in await tables.sessions()] == ["web.bob.aud"]
    assert await tables.history() == []


async def test_a_caller_cancelled_in_its_batch_leaves_no_row(
    replica: Replica, tables: Tables, database_url: str
) -> None:
    async with tables_of(database_url) as locker, locker.connection.transaction():
        await locker.connection.execute("LOCK TABLE agent_session IN SHARE MODE")
        opening = asyncio.create_task(replica.store.open_session("web.alice.aud", ROOM))
        await eventually(tables.waiting_for_locks)
        opening.cancel()
        await asyncio.wait([opening])
    await eventually(lambda: tables.history(reason="lost"))
    assert await tables.sessions() == []
    # Nobody had heard of it.
    assert replica.told == []


async def test_a_caller_cancelled_with_the_answer_in_its_hands_leaves_no_row(replica: Replica, tables: Tables) -> None:
    # Cancel at every turn of the loop that an open takes.
    for turns in range(200):
        opening = asyncio.create_task(replica.store.open_session("web.alice.aud", ROOM))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = opening.done()
        opening.cancel()
        [answer] = await asyncio.gather(opening, return_exceptions=True)
        if not isinstance(answer, BaseException):
            await replica.store.close_session(answer.session_id, "closed", now())
        await eventually(lambda: replica.store.queued_closes == 0)
        if was_done:
            break
    await eventually(lambda: _is_empty(tables))


async def _is_empty(tables: Tables) -> bool:
    return await tables.sessions() == []


async def test_a_cancelled_take_over_tells_of_the_leave(
    new_replica: NewReplica, tables: Tables, database_url: str
) -> None:
    old, new = await new_replica(), await new_replica()
    first = await old.store.open_session("web.alice.aud", ROOM)
    async with tables_of(database_url) as locker, locker.connection.transaction():
        await locker.connection.execute("SELECT FROM agent_session WHERE id = $1 FOR UPDATE", first.session_id)
        opening = asyncio.create_task(new.store.open_session("web.alice.aud", ROOM))
        await eventually(tables.waiting_for_locks)
        opening.cancel()
        await asyncio.wait([opening])
    await eventually(lambda: tables.history(reason="lost"))
    assert await tables.sessions() == []
    # The others still have the agent in their rosters, from the session that was taken over.
    assert [row.agent_id for row in new.told] == ["web.alice.aud"]


async def test_a_cancelled_caller_does_not_close_a_session_that_was_there(
    replica: Replica, tables: Tables, database_url: str
) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    async with tables_of(database_url) as locker, locker.connection.transaction():
        await locker.connection.execute("LOCK TABLE agent_session IN ACCESS EXCLUSIVE MODE")
        again = asyncio.create_task(replica.store.open_session("web.alice.aud", ROOM))
        await eventually(tables.waiting_for_locks)
        again.cancel()
        await asyncio.wait([again])
    await replica.store.open_session("web.alice.aud", ROOM)
    assert await replica.store.flush(5)
    assert [row["id"] for row in await tables.sessions()] == [opened.session_id]


# --- reads


async def test_agents_are_listed_by_id_in_pages(replica: Replica) -> None:
    opened = [await replica.store.open_session(f"web.agent-{number}.aud", ROOM) for number in range(5)]
    await replica.store.open_session("web.alice.aud", uuid.uuid4())
    ids = [each.session_id for each in opened]
    rows = await replica.store.agents(ROOM)
    assert [row.session_id for row in rows] == ids
    assert rows[0] == SessionRow(ids[0], "web.agent-0.aud", ROOM, replica.id, opened[0].started_at)
    assert [row.session_id for row in await replica.store.agents(ROOM, ids[1], 2)] == ids[2:4]
    assert await replica.store.agents(ROOM, ids[-1]) == []
    assert await replica.store.agents(ROOM, 0, 0) == []
    assert await replica.store.agents(uuid.uuid4()) == []


async def test_counts_name_every_classroom_asked_for(replica: Replica) -> None:
    empty = uuid.uuid4()
    for number in range(3):
        await replica.store.open_session(f"web.agent-{number}.aud", ROOM)
    assert await replica.store.counts([ROOM, empty]) == {ROOM: 3, empty: 0}
    assert await replica.store.counts([]) == {}


async def test_a_session_is_found_by_its_key(replica: Replica) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    row = await replica.store.get_session(ROOM, "web.alice.aud")
    assert row == SessionRow(opened.session_id, "web.alice.aud", ROOM, replica.id, opened.started_at)
    assert await replica.store.get_session(ROOM, "web.bob.aud") is None


# --- the replica's row, start and end


async def test_the_lease_is_renewed(replica: Replica, tables: Tables) -> None:
    before = await tables.connection.fetchval("SELECT heartbeat_at FROM replica WHERE id = $1", replica.id)
    assert await replica.store.heartbeat()
    after = await tables.connection.fetchval("SELECT heartbeat_at FROM replica WHERE id = $1", replica.id)
    assert after > before
    await tables.connection.execute("DELETE FROM replica WHERE id = $1", replica.id)
    assert not await replica.store.heartbeat()


@pytest.mark.parametrize("has_session", [False, True])
async def test_the_replica_row_goes_unless_it_has_sessions(
    database_url: str, tables: Tables, has_session: bool
) -> None:
    async with replica_of(database_url) as replica:
        if has_session:
            await replica.store.open_session("web.alice.aud", ROOM)
    assert bool(await tables.connection.fetch("SELECT FROM replica WHERE id = $1", replica.id)) is has_session


async def test_close_writes_what_is_queued(database_url: str, tables: Tables) -> None:
    async with replica_of(database_url) as replica:
        opened = [await replica.store.open_session(f"web.agent-{number}.aud", ROOM) for number in range(50)]
        for each in opened:
            replica.store.close_later(each.session_id, "terminated", now())
    assert await tables.sessions() == []
    assert len(replica.told) == 50
    assert await tables.connection.fetch("SELECT FROM replica") == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda url: url.replace(url.split("@")[1].split("/")[0], f"127.0.0.1:{free_port()}"), "refused"),
        (lambda url: url.rpartition("/")[0] + "/nowhere", "does not exist"),
        (lambda url: url.rpartition("/")[0] + "/template1", "presence migrate"),
        (lambda url: url + "?statement_cache_size=many", "database-url"),
        (lambda url: url + "?sslmode=odd", "sslmode"),
    ],
    ids=["refused", "no database", "no tables", "bad option", "bad ssl mode"],
)
async def test_a_start_that_cannot_be_says_why_in_one_line(database_url: str, change: object, text: str) -> None:
    assert callable(change)
    url = change(database_url).replace("postgres@", "postgres:very-secret@")
    with pytest.raises(StartError) as caught:
        await within(
            Store.open(url, uuid.uuid4(), "test", on_owned=lambda rows: None, ask_owner=ask_nobody, metrics=Metrics())
        )
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "very-secret" not in str(caught.value)


async def test_behind_a_pooler_without_named_statements(database_url: str, tables: Tables) -> None:
    url = database_url + "?statement_cache_size=0"
    async with replica_of(url) as old, replica_of(url) as new:
        first = await old.store.open_session("web.alice.aud", ROOM)
        assert (await old.store.open_session("web.alice.aud", ROOM)).outcome == "kept"
        second = await new.store.open_session("web.alice.aud", ROOM)
        assert second.outcome == "taken_over"
        assert not await old.store.close_session(first.session_id, "closed", now())
        assert await new.store.close_session(second.session_id, "closed", now())
        assert await new.store.heartbeat()
    assert [row["reason"] for row in await tables.history()] == ["replaced", "closed"]


async def test_connections_say_who_they_are(replica: Replica, tables: Tables) -> None:
    await replica.store.open_session("web.alice.aud", ROOM)
    names = await tables.connection.fetch(
        "SELECT DISTINCT application_name FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert [row[0] for row in names] == ["presence test"]


async def test_a_serializable_default_is_borne(database_url: str, postgres: PostgresDatabase, tables: Tables) -> None:
    name = database_url.rpartition("/")[2]
    postgres.psql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    async with replica_of(database_url) as one, replica_of(database_url) as two:
        for _ in range(3):
            await within(
                asyncio.gather(
                    *(
                        replica.store.open_session(f"web.agent-{number}.aud", ROOM)
                        for replica in (one, two)
                        for number in range(20)
                    ),
                    return_exceptions=True,
                )
            )
    rows = await tables.sessions()
    assert len({row["agent_id"] for row in rows}) == len(rows) > 0
