"""Leases: a dead replica's sessions end, one that wakes up or is reached again brings its agents back."""

from __future__ import annotations

import asyncio
import time

import pytest
from crew import FOREVER_S, Crew
from replica import Replica

from cluster import LEASE_S, Cluster
from waiting import SCALE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")

# The next look at the leases comes within a third of one, and a little at random.
SWEEP_S = LEASE_S / 3 + 0.1


def heartbeat_of(cluster: Cluster, replica: Replica) -> float | None:
    """The last heartbeat, in seconds since 1970; None when the replica has no row."""
    sql = f"SELECT extract(epoch FROM heartbeat_at) FROM replica WHERE label = '{replica.life}'"
    answer = cluster.postgres.psql(sql)
    return float(answer) if answer else None


async def test_the_sessions_of_a_dead_replica_end_once(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    names = [f"agent{number}" for number in range(20)]
    await asyncio.gather(*(crew.join(name, a) for name in names))
    watcher = await crew.join("watcher", b)
    await a.kill()
    killed = time.monotonic()
    heartbeat = heartbeat_of(cluster, a)
    await eventually(lambda: all_left(crew, names), LEASE_S + SWEEP_S + 0.5)
    assert time.monotonic() - killed <= LEASE_S + SWEEP_S + 0.5 * SCALE
    await crew.settled()
    for name in names:
        [past] = [row for row in crew.record.rows if row.key == crew.key(name)]
        assert past.reason == "replica_lost"
        assert past.began is not None
        assert past.ended is not None
        assert heartbeat is not None
        assert abs(past.ended - max(heartbeat, past.began)) < 0.001
    assert [await crew.told(name) for name in names] == [["enter", "leave"]] * 20
    leaves = [event for event in watcher.life.events.values() if event["type"] == "agent.leave"]
    assert len(leaves) == 20  # however many survivors there are
    assert cluster.ear.raw_leaves(crew.room) == 20


async def all_left(crew: Crew, names: list[str]) -> bool:
    assert await crew.record.look()
    live = {row.key for row in crew.record.rows if row.place == "live"}
    return not live & {crew.key(name) for name in names}


async def test_a_replica_that_wakes_up_swept_brings_its_agents_back(cluster: Cluster, crew: Crew) -> None:
    a, b, _ = cluster.replicas
    stays = await crew.join("stays", a)
    moves = await crew.join("moves", a)
    goes = await crew.join("goes", a)
    a.freeze()
    await eventually(lambda: heartbeat_of(cluster, a) is None, 3 * LEASE_S)
    assert await crew.told("stays") == ["enter", "leave"]
    moved = await crew.join("moves", b)
    goes.abort()
    a.thaw()
    woken = time.monotonic()
    await crew.settled(LEASE_S)
    assert time.monotonic() - woken < LEASE_S * SCALE
    assert stays.life.is_live or 4000 <= (stays.life.code or 0) < 4500
    assert (moves.life.is_live, moves.life.code, moved.life.is_live) == (False, 4505, True)
    assert await crew.live("goes") == []
    assert await crew.told("goes") == ["enter", "leave"]
    assert await crew.told("moves") == ["enter", "leave", "enter"]
    if stays.life.is_live:
        assert await crew.told("stays") == ["enter", "leave", "enter"]
        await stays.close()
        await crew.settled()
        assert await crew.told("stays") == ["enter", "leave", "enter", "leave"]


@pytest.mark.parametrize("how", ["refuses", "silent"])
async def test_a_replica_without_the_database_for_longer_than_its_lease(cluster: Cluster, crew: Crew, how: str) -> None:
    a, b, _ = cluster.replicas
    stays = crew.agent("stays", [a])
    stays.come()
    moves = await crew.join("moves", a)
    await crew.all_in()
    setattr(a.postgres, how, True)
    if how == "refuses":
        a.postgres.cut()
    await eventually(lambda: heartbeat_of(cluster, a) is None, 4 * LEASE_S)
    assert stays.current is not None
    assert stays.current.life.is_live  # pinged all the time: a good client would have gone otherwise
    assert moves.life.is_live
    moved = await crew.join("moves", b)
    a.heal()
    await eventually(a.is_ready, 10)
    await crew.settled()
    assert (moves.life.code, moved.life.is_live) == (4505, True)
    await crew.all_in()
    assert len(await crew.live("stays")) == 1
    assert await crew.told("stays") == ["enter", "leave", "enter"]


async def test_a_replica_that_stood_still_for_less_than_its_lease_loses_nothing(cluster: Cluster, crew: Crew) -> None:
    a, _, _ = cluster.replicas
    agents = [crew.agent(f"agent{number}", [a], idle_s=FOREVER_S) for number in range(10)]
    for agent in agents:
        agent.come()
    await crew.all_in()
    sessions = [await crew.live(f"agent{number}") for number in range(10)]
    a.freeze()
    await asyncio.sleep(LEASE_S / 3)
    a.thaw()
    await asyncio.sleep(LEASE_S)
    await crew.settled()
    assert [await crew.live(f"agent{number}") for number in range(10)] == sessions
    assert [await crew.told(f"agent{number}") for number in range(10)] == [["enter"]] * 10
