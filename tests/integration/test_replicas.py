"""Two replicas over one NATS and one PostgreSQL, in one process: hand-over, drain, and a replica that finds itself swept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
from running import Agent, Overheard, Running, running_gateway

from proxy import Proxy
from servers import PostgresDatabase
from waiting import eventually, within

OPTIONS = {"drain_timeout_s": 1.0, "lease_ttl_s": 1.5}


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


@pytest.fixture
async def overheard(one: Running) -> Overheard:
    return await Overheard(one.nats).listen(f"classrooms.{one.classroom_id}.agent")


async def heard(gateway: Running, overheard: Overheard) -> list[tuple[str, str]]:
    await gateway.nats.flush()
    return [(kind, agent_id.split(".")[1]) for kind, agent_id in overheard.events()]


async def next_error(agent: Agent) -> str:
    while (message := await agent.hear())["type"] == "event":
        pass
    kind: str = message["payload"]["type"]
    return kind


async def test_an_agent_that_connects_elsewhere_is_replaced_here(
    one: Running, two: Running, overheard: Overheard
) -> None:
    first, success = await one.join("alice")
    second, again = await two.join("alice")
    assert await first.error() == ("replaced", 4505)
    assert again["session_id"] != success["session_id"]
    [row] = await one.rows()
    assert (row["id"], row["replica_id"]) == (again["session_id"], two.app.replica_id)
    [past] = await one.history()
    assert (past["id"], past["reason"], past["ended"]) == (success["session_id"], "replaced", row["started_at"])
    await two.publish("chat", "hello")
    assert (await second.hear())["payload"] == "hello"
    assert await heard(one, overheard) == [("agent.enter", "alice")]
    assert one.app.bus._topics == {}  # the old replica has forgotten it
    await second.socket.close()
    await two.reason_of(again["session_id"])
    assert await heard(one, overheard) == [("agent.enter", "alice"), ("agent.leave", "alice")]


async def test_back_and_forth_as_fast_as_it_goes(one: Running, two: Running, overheard: Overheard) -> None:
    last = None
    for number in range(30):
        last, _ = await (one, two)[number % 2].join("alice")
    assert last is not None
    assert len(await one.rows()) == 1
    await last.socket.close()
    await eventually(lambda: _is_empty(one))
    assert len(await one.history()) == 30
    assert await heard(one, overheard) == [("agent.enter", "alice"), ("agent.leave", "alice")]


async def _is_empty(gateway: Running) -> bool:
    return await gateway.rows() == []


async def test_two_replicas_race_for_one_agent(one: Running, two: Running, overheard: Overheard) -> None:
    for number in range(10):
        agents = [await gateway.dial() for gateway in (one, two) for _ in range(3)]
        for agent, gateway in zip(agents, (one, one, one, two, two, two), strict=True):
            await agent.say(gateway.request(f"agent{number}"))
        ends = [asyncio.create_task(agent.ended(10)) for agent in agents]
        await eventually(lambda ends=ends: sum(end.done() for end in ends) == 5)  # type: ignore[misc]
        [left] = [agent for agent, end in zip(agents, ends, strict=True) if not end.done()]
        rows = [row for row in await one.rows() if f"agent{number}." in row["agent_id"]]
        assert len(rows) == 1
        await left.socket.close()
        await within(asyncio.gather(*ends))
    await eventually(lambda: _is_empty(one))
    events = await heard(one, overheard)
    assert sorted(events) == sorted((kind, f"agent{n}") for n in range(10) for kind in ("agent.enter", "agent.leave"))


@pytest.mark.parametrize("old_closes", ["before", "after"])
async def test_a_drain_hands_over_in_silence(one: Running, two: Running, overheard: Overheard, old_closes: str) -> None:
    first, success = await one.join("alice")
    watcher, _ = await two.join("watcher")
    draining = asyncio.create_task(one.app.drain())
    assert await next_error(first) == "terminated"
    if old_closes == "before":
        await first.socket.close()
    second, again = await two.join("alice")
    if old_closes == "after":
        assert await first.ended() == 1012  # without a word: it knows why
    await one.publish("chat", "hello")
    while (await second.hear())["payload"] != "hello":
        pass
    assert await within(draining)
    [row] = [row for row in await one.rows() if "alice" in row["agent_id"]]
    assert row["id"] == again["session_id"]
    assert await one.reason_of(success["session_id"]) == "replaced"
    await two.publish("chat", "after")
    while (event := await watcher.hear())["payload"] != "after":
        assert event["payload"] == "hello"
    assert await heard(one, overheard) == [("agent.enter", "alice"), ("agent.enter", "watcher")]


async def test_who_does_not_come_back_has_left_when_the_drain_ends(
    one: Running, two: Running, overheard: Overheard
) -> None:
    agent, success = await one.join("alice")
    started = time.monotonic()
    draining = asyncio.create_task(one.app.drain())
    assert await next_error(agent) == "terminated"
    await agent.socket.close()
    closed = time.monotonic()
    assert ("agent.leave", "alice") not in await heard(one, overheard)
    assert await within(draining)
    assert time.monotonic() - started >= 1.0
    assert await one.reason_of(success["session_id"]) == "closed"
    await eventually(lambda: len(overheard.messages) == 2)
    [row] = await one.history()
    assert row["ended"].timestamp() <= time.time() - (time.monotonic() - closed) + 0.1


@pytest.mark.parametrize("answer", [b"[]", b"{}", b"7", b"[1]", b"not JSON", b"[true, true]"])
async def test_an_answer_that_is_none_proves_nothing(one: Running, answer: bytes) -> None:
    owner = uuid4()

    async def respond(message: Any) -> None:
        await message.respond(answer)

    await one.nats.subscribe(f"presence.replica.{owner}.delivered", cb=respond)
    await one.nats.flush()
    assert await within(one.app.owners.delivered(owner, UUID(one.classroom_id), "web.alice.presence")) is False


async def test_an_agent_is_removed_through_any_replica(one: Running, two: Running) -> None:
    agent, success = await one.join("alice")
    path = f"/api/v1/classrooms/{one.classroom_id}/agents/web.alice.presence"
    assert (await two.http("DELETE", path)).status_code == 204
    assert await agent.error() == ("removed", 4507)
    assert await one.reason_of(success["session_id"]) == "removed"
    assert (await two.http("DELETE", path)).status_code == 404


async def test_an_owner_is_asked_again_when_the_request_may_not_have_left(
    one: Running, tmp_path: Path, nats_url: str, database_url: str
) -> None:
    port = urlsplit(nats_url).port
    assert port
    async with (
        Proxy(port) as link,
        running_gateway(tmp_path, f"nats://127.0.0.1:{link.port}", database_url, signer=one.signer, **OPTIONS) as new,
    ):
        new.classroom_id = one.classroom_id
        asking = asyncio.Event()

        def hold(data: bytes) -> bool:
            if b".release " not in data:
                return False
            link.silent = True
            asking.set()
            return True

        first, _ = await one.join("alice")
        link.loses_answer_to = hold
        second = await new.dial()
        await second.say(new.request("alice"))
        await within(asking.wait())
        link.cut()
        await eventually(lambda: not new.app.bus.connected)
        link.silent = False
        assert await first.error() == ("replaced", 4505)
        assert (await second.hear())["type"] == "connect_success"
        await new.reconnect_nats()


def expire(gateway: Running, postgres: PostgresDatabase, database_url: str) -> None:
    postgres.psql(
        f"UPDATE replica SET heartbeat_at = now() - interval '1 hour' WHERE id = '{gateway.app.replica_id}'",
        database_url,
    )


async def test_a_replica_that_finds_itself_swept_brings_its_agents_back(
    one: Running, two: Running, overheard: Overheard, postgres: PostgresDatabase, database_url: str
) -> None:
    stays, old = await one.join("stays")
    await eventually(two.app.lease._is_steady)
    old_id = one.app.replica_id
    two.app.lease._steady_since = 0.0
    expire(one, postgres, database_url)
    assert await two.app.store.sweep(1.5) == (old_id, 1)
    moved, _ = await two.join("moved")
    await eventually(lambda: one.app.replica_id != old_id)
    await eventually(lambda: len(overheard.messages) == 4)
    events = [json.loads(message.data) for message in overheard.messages]
    assert [
        (event["type"], event["agent_id"].split(".")[1]) for event in events if "moved" not in event["agent_id"]
    ] == [
        ("agent.enter", "stays"),
        ("agent.leave", "stays"),
        ("agent.enter", "stays"),
    ]
    [row] = [row for row in await one.rows() if "stays" in row["agent_id"]]
    assert row["replica_id"] == one.app.replica_id
    assert row["id"] != old["session_id"]
    await one.publish("chat", "still here")
    while (await stays.hear())["payload"] != "still here":
        pass
    await stays.socket.close()  # under the new identity
    assert await one.reason_of(row["id"]) == "closed"
    await moved.socket.close()


async def test_an_agent_that_was_taken_while_nobody_answered_is_found(
    one: Running, two: Running, overheard: Overheard, postgres: PostgresDatabase, database_url: str
) -> None:
    first, success = await one.join("alice")
    # As if this replica had stood still while it was asked: the row moves, and nothing is heard of it.
    postgres.psql(f"UPDATE agent_session SET replica_id = '{two.app.replica_id}'", database_url)
    await one.app.sessions.reconcile()
    assert await first.error() == ("replaced", 4505)
    assert [row["id"] for row in await one.rows()] == [success["session_id"]]
    assert await heard(one, overheard) == [("agent.enter", "alice")]


async def test_a_row_that_nobody_holds_is_closed(one: Running, postgres: PostgresDatabase, database_url: str) -> None:
    await one.join("alice")
    postgres.psql(
        "INSERT INTO agent_session (agent_id, classroom_id, replica_id, started_at)"
        f" SELECT 'web.' || age || '.x', '{one.classroom_id}', '{one.app.replica_id}', now() - age"
        " FROM unnest(ARRAY[interval '1 s', interval '5 min']) AS age",
        database_url,
    )
    await one.app.sessions.reconcile()
    assert await one.app.store.flush(5)
    assert [row["agent_id"] for row in await one.history()] == ["web.00:05:00.x"]
    assert len(await one.rows()) == 2


async def test_a_drain_ends_when_everyone_has_moved(
    one: Running, two: Running, tmp_path: Path, nats_url: str, database_url: str
) -> None:
    options = {**OPTIONS, "drain_timeout_s": 60.0}
    async with running_gateway(tmp_path, nats_url, database_url, signer=one.signer, **options) as leaving:
        leaving.classroom_id = two.classroom_id
        await eventually(lambda: leaving.app.lease.has_others)
        first, _ = await leaving.join("alice")
        draining = asyncio.create_task(leaving.app.drain())
        assert await next_error(first) == "terminated"
        await two.join("alice")
        await first.socket.close()
        assert await within(draining)
