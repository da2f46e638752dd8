"""Opens and closes that meet, and callers that go away, against a real PostgreSQL: one row, and nothing left behind."""

import asyncio
import random
import uuid
from collections import Counter

from store_kit import ROOM, NewReplica, Replica, Tables, now, tables_of

from presence.announcements import Enter
from presence.store import sql
from waiting import eventually, within


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


async def test_a_session_that_is_taken_over_while_it_is_held_goes_on(
    replica: Replica, tables: Tables, database_url: str
) -> None:
    opened = [await replica.store.open_session(f"web.{name}.aud", ROOM) for name in ("alice", "bob")]
    enters = [
        Enter(ROOM, f"web.{name}.aud", each.session_id, each.started_at)
        for name, each in zip(("alice", "bob"), opened, strict=True)
    ]
    alice, bob = opened
    await replica.store.close_session(bob.session_id, "closed", now())
    told: list[set[int]] = []
    other = uuid.uuid4()
    async with tables_of(database_url) as taker:
        await taker.connection.execute(sql.REGISTER_REPLICA, other, "other")
        async with taker.connection.transaction():
            await taker.connection.fetch(sql.TAKE_OVER, other, [alice.session_id], [now()], "replaced")
            holding = asyncio.create_task(replica.store.while_in(enters, told.append))
            await eventually(tables.waiting_for_locks)
    await within(holding)
    assert told == [{alice.session_id}]


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
