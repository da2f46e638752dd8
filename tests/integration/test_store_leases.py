"""Leases, against a real PostgreSQL: who is swept, by whom, and what is left of it."""

import asyncio
import uuid

import pytest
from store_kit import ROOM, NewReplica, Replica, Tables, now

from presence.errors import Unavailable
from servers import PostgresDatabase


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
