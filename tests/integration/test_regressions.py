"""Faults that were found by reading, each with the interleaving that shows it, over the real servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from running import Overheard, Running, Signer, running_gateway
from store_kit import replica_of, tables_of

from presence.store import Elsewhere, LetGo, SessionRow, Store
from presence.store.database import Away
from processes import PROGRAM, Command
from proxy import Proxy
from servers import NatsServer, free_port
from waiting import eventually, within


async def test_a_gap_is_told_when_the_subscriptions_are_active_again(
    tmp_path: Path, nats_server: NatsServer, database_url: str
) -> None:
    """Whoever reads its classroom again at the gap hears of all that happens from then on."""
    async with (
        Proxy(nats_server.port) as proxy,
        running_gateway(tmp_path, f"nats://127.0.0.1:{proxy.port}", database_url) as gateway,
    ):
        agent, _ = await gateway.join("alice")
        subscribing = asyncio.Event()

        def hold_back(data: bytes) -> bool:
            if b"SUB classrooms" in data:
                proxy.silent = True
                subscribing.set()
            return False

        proxy.loses_answer_to = hold_back
        proxy.cut()
        await within(subscribing.wait())
        with pytest.raises(TimeoutError):
            await agent.hear(0.3)
        proxy.loses_answer_to = None
        proxy.silent = False
        assert (await agent.hear(10))["type"] == "gap"
        client = await gateway.reconnect_nats()
        await client.publish(f"classrooms.{gateway.classroom_id}.chat", b'"after the gap"')
        assert (await agent.hear())["payload"] == "after the gap"


FEW_DESCRIPTORS = 300
OPTIONS = {"drain_timeout_s": 0.5, "lease_ttl_s": 3.0}


@pytest.fixture
async def one(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url, **OPTIONS) as running:
        yield running


@pytest.fixture
async def two(one: Running, tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url, signer=one.signer, **OPTIONS) as running:
        running.classroom_id = one.classroom_id
        await eventually(lambda: one.app.lease.has_others)
        yield running


async def test_a_session_that_would_be_parked_too_late_is_closed(one: Running, two: Running) -> None:
    """A turn may be taken for longer than the drain lasts."""
    agent, success = await one.join("alice")
    key = UUID(one.classroom_id), success["agent_id"]
    turns = one.app.sessions._turns
    await turns.take(key)
    draining = asyncio.create_task(one.app.drain())
    await eventually(lambda: one.app.lives.parks)
    await agent.socket.close()
    await eventually(lambda: one.app.lives.draining and not one.app.lives.parks)
    turns.give(key)
    assert await within(draining)
    assert await one.rows() == []


async def test_a_connect_under_way_while_its_replica_is_swept_gets_a_row(one: Running) -> None:
    bus = one.app.bus
    subscribe, subscribing, swept = bus.subscribe, asyncio.Event(), asyncio.Event()

    async def wait_for_the_sweep(classroom_id: UUID) -> None:
        subscribing.set()
        await swept.wait()
        await subscribe(classroom_id)

    bus.subscribe = wait_for_the_sweep  # type: ignore[method-assign]
    first_id = one.app.replica_id
    agent = await one.dial()
    await agent.say(one.request("alice"))
    await within(subscribing.wait())
    await one.database.execute("WITH s AS (DELETE FROM agent_session) DELETE FROM replica")
    await eventually(lambda: one.app.replica_id != first_id)
    await eventually(lambda: not one.app.store.swept.is_set())
    swept.set()
    message = await agent.hear()
    if message["type"] == "connect_success":
        [row] = await eventually(one.rows)
        assert row["replica_id"] == one.app.replica_id
    else:
        assert message["type"] == "recoverable_session_error"


async def test_a_replica_that_is_swept_while_it_looks_at_its_rows_replaces_nobody(one: Running) -> None:
    agent, _ = await one.join("alice")
    store = one.app.store
    owned, first_id = store.owned, one.app.replica_id

    async def owned_after_a_pause(after_id: int = 0, limit: int = 1000) -> list[SessionRow]:
        store.owned = owned  # type: ignore[method-assign]
        await one.database.execute("WITH s AS (DELETE FROM agent_session) DELETE FROM replica")
        return await owned(after_id, limit)

    store.owned = owned_after_a_pause  # type: ignore[method-assign]
    one.app.lease._must_reconcile = True
    await eventually(lambda: one.app.replica_id != first_id, 10)
    [row] = await eventually(one.rows)
    assert row["replica_id"] == one.app.replica_id
    assert agent.socket.close_code is None


async def test_a_session_that_was_let_go_and_not_taken_ends_within_seconds(one: Running, two: Running) -> None:
    """Whoever asked for it may have died: its row must not stay in the rosters."""
    overheard = await Overheard(one.nats).listen(f"classrooms.{one.classroom_id}.agent")
    agent, success = await one.join("alice")
    row = Elsewhere(success["session_id"], UUID(one.classroom_id), success["agent_id"])
    assert not (await two.app.owners.ask(one.app.replica_id, [row])).untold
    assert await agent.error() == ("replaced", 4505)
    assert await within(one.reason_of(success["session_id"]), 10) == "lost"
    assert await one.rows() == []
    await one.nats.flush()
    assert [kind for kind, _ in overheard.events()] == ["agent.enter", "agent.leave"]


async def test_who_comes_back_before_its_session_is_taken_elsewhere_is_not_left_without_a_row(
    one: Running, two: Running
) -> None:
    _, first = await one.join("alice")
    newcomer = await two.dial()
    openings = two.app.store._openings
    ask, asked, go_on = openings._ask_owner, asyncio.Event(), asyncio.Event()

    async def ask_and_pause(owner: UUID, sessions: Sequence[Elsewhere]) -> LetGo:
        let_go = await ask(owner, sessions)
        asked.set()
        await go_on.wait()
        return let_go

    openings._ask_owner = ask_and_pause
    await newcomer.say(two.request("alice"))
    await within(asked.wait())
    again, _ = await one.join("alice")
    go_on.set()
    assert (await newcomer.hear())["type"] == "connect_success"
    assert await again.error() == ("replaced", 4505)
    [row] = await one.rows()
    assert row["replica_id"] == two.app.replica_id
    assert await one.reason_of(first["session_id"]) == "lost"  # the others were told that it is over


async def test_a_row_made_while_its_replica_is_being_swept_is_swept_too(database_url: str) -> None:
    """The sweep has begun to look when the replica, thought dead, makes one more row."""
    async with (
        replica_of(database_url) as dead,
        replica_of(database_url) as sweeper,
        tables_of(database_url) as tables,
        tables_of(database_url) as gate,
    ):
        await tables.connection.execute(
            f"""
            UPDATE replica SET heartbeat_at = now() - interval '1 hour' WHERE id = '{dead.id}';
            ALTER TABLE replica RENAME TO replica_table;
            CREATE FUNCTION wait_at_gate() RETURNS bool LANGUAGE plpgsql AS $$
            BEGIN
                IF current_query() LIKE '%SKIP LOCKED%' AND pg_try_advisory_lock(1) THEN
                    PERFORM pg_advisory_lock(2), pg_advisory_unlock(2);
                END IF;
                RETURN true;
            END $$;
            CREATE VIEW replica AS SELECT * FROM replica_table WHERE wait_at_gate();
            SELECT pg_advisory_lock(2);
            """
        )
        sweeping = asyncio.create_task(sweeper.store.sweep(60))
        await eventually(tables.waiting_for_locks)
        opened = await dead.store.open_session("web.alice.presence", uuid4())
        await tables.connection.execute("SELECT pg_advisory_unlock(2)")
        assert await within(sweeping) == (dead.id, 1)
        assert [row.session_id for row in sweeper.told] == [opened.session_id]
        assert await gate.sessions() == []


async def test_the_drain_closes_more_sessions_than_may_wait_in_an_outage(
    tmp_path: Path, nats_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Store.open.__func__.__kwdefaults__, "max_queued_closes", 2)  # type: ignore[attr-defined]
    async with running_gateway(tmp_path, nats_url, database_url, drain_timeout_s=0.5) as gateway:
        gateway.app.lease.has_others = True
        for number in range(6):
            agent, _ = await gateway.join(f"agent{number}")
            if number % 2:
                await agent.socket.close()
        assert await within(gateway.app.drain())
        assert await gateway.rows() == []


async def test_a_fault_of_the_client_does_not_end_the_watch_for_the_database(database_url: str) -> None:
    """uvloop, for one, raises RuntimeError for a transport whose handle has gone before anybody was told."""
    async with replica_of(database_url) as replica:
        database = replica.store._database
        probe, faults = database._probe.fetch, []

        async def fail_once(statement: str) -> list[asyncpg.Record]:
            database._probe.fetch = probe  # type: ignore[method-assign]
            faults.append(statement)
            raise RuntimeError("the handler is closed")

        database._probe.fetch = fail_once  # type: ignore[assignment,method-assign]
        database.report_away(Away(OSError(), may_have_run=False))
        await eventually(lambda: replica.store.healthy)
        assert faults


async def test_an_agent_id_that_no_row_can_have_is_nobodys(one: Running) -> None:
    answer = await one.http("DELETE", f"/api/v1/classrooms/{one.classroom_id}/agents/a%00b")
    assert answer.status_code == 404


async def test_silent_sockets_leave_descriptors_for_the_rest(tmp_path: Path, nats_url: str, database_url: str) -> None:
    """With few descriptors, half-open upgrades must not take those of the HTTP port, the database and NATS."""
    port, http_port, signer_path = free_port(), free_port(), Signer(tmp_path).path
    serve = f"ulimit -n {FEW_DESCRIPTORS}; exec {PROGRAM} serve --port {port} --http-port {http_port}"
    env = {"PRESENCE_NATS_URL": nats_url, "PRESENCE_DATABASE_URL": database_url, "PRESENCE_AUTH_KEYS": str(signer_path)}
    command = await Command.start_program(["/bin/sh", "-c", serve], tmp_path, env)
    silent: list[socket.socket] = []
    try:
        await eventually(lambda: any('"serving"' in line for line in command.err), 20)
        silent += [socket.create_connection(("127.0.0.1", port)) for _ in range(FEW_DESCRIPTORS)]
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await within(client.get(f"http://127.0.0.1:{http_port}/healthz"), 2)
        assert answer.status_code == 200
        assert not any("accept_failed" in line for line in command.err)
    finally:
        for each in silent:
            each.close()
        await command.end()
