"""The swarm against the real gateway: what its agents do, and what is recorded of it."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from loadtest.figures import Figures
from running import Running, running_gateway

from presence_swarm import swarm
from waiting import SCALE

AUTH_S, PING_S, PONG_S = 0.5, 0.4, 0.3
LATE_MS = 100 * max(1.0, SCALE) * (5 if os.environ.get("CI") else 3)  # others use the machine too


class Crowd:
    """A swarm that runs in a thread while the gateway runs in the test's loop, and all it has recorded."""

    def __init__(self, running: Running, capacity: int = 50) -> None:
        self.running = running
        self.swarm = swarm.Swarm(capacity)
        self.swarm.set_targets([running.app.gateway.port])
        self.figures = Figures()
        self.added = 0

    def add(self, count: int, behaviour: int = swarm.GOOD, classroom_id: str | None = None) -> None:
        for _ in range(count):
            self.added += 1
            request = self.running.request(f"agent-{self.added}", classroom_id=classroom_id)
            self.swarm.add(json.dumps(request).encode(), 0, 0, behaviour)

    async def run_until(self, predicate: Callable[[dict[str, int]], bool], seconds: float = 5.0) -> dict[str, int]:
        async with asyncio.timeout(seconds * SCALE):
            while True:
                await asyncio.to_thread(self.swarm.run, 20)
                self.figures.add(self.swarm.take())
                if predicate(gauges := self.swarm.gauges()):
                    return gauges

    async def all_connected(self) -> dict[str, int]:
        return await self.run_until(lambda gauges: gauges["connected"] == gauges["agents"])


@asynccontextmanager
async def gateway(folder: Path, nats_url: str, database_url: str, **options: Any) -> AsyncIterator[Running]:
    settings = {
        "auth_timeout_s": AUTH_S,
        "ping_interval_s": PING_S,
        "pong_timeout_s": PONG_S,
        "reconnect_spread_s": 0.1,
    }
    async with running_gateway(folder, nats_url, database_url, **{**settings, **options}) as running:
        yield running


@pytest.fixture
async def running(tmp_path: Path, nats_url: str, database_url: str) -> AsyncIterator[Running]:
    async with gateway(tmp_path, nats_url, database_url) as running:
        yield running


def stamped(number: int) -> bytes:
    return f'{{"at":{swarm.now_ns()},"n":{number},"text":"hello"}}'.encode()


async def test_agents_connect_and_leave(running: Running) -> None:
    crowd = Crowd(running)
    crowd.add(5)
    await crowd.all_connected()
    assert len(await running.rows()) == 5
    connect = crowd.figures.by_group["connect"][0]
    assert connect.count == crowd.figures.counters["attempts"] == 5
    assert 0 < connect.least_ms <= connect.percentile_ms(0.5) <= connect.most_ms < 5000
    assert crowd.swarm.leave() == 5
    gauges = await crowd.run_until(lambda gauges: gauges["links"] == 0)
    assert (gauges["connected"], gauges["done"]) == (0, 5)
    assert crowd.figures.plain["farewell"].count == 5
    assert crowd.figures.closes == {(1000, "left"): 5}
    assert crowd.figures.unasked_closes() == {}
    assert not await running.rows()


async def test_events_are_timed_and_counted(running: Running) -> None:
    crowd = Crowd(running)
    crowd.add(3)
    await crowd.all_connected()
    for number in (1, 2, 3):
        await running.publish("chat", stamped(number))
    await running.publish("chat", {"text": "without a stamp"})
    await crowd.run_until(lambda _: crowd.figures.counters["events"] == 9)
    gauges = await crowd.run_until(lambda _: crowd.figures.counters["other_events"] >= 3)
    assert [crowd.swarm.events_of(i) for i in range(3)] == [3, 3, 3]
    delivery = crowd.figures.by_group["delivery"][0]
    assert delivery.count == 9
    assert 0 < delivery.least_ms < delivery.most_ms < 1000 * SCALE
    assert crowd.figures.counters["missing"] == gauges["pending"] == 0


async def test_numbers_that_do_not_come_are_missing(running: Running) -> None:
    crowd = Crowd(running)
    crowd.add(1)
    await crowd.all_connected()
    for number in (1, 3, 3, 100, 99, 300):
        await running.publish("chat", stamped(number))
    await crowd.run_until(lambda _: crowd.figures.counters["events"] == 6)
    assert crowd.figures.counters["repeats"] == 1
    # 1, 3, 99, 100 and 300 have come; the last 64 numbers are still waited for.
    pending = crowd.swarm.gauges()["pending"]
    assert pending == 63
    assert crowd.figures.counters["missing"] == 300 - 5 - pending


async def test_pings_come_in_their_time_and_are_answered(running: Running) -> None:
    crowd = Crowd(running)
    crowd.add(4)
    await crowd.all_connected()
    await crowd.run_until(lambda _: crowd.figures.counters["pings"] >= 16)
    cadence = crowd.figures.by_group["cadence"][0]
    assert cadence.count == crowd.figures.counters["pings"]
    assert cadence.percentile_ms(0.5) < LATE_MS
    assert crowd.swarm.gauges()["connected"] == 4
    assert not crowd.figures.closes


