"""The store while PostgreSQL loses answers, dies, stands still, or turns read-only: nothing is lost, nothing is doubled."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from store_kit import Replica, Tables, now, replica_of, tables_of

from presence import reasons
from presence.errors import SessionError, Unavailable
from presence.store import LetGo
from proxy import Proxy
from servers import PostgresDatabase
from waiting import eventually, within

ROOM = uuid.UUID("aaaaaaaa-0000-4000-8000-000000000001")


@pytest.fixture
async def proxy(postgres: PostgresDatabase) -> AsyncIterator[Proxy]:
    async with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
async def replica(proxy: Proxy, postgres: PostgresDatabase, database_url: str) -> AsyncIterator[Replica]:
    """A replica whose connections go through the proxy, all of them open and their statements prepared."""
    async with replica_of(database_url.replace(f":{postgres.port}/", f":{proxy.port}/")) as replica:
        for _ in range(2):
            opened = await replica.store.open_session("web.warm.aud", ROOM)
        await replica.store.close_session(opened.session_id, "warm", now())
        replica.told.clear()
        yield replica


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Replica]:
    async with replica_of(database_url) as replica:
        yield replica


# --- an answer is lost, and the server can be reached again


async def test_a_lost_answer_to_a_new_session(replica: Replica, proxy: Proxy, tables: Tables) -> None:
    proxy.loses_answer_to = lambda data: b"web.alice" in data
    opened = await within(replica.store.open_session("web.alice.aud", ROOM))
    assert proxy.lost_answers == 1
    assert opened.outcome == "created"
    [row] = await tables.sessions()
    assert (row["id"], row["started_at"]) == (opened.session_id, opened.started_at)


async def test_a_lost_answer_to_a_take_over(replica: Replica, other: Replica, proxy: Proxy, tables: Tables) -> None:
    first = await other.store.open_session("web.alice.aud", ROOM)
    proxy.loses_answer_to = lambda data: b"replaced" in data
    opened = await within(replica.store.open_session("web.alice.aud", ROOM))
    assert proxy.lost_answers == 1
    assert opened.outcome == "taken_over"
    assert [row["id"] for row in await tables.sessions()] == [opened.session_id]
    assert [row["id"] for row in await tables.history(reason="replaced")] == [first.session_id]


async def test_what_the_owner_said_outlives_a_lost_answer(replica: Replica, other: Replica, proxy: Proxy) -> None:
    first = {name: (await other.store.open_session(f"web.{name}.aud", ROOM)).session_id for name in ("alice", "bob")}

    async def ask(owner: uuid.UUID, sessions: object) -> LetGo:
        return LetGo(untold=[first["alice"]], delivering=[first["bob"]])

    replica.store._openings._ask_owner = ask
    proxy.loses_answer_to = lambda data: b"replaced" in data
    alice, bob = await within(
        asyncio.gather(*(replica.store.open_session(f"web.{name}.aud", ROOM) for name in ("alice", "bob")))
    )
    assert proxy.lost_answers == 1
    assert (alice.outcome, alice.delivering) == ("created", None)
    assert (bob.outcome, bob.delivering) == ("taken_over", other.id)


async def test_a_lost_answer_about_a_session_that_was_kept(replica: Replica, proxy: Proxy) -> None:
    first = await replica.store.open_session("web.alice.aud", ROOM)
    proxy.loses_answer_to = lambda data: b"web.alice" in data
    again = await within(replica.store.open_session("web.alice.aud", ROOM))
    assert proxy.lost_answers == 1
    assert (again.session_id, again.outcome) == (first.session_id, "kept")


async def test_a_lost_answer_to_a_whole_batch(replica: Replica, proxy: Proxy, tables: Tables) -> None:
    agents = [f"web.agent-{number}.aud" for number in range(200)]
    proxy.loses_answer_to = lambda data: b"web.agent-7." in data
    opened = await within(asyncio.gather(*(replica.store.open_session(agent, ROOM) for agent in agents)))
    assert proxy.lost_answers == 1
    assert {each.outcome for each in opened} == {"created"}
    assert {row["agent_id"]: row["id"] for row in await tables.sessions()} == {
        agent: each.session_id for agent, each in zip(agents, opened, strict=True)
    }


async def test_a_lost_answer_to_the_commit_of_a_close(replica: Replica, proxy: Proxy, tables: Tables) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    proxy.loses_answer_to = lambda data: b"COMMIT" in data
    assert await within(replica.store.close_session(opened.session_id, "closed", now()))
    assert proxy.lost_answers == 1
    assert len(await tables.history(id=opened.session_id)) == 1
    assert [row.session_id for row in replica.told] == [opened.session_id]


async def test_a_close_whose_commit_was_lost_before_the_server_had_it(
    replica: Replica, proxy: Proxy, tables: Tables
) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    # The answer to the statement before the COMMIT: the transaction is rolled back.
    proxy.loses_answer_to = lambda data: b"closed-by-test" in data
    assert await within(replica.store.close_session(opened.session_id, "closed-by-test", now()))
    assert proxy.lost_answers == 1
    assert len(await tables.history(id=opened.session_id)) == 1
    assert [row.session_id for row in replica.told] == [opened.session_id]


async def test_a_row_taken_over_between_two_attempts_to_close_it_is_left_alone(
    replica: Replica, other: Replica, proxy: Proxy, tables: Tables
) -> None:
    opened = await replica.store.open_session("web.alice.aud", ROOM)
    proxy.loses_answer_to = lambda data: b"closed-by-test" in data
    proxy.refuses = True
    closing = asyncio.create_task(replica.store.close_session(opened.session_id, "closed-by-test", now()))
    await eventually(lambda: proxy.lost_answers)
    taken = await within(other.store.open_session("web.alice.aud", ROOM))
    proxy.refuses = False
    assert await within(closing) is False
    assert [row["id"] for row in await tables.sessions()] == [taken.session_id]
    assert [row["reason"] for row in await tables.history(id=opened.session_id)] == ["replaced"]


# --- an answer is lost, and the server stays away


async def test_a_row_left_behind_is_found_and_closed_unseen(replica: Replica, proxy: Proxy, tables: Tables) -> None:
    proxy.loses_answer_to = lambda data: b"web.alice" in data
    proxy.refuses = True
    with pytest.raises(Unavailable):
        await within(replica.store.open_session("web.alice.aud", ROOM))
    assert len(await tables.sessions(agent_id="web.alice.aud")) == 1
    proxy.refuses = False
    await eventually(lambda: tables.history(agent_id="web.alice.aud"))
    assert await tables.sessions() == []
    assert [row["reason"] for row in await tables.history(agent_id="web.alice.aud")] == ["unavailable"]
    # Nobody had heard of it.
    assert replica.told == []


async def test_a_row_left_behind_by_a_take_over_is_closed_and_told(
    replica: Replica, other: Replica, proxy: Proxy, tables: Tables
) -> None:
    for agent in ("web.warm.aud", "web.alice.aud"):
        await other.store.open_session(agent, ROOM)
    await replica.store.open_session("web.warm.aud", ROOM)  # opens the connection that is to be lost
    await other.store.open_session("web.warm.aud", ROOM)
    proxy.loses_answer_to = lambda data: b"replaced" in data
    proxy.refuses = True
    with pytest.raises(Unavailable):
        await within(replica.store.open_session("web.alice.aud", ROOM))
    proxy.refuses = False
    await eventually(lambda: tables.history(reason="unavailable"))
    assert await tables.sessions(agent_id="web.alice.aud") == []
    assert [row.agent_id for row in replica.told] == ["web.alice.aud"]


async def test_a_row_left_behind_may_be_the_next_callers_new_session(
    replica: Replica, proxy: Proxy, tables: Tables
) -> None:
    for _ in range(20):
        proxy.loses_answer_to = lambda data: b"web.alice" in data
        proxy.refuses = True
        with pytest.raises(Unavailable):
            await within(replica.store.open_session("web.alice.aud", ROOM))
        left = await tables.sessions(agent_id="web.alice.aud")  # none when the search was quicker
        proxy.refuses = False
        await eventually(lambda: replica.store.healthy)
        # Whether it is found by the next caller or by the search for it: never "kept", and never closed under way.
        opened = await within(replica.store.open_session("web.alice.aud", ROOM))
        assert opened.outcome == "created"
        assert await within(replica.store.flush(5))
        assert [row["id"] for row in await tables.sessions()] == [opened.session_id]
        assert all(opened.session_id >= row["id"] for row in left)
        await replica.store.close_session(opened.session_id, "closed", now())


async def test_a_cut_of_idle_connections_goes_unnoticed(replica: Replica, proxy: Proxy) -> None:
    proxy.cut()
    opened = await within(replica.store.open_session("web.alice.aud", ROOM))
    assert opened.outcome == "created"
    assert (await within(replica.store.open_session("web.alice.aud", ROOM))).outcome == "kept"
    assert await within(replica.store.close_session(opened.session_id, "closed", now()))
    assert await within(replica.store.heartbeat())
    assert await within(replica.store.counts([ROOM])) == {ROOM: 0}


async def test_connections_that_the_server_ends_are_replaced(replica: Replica, tables: Tables) -> None:
    await tables.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    opened = await within(replica.store.open_session("web.alice.aud", ROOM))
    assert await within(replica.store.close_session(opened.session_id, "closed", now()))
    assert await within(replica.store.heartbeat())


# --- the server dies


@pytest.fixture
async def dying(own_postgres: PostgresDatabase) -> AsyncIterator[Replica]:
    async with replica_of(own_postgres.url, max_queued_closes=20) as replica:
        yield replica


async def test_closes_wait_through_an_outage(own_postgres: PostgresDatabase, dying: Replica) -> None:
    store = dying.store
    opened = [await store.open_session(f"web.agent-{number}.aud", ROOM) for number in range(10)]
    own_postgres.kill()
    closing = [asyncio.create_task(store.close_session(each.session_id, "lost", now())) for each in opened[:9]]
    with pytest.raises(Unavailable):
        await within(store.open_session("web.late.aud", ROOM))
    await eventually(lambda: not store.healthy)
    store.close_later(opened[9].session_id, "lost", now())
    assert store.queued_closes == 10
    assert not await store.flush(0.05)
    for refused in (store.open_session("web.late.aud", ROOM), store.heartbeat(), store.agents(ROOM)):
        with pytest.raises(Unavailable):
            await within(refused, 0.1)
    own_postgres.start()
    assert await within(asyncio.gather(*closing), 10) == [True] * 9
    assert await store.flush(10)
    await eventually(lambda: store.healthy)
    assert sorted(row.session_id for row in dying.told) == [each.session_id for each in opened]
    async with tables_of(own_postgres.url) as tables:
        assert await tables.sessions() == []
        assert len(await tables.history()) == 10
    assert (await within(store.open_session("web.late.aud", ROOM))).outcome == "created"


async def test_the_queue_of_closes_is_bounded(own_postgres: PostgresDatabase, dying: Replica) -> None:
    store = dying.store
    opened = await store.open_session("web.alice.aud", ROOM)
    own_postgres.kill()
    for number in range(20):
        store.close_later(opened.session_id + number, "lost", now())
    with pytest.raises(Unavailable, match="closed"):
        store.close_later(opened.session_id + 20, "lost", now())
    with pytest.raises(Unavailable, match="closed"):
        await store.close_session(opened.session_id + 20, "lost", now())
    with pytest.raises(Unavailable, match="closed"):
        await store.open_session("web.bob.aud", ROOM)
    own_postgres.start()
    assert await within(store.flush(), 10)
    assert [row.session_id for row in dying.told] == [opened.session_id]


async def test_close_gives_up_in_time_when_the_server_stays_away(own_postgres: PostgresDatabase) -> None:
    async with replica_of(own_postgres.url) as replica:
        opened = await replica.store.open_session("web.alice.aud", ROOM)
        own_postgres.kill()
        waiting = asyncio.create_task(replica.store.close_session(opened.session_id, "lost", now()))
        await within(replica.store.close(timeout_s=0.2))
        with pytest.raises(Unavailable):
            await waiting


# --- the server stands still


@pytest.fixture
def standing_still(own_postgres: PostgresDatabase) -> Iterator[PostgresDatabase]:
    yield own_postgres
    own_postgres.resume()


async def test_a_server_that_does_not_answer(standing_still: PostgresDatabase, dying: Replica) -> None:
    store = dying.store
    opened = await store.open_session("web.alice.aud", ROOM)
    standing_still.pause()
    closing = asyncio.create_task(store.close_session(opened.session_id, "lost", now()))
    with pytest.raises(SessionError) as caught:
        await within(store.open_session("web.bob.aud", ROOM), 5)
    assert caught.value.reason is reasons.UNAVAILABLE
    assert not store.healthy
    standing_still.resume()
    assert await within(closing, 15)
    await eventually(lambda: store.healthy, 10)
    assert await within(store.flush(), 15)
    async with tables_of(standing_still.url) as tables:
        # What the refused attempt may have left behind is gone, whether it ran or not.
        assert await tables.sessions() == []


# --- the server turns read-only


async def test_a_server_that_turns_read_only(own_postgres: PostgresDatabase, dying: Replica) -> None:
    store = dying.store
    opened = await store.open_session("web.alice.aud", ROOM)

    def set_read_only(value: str) -> None:
        own_postgres.psql(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        own_postgres.psql("SELECT pg_reload_conf()")

    set_read_only("on")
    async with tables_of(own_postgres.url) as tables:
        await eventually(lambda: _is_read_only(tables))
    with pytest.raises(Unavailable):
        await within(store.open_session("web.bob.aud", ROOM))
    assert not store.healthy
    closing = asyncio.create_task(store.close_session(opened.session_id, "lost", now()))
    with pytest.raises(Unavailable):
        await within(store.heartbeat())
    own_postgres.psql("SET default_transaction_read_only = off; ALTER SYSTEM RESET default_transaction_read_only")
    own_postgres.psql("SELECT pg_reload_conf()")
    assert await within(closing, 10)
    await eventually(lambda: store.healthy)
    assert (await within(store.open_session("web.bob.aud", ROOM))).outcome == "created"


async def _is_read_only(tables: Tables) -> bool:
    return bool(await tables.connection.fetchval("SHOW transaction_read_only") == "on")
