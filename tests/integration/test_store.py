"""The store against a real PostgreSQL: what it reads, the replica's own row, its start and its end."""

import asyncio
import uuid

import pytest
from store_kit import ROOM, Replica, Tables, ask_nobody, now, replica_of

from presence.errors import StartError
from presence.metrics import Metrics
from presence.store import SessionRow, Store
from servers import PostgresDatabase, free_port
from waiting import within

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