async def test_agents_that_answer_no_ping_are_closed(running: Running) -> None:
    crowd = Crowd(running)
    crowd.add(3, swarm.MUTE)
    crowd.add(1)
    await crowd.run_until(lambda gauges: gauges["done"] == 3)
    assert crowd.figures.closes == {(4001, "pong_timed_out"): 3}
    unanswered = crowd.figures.plain["unanswered"]
    assert unanswered.count == 3
    assert PONG_S * 1000 - 5 <= unanswered.least_ms <= unanswered.most_ms <= PONG_S * 1000 + LATE_MS
    assert crowd.swarm.gauges()["connected"] == 1


async def test_agents_that_say_nothing_are_closed(running: Running) -> None:
    crowd = Crowd(running)
    crowd.add(3, swarm.SILENT)
    await crowd.run_until(lambda gauges: gauges["done"] == 3)
    assert crowd.figures.closes == {(4500, "auth_timed_out"): 3}
    silent = crowd.figures.plain["silent"]
    assert AUTH_S * 1000 - 5 <= silent.least_ms <= silent.most_ms <= AUTH_S * 1000 + LATE_MS


async def test_agents_that_read_nothing_are_closed(running: Running) -> None:
    crowd = Crowd(running)
    crowd.add(2, swarm.DEAF)
    gauges = await crowd.run_until(lambda gauges: gauges["done"] == 2, 10)
    assert gauges["links"] == 0
    assert sum(crowd.figures.closes.values()) == 2


async def test_agents_move_when_their_replica_ends(tmp_path: Path, nats_url: str, database_url: str) -> None:
    options: dict[str, Any] = {"drain_timeout_s": 1.0}
    async with gateway(tmp_path, nats_url, database_url, **options) as old:
        crowd = Crowd(old)
        crowd.add(4)
        crowd.add(2, swarm.STAYING)
        await crowd.all_connected()
        async with gateway(tmp_path, nats_url, database_url, signer=old.signer, **options) as new:
            crowd.swarm.set_targets([new.app.gateway.port])
            draining = asyncio.create_task(old.app.drain())
            await crowd.run_until(lambda gauges: draining.done() and gauges["connected"] == gauges["links"] == 6)
            assert await draining
            assert crowd.figures.counters["terminated"] == 6
            assert crowd.figures.counters["connects"] == 12
            assert crowd.figures.plain["outage"].count >= 2
            assert {replica_id for *_, replica_id in [(r["id"], r["replica_id"]) for r in await new.rows()]} == {
                new.app.replica_id
            }


async def test_agents_connect_again_elsewhere_a_few_at_once(tmp_path: Path, nats_url: str, database_url: str) -> None:
    async with gateway(tmp_path, nats_url, database_url) as old:
        crowd = Crowd(old)
        crowd.add(12)
        await crowd.all_connected()
        async with gateway(tmp_path, nats_url, database_url, signer=old.signer) as new:
            crowd.swarm.set_targets([new.app.gateway.port])
            crowd.swarm.connect(3, first=2)
            under_way = []

            def are_over(gauges: dict[str, int]) -> bool:
                under_way.append(gauges["dialling"] + gauges["upgrading"] + gauges["waiting"])
                return crowd.figures.counters["connects"] == 22 and gauges["links"] == 12

            await crowd.run_until(are_over)
            assert max(under_way) <= 3
            assert crowd.figures.closes == {(4505, "replaced"): 10}
            assert crowd.figures.connected_last_ns > 0
            owners = [row["replica_id"] for row in await new.rows()]
            assert owners.count(new.app.replica_id) == 10
            assert owners.count(old.app.replica_id) == 2


async def test_a_replica_that_refuses_is_tried_again(running: Running) -> None:
    crowd = Crowd(running)
    crowd.swarm.set_targets([1])  # nothing listens there
    crowd.add(2)
    await crowd.run_until(lambda _: crowd.figures.counters["refusals"] >= 2)
    assert crowd.swarm.gauges()["errno"] != 0
    running.app.gateway.draining = True  # answers 503
    crowd.swarm.set_targets([running.app.gateway.port])
    before = crowd.figures.counters["refusals"]
    await crowd.run_until(lambda _: crowd.figures.counters["refusals"] > before)
    running.app.gateway.draining = False
    await crowd.all_connected()


async def test_an_agent_that_may_not_come_back_stays_away(running: Running) -> None:
    crowd = Crowd(running)
    crowd.swarm.add(b'{"type":"nonsense"}')
    gauges = await crowd.run_until(lambda gauges: gauges["done"] == 1)
    assert gauges["links"] == 0
    assert crowd.figures.closes == {(4502, "unsupported_request"): 1}
    assert crowd.figures.counters["attempts"] == 1


def test_bounds_of_what_may_be_asked() -> None:
    with pytest.raises(ValueError, match="agents"):
        swarm.Swarm(0)
    own = swarm.Swarm(1)
    with pytest.raises(ValueError, match="ports"):
        own.set_targets([0])
    with pytest.raises(ValueError, match="behaviour"):
        own.add(b"{}", 0, 0, 9)
    with pytest.raises(ValueError, match="group"):
        own.add(b"{}", 0, 4)
    with pytest.raises(ValueError, match="window"):
        own.connect(0)
    own.add(str(uuid.uuid4()).encode())
    with pytest.raises(ValueError, match="full"):
        own.add(b"{}")
    with pytest.raises(IndexError):
        own.events_of(1)
    own.run(1)
    assert len(own) == 1
