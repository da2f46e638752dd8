"""The drain, seen from outside: who is told what and when, and what is written when it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import nats
import pytest
from running import Overheard, Running, running_gateway
from websockets.exceptions import InvalidStatus

from presence import app as app_module
from proxy import Proxy
from servers import PostgresDatabase
from waiting import SCALE, eventually, within


@pytest.fixture
async def gateway(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path, nats_url, database_url, drain_timeout_s=0.5) as running:
        yield running


async def test_everyone_is_told_at_once_and_closed_at_the_end(gateway: Running) -> None:
    overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
    agents = [(await gateway.join(f"agent{number}"))[0] for number in range(20)]
    waiting = await gateway.dial()  # it has not said yet who it is
    started = time.monotonic()
    draining = asyncio.create_task(gateway.app.drain())
    for agent in [*agents, waiting]:
        while (message := await agent.hear())["type"] == "event":
            pass
        assert message["type"] == "recoverable_session_error"
        assert message["payload"]["type"] == "terminated"
        assert message["payload"]["reconnect"] is True
        assert 50 <= message["payload"]["reconnect_after_ms"] <= 1050
    assert time.monotonic() - started < 0.4 * SCALE
    await gateway.publish("chat", "still here")
    for agent in agents:
        assert (await agent.hear())["payload"] == "still here"
    assert {await agent.ended() for agent in [*agents, waiting]} == {1012}
    assert time.monotonic() - started >= 0.5
    assert await within(draining)
    assert await gateway.rows() == []
    assert {row["reason"] for row in await gateway.history()} == {"terminated"}
    leaves = [agent_id for kind, agent_id in overheard.events() if kind == "agent.leave"]
    assert sorted(leaves) == sorted(f"web.agent{number}.presence" for number in range(20))


async def test_who_stays_to_the_end_gets_what_is_on_its_way(tmp_path: Path, nats_url: str, database_url: str) -> None:
    port = urlsplit(nats_url).port
    assert port
    async with (
        Proxy(port) as link,
        running_gateway(
            tmp_path, f"nats://127.0.0.1:{link.port}", database_url, drain_timeout_s=0.5, lease_ttl_s=60
        ) as gateway,
    ):
        await gateway.nats.close()
        gateway.nats = await nats.connect(nats_url)
        agent, _ = await gateway.join()
        closing = gateway.app.sessions.close_parked
        link.silent = True
        await gateway.publish("chat", "last")

        def flow() -> None:
            link.silent = False
            closing()

        gateway.app.sessions.close_parked = flow  # type: ignore[method-assign] - the last moment of the drain
        draining = asyncio.create_task(gateway.app.drain())
        assert (await agent.hear())["payload"]["type"] == "terminated"
        assert (await agent.hear())["payload"] == "last"
        assert await agent.ended() == 1012
        assert await within(draining)


async def test_the_spread_of_the_returns(tmp_path: Path, nats_url: str, database_url: str) -> None:
    options = {"drain_timeout_s": 0.2, "reconnect_spread_s": 4.0}
    async with running_gateway(tmp_path, nats_url, database_url, **options) as gateway:
        agents = [await gateway.dial() for _ in range(50)]
        draining = asyncio.create_task(gateway.app.drain())
        delays = [(await agent.hear())["payload"]["reconnect_after_ms"] for agent in agents]
        # A tenth of the drain first: nobody comes back before all have been told.
        assert 20 <= min(delays) < 1020 < 3020 < max(delays) <= 4020
        await within(draining)


async def test_nobody_new_comes_in(gateway: Running) -> None:
    await gateway.join()
    early = await gateway.dial()
    assert (await gateway.http("GET", "/readyz")).status_code == 200
    draining = asyncio.create_task(gateway.app.drain())
    await eventually(lambda: gateway.app.gateway.draining)
    with pytest.raises(InvalidStatus) as caught:
        await gateway.dial()
    assert caught.value.response.status_code == 503
    assert caught.value.response.headers["Retry-After"]
    assert (await gateway.http("GET", "/readyz")).status_code == 503
    assert (await gateway.http("GET", "/healthz")).status_code == 200
    assert (await early.hear())["payload"]["type"] == "terminated"
    await early.say(gateway.request("late"))
    assert await early.ended() == 1012
    assert await within(draining)
    assert [row["agent_id"] for row in await gateway.history()] == ["web.alice.presence"]


async def test_a_drain_that_fails_still_stops_everything(tmp_path: Path, nats_url: str, database_url: str) -> None:
    async with running_gateway(tmp_path, nats_url, database_url) as gateway:
        agent, _ = await gateway.join()

        async def fail() -> bool:
            raise RuntimeError("a fault in the drain")

        gateway.app.drain = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="a fault in the drain"):
            await within(app_module._end(gateway.app), 10)
        assert await agent.ended() in (1006, 1012)
        with pytest.raises(OSError):
            await gateway.dial()
        assert not gateway.app.bus.connected


async def test_it_ends_when_the_last_one_has_gone(tmp_path: Path, nats_url: str, database_url: str) -> None:
    async with running_gateway(tmp_path, nats_url, database_url, drain_timeout_s=60) as gateway:
        agent, success = await gateway.join()
        draining = asyncio.create_task(gateway.app.drain())
        assert (await agent.hear())["payload"]["type"] == "terminated"
        await agent.socket.close()
        assert await within(draining)
        assert await gateway.reason_of(success["session_id"]) == "closed"


async def test_a_connect_under_way_is_served_and_told(
    tmp_path: Path, nats_url: str, own_postgres: PostgresDatabase
) -> None:
    async with running_gateway(tmp_path, nats_url, own_postgres.url, drain_timeout_s=2) as gateway:
        agent = await gateway.dial()
        own_postgres.pause()
        await agent.say(gateway.request())
        await eventually(lambda: len(gateway.app.steps))
        draining = asyncio.create_task(gateway.app.drain())
        assert (await agent.hear())["payload"]["type"] == "terminated"
        own_postgres.resume()
        assert (await agent.hear())["type"] == "connect_success"
        await agent.socket.close()
        assert await within(draining)
        assert [row["reason"] for row in await gateway.history()] == ["closed"]


async def test_rows_are_written_when_the_database_comes_back(
    tmp_path: Path, nats_url: str, own_postgres: PostgresDatabase
) -> None:
    async with running_gateway(tmp_path, nats_url, own_postgres.url, drain_timeout_s=0.2) as gateway:
        agents = [(await gateway.join(f"agent{number}"))[0] for number in range(5)]
        own_postgres.pause()
        draining = asyncio.create_task(gateway.app.drain())
        assert {await agent.ended() for agent in agents} == {1012}  # sockets do not wait for rows
        assert not draining.done()
        own_postgres.resume()
        assert await within(draining, 15)
        assert await gateway.rows() == []
        assert len(await gateway.history()) == 5
