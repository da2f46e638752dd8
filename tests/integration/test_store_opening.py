"""How sessions open, against a real PostgreSQL: whose row it is, and who is asked for it."""

import asyncio
import uuid
from collections import Counter

import pytest
from store_kit import ROOM, NewReplica, Replica, Tables, now, replica_of

from presence import reasons
from presence.errors import SessionError
from presence.store import LetGo
from waiting import within


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
