"""One session for each agent and classroom, on whatever replicas it connects, and whatever became of the owner."""

from __future__ import annotations

import asyncio
import time

import pytest
from crew import Crew

from cluster import LEASE_S, Cluster
from waiting import SCALE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_replaced_on_another_replica_whose_owner_is_alive(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    first = await crew.join("alice", a)
    second = await crew.join("alice", b)
    await eventually(lambda: first.life.ended_at)
    assert ([why for _, why in first.life.errors], first.life.code) == (["replaced"], 4505)
    assert await crew.live("alice") == [second.life.session_id]
    [past] = await crew.past("alice")
    assert (past.session_id, past.reason) == (first.life.session_id, "replaced")
    assert await crew.told("alice") == ["enter"]
    await second.close()
    await crew.settled()
    assert await crew.told("alice") == ["enter", "leave"]


async def test_replaced_on_another_replica_whose_owner_stands_still(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    first = await crew.join("alice", a)
    a.freeze()
    started = time.monotonic()
    second = await crew.join("alice", b)
    assert 0.4 < time.monotonic() - started < 0.5 + 0.4 * SCALE
    assert await crew.told("alice") == ["enter"]
    assert first.life.is_live
    a.thaw()
    await eventually(lambda: first.life.ended_at)
    assert ([why for _, why in first.life.errors], first.life.code) == (["replaced"], 4505)
    await crew.settled()
    assert await crew.live("alice") == [second.life.session_id]
    assert await crew.told("alice") == ["enter"]


async def test_replaced_on_another_replica_whose_owner_was_killed(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    first = await crew.join("alice", a)
    await a.kill()
    await eventually(lambda: first.life.ended_at)
    started = time.monotonic()
    second = await crew.join("alice", b)
    assert time.monotonic() - started < 0.5 + 0.4 * SCALE
    assert await crew.told("alice") == ["enter"]
    await eventually(lambda: _is_swept(cluster, a.life), 3 * LEASE_S)
    await crew.settled()
    assert await crew.live("alice") == [second.life.session_id]
    assert await crew.told("alice") == ["enter"]


async def _is_swept(cluster: Cluster, life: str) -> bool:
    return cluster.postgres.psql(f"SELECT count(*) FROM replica WHERE label = '{life}'") == "0"


async def test_an_owner_that_cannot_be_asked_finds_out_by_itself(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    first = await crew.join("alice", a)
    a.nats.refuses = True
    a.nats.cut()
    await eventually(lambda: _is_unready(a))
    second = await crew.join("alice", b)
    await eventually(lambda: first.life.ended_at, LEASE_S)  # cut off still, and it knows
    assert first.life.code == 4505
    a.heal()
    await crew.settled()
    assert await crew.live("alice") == [second.life.session_id]
    assert await crew.told("alice") == ["enter"]


async def _is_unready(replica: object) -> bool:
    return not await replica.is_ready()  # type: ignore[attr-defined]


@pytest.mark.parametrize("returns", [True, False])
async def test_a_close_waits_while_nobody_can_be_told(cluster: Cluster, crew: Crew, returns: bool) -> None:
    a, b, _ = cluster.replicas
    first = await crew.join("alice", a)
    a.nats.refuses = True
    a.nats.cut()
    await eventually(lambda: _is_unready(a))
    first.abort()
    second = await crew.join("alice", b) if returns else None
    await asyncio.sleep(0.2)
    assert await crew.told("alice") == ["enter"]
    a.heal()
    await eventually(a.is_ready, 10)
    await crew.settled()
    assert await crew.told("alice") == (["enter"] if returns else ["enter", "leave"])
    assert await crew.live("alice") == ([second.life.session_id] if second else [])


async def test_a_connect_that_was_given_up_does_not_replace_the_next(cluster: Cluster, crew: Crew) -> None:
    a, b, c = cluster.replicas
    first = await crew.join("alice", a)
    a.freeze()
    given_up = await crew.ask("alice", b)
    await asyncio.sleep(0.1)
    given_up.abort()
    await asyncio.sleep(0.1)
    last = await crew.join("alice", c)
    a.thaw()
    await crew.settled()
    assert last.life.is_live
    assert await crew.live("alice") == [last.life.session_id]
    assert first.life.session_id in [row.session_id for row in await crew.past("alice")]
    assert (await crew.told("alice"))[-1] == "enter"


async def test_one_that_comes_and_goes_ten_times_a_second(cluster: Cluster, crew: Crew) -> None:
    started = time.monotonic()
    for number in range(40):
        replica = cluster.replicas[number % 3]
        socket = await crew.ask("alice", replica)
        if number % 2:
            assert await socket.entered()
        if number % 3:
            await asyncio.sleep(0.01)
            socket.abort()
        await asyncio.sleep(max(0.0, started + (number + 1) / 10 - time.monotonic()))
    last = await crew.join("alice", cluster.replicas[0])
    await crew.settled()
    assert last.life.is_live
    assert await crew.live("alice") == [last.life.session_id]
    assert (await crew.told("alice"))[-1] == "enter"
    await last.close()
    await crew.settled()
    assert await crew.live("alice") == []
