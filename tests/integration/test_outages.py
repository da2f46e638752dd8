"""NATS or PostgreSQL away: those who are in stay in, new ones are told to come again, and nothing is lost meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from running import Agent, Overheard, Running, running_gateway

from presence.outbox import PROOF_LASTS_S
from servers import NatsServer, PostgresDatabase
from waiting import SCALE, eventually, within

FAST_HEARTBEAT = {"ping_interval_s": 0.2, "pong_timeout_s": 0.1}


async def is_ready(gateway: Running) -> bool:
    assert (await gateway.http("GET", "/healthz")).status_code == 200
    return (await gateway.http("GET", "/readyz")).status_code == 200


async def refused(gateway: Running, agent: str) -> Agent:
    """A connect that cannot be served now."""
    newcomer = await gateway.dial()
    await newcomer.say(gateway.request(agent))
    assert await newcomer.error() == ("unavailable", 4003)
    return newcomer


async def advice_ms(gateway: Running) -> int:
    """How long a connect that cannot be served is told to stay away."""
    newcomer = await gateway.dial()
    await newcomer.say(gateway.request("new"))
    payload = (await newcomer.hear())["payload"]
    assert payload["type"] == "unavailable"
    after_ms: int = payload["reconnect_after_ms"]
    return after_ms


async def gap(agent: Agent) -> object:
    while (message := await agent.hear(10))["type"] == "event":
        pass
    assert message["type"] == "gap", message
    return message["payload"]["missed"]


def pongs(gateway: Running) -> int:
    counters: dict[str, int] = gateway.app.hub.stats()["counters"]
    return counters["pongs_received"]


async def test_nats_goes_away_and_comes_back(tmp_path: Path, own_nats: NatsServer, database_url: str) -> None:
    async with running_gateway(tmp_path, own_nats.url, database_url, **FAST_HEARTBEAT) as gateway:
        stays, _ = await gateway.join("stays")
        goes, success = await gateway.join("goes")
        assert await is_ready(gateway)
        own_nats.kill()
        await eventually(lambda: not gateway.app.bus.connected)
        assert not await is_ready(gateway)
        await refused(gateway, "new")
        answered = pongs(gateway)
        closing = asyncio.create_task(goes.socket.close())
        await eventually(lambda: pongs(gateway) > answered + 2)
        assert await gateway.history() == []  # no row is history before its leave is out
        own_nats.start()
        await eventually(lambda: is_ready(gateway), 10)
        assert await gap(stays) is None
        leave = await stays.hear()
        assert leave["payload"]["type"] == "agent.leave"
        assert leave["payload"]["session_id"] == success["session_id"]
        assert await gateway.reason_of(success["session_id"]) == "closed"
        await within(closing)
        client = await gateway.reconnect_nats()
        await client.publish(f"classrooms.{gateway.classroom_id}.chat", b'"whole again"')
        assert (await stays.hear())["payload"] == "whole again"
        newcomer, _ = await gateway.join("new")
        await newcomer.socket.close()


async def test_the_longer_nats_is_away_the_longer_agents_are_told_to_stay_away(
    tmp_path: Path, own_nats: NatsServer, database_url: str
) -> None:
    async with running_gateway(tmp_path, own_nats.url, database_url, reconnect_spread_s=0.2) as gateway:
        own_nats.kill()
        await eventually(lambda: not gateway.app.bus.connected)
        first = [await advice_ms(gateway) for _ in range(10)]
        assert 100 <= min(first) < max(first) < 200 + 500 * SCALE
        later: list[int] = []
        while len(later) < 10 or min(later[-10:]) <= max(first):
            later.append(await within(advice_ms(gateway)))
        assert len(set(later[-10:])) > 5  # each its own
        own_nats.start()
        await eventually(lambda: is_ready(gateway), 10)
        await gateway.join("new")
        own_nats.kill()
        await eventually(lambda: not gateway.app.bus.connected)
        assert 100 <= await advice_ms(gateway) <= 200


async def test_nats_stands_still_in_the_middle_of_a_connect(
    tmp_path: Path, own_nats: NatsServer, database_url: str
) -> None:
    async with running_gateway(tmp_path, own_nats.url, database_url) as gateway:
        own_nats.pause()
        await eventually(lambda: time.perf_counter() - gateway.app.bus._outbox.proven_at > PROOF_LASTS_S)
        newcomer = await gateway.dial()
        await newcomer.say(gateway.request("alice"))
        assert await newcomer.error(10) == ("unavailable", 4003)
        assert await gateway.rows() == await gateway.history() == []  # no row that the others cannot be told of
        own_nats.resume()
        await eventually(lambda: is_ready(gateway), 10)
        await gateway.join("alice")


async def test_the_database_goes_away_and_comes_back(
    tmp_path: Path, nats_url: str, own_postgres: PostgresDatabase
) -> None:
    async with running_gateway(tmp_path, nats_url, own_postgres.url, **FAST_HEARTBEAT) as gateway:
        overheard = await Overheard(gateway.nats).listen(f"classrooms.{gateway.classroom_id}.agent")
        stays, _ = await gateway.join("stays")
        goes, success = await gateway.join("goes")
        own_postgres.kill()
        await refused(gateway, "new")
        assert not await is_ready(gateway)
        answered = pongs(gateway)
        closing = asyncio.create_task(goes.socket.close())
        await refused(gateway, "goes")  # at once, although its close waits for the database
        await gateway.publish("chat", "still here")
        while (event := (await stays.hear())["payload"]) != "still here":
            assert event["type"] == "agent.enter"
        await eventually(lambda: pongs(gateway) > answered + 2)
        own_postgres.start()
        await within(closing)
        await eventually(lambda: is_ready(gateway), 10)
        await gateway.reconnect_database()
        assert await gateway.reason_of(success["session_id"]) == "closed"
        await eventually(lambda: ("agent.leave", "web.goes.presence") in overheard.events())
        await gateway.join("new")
        assert [kind for kind, agent_id in overheard.events() if "goes" in agent_id] == ["agent.enter", "agent.leave"]


async def test_the_database_stands_still_in_the_middle_of_a_connect(
    tmp_path: Path, nats_url: str, own_postgres: PostgresDatabase
) -> None:
    async with running_gateway(tmp_path, nats_url, own_postgres.url) as gateway:
        overheard = await Overheard(gateway.nats).listen("classrooms.*.agent")
        own_postgres.pause()
        newcomer = await gateway.dial()
        await newcomer.say(gateway.request("alice"))
        assert await newcomer.error(10) == ("unavailable", 4003)
        own_postgres.resume()
        await eventually(lambda: is_ready(gateway), 10)
        await gateway.app.store.flush()
        assert await gateway.rows() == []  # neither is a row left that nobody holds
        agent, success = await gateway.join("alice")
        await agent.socket.close()
        await gateway.reason_of(success["session_id"])
        await gateway.nats.flush()
        assert overheard.events() == [("agent.enter", "web.alice.presence"), ("agent.leave", "web.alice.presence")]
