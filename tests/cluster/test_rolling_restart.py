"""A rolling restart: the agents move, the others notice nothing, and nobody misses an event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from crew import Crew, Publisher

from cluster import SPREAD_S, Cluster
from waiting import SCALE, eventually, within

pytestmark = pytest.mark.asyncio(loop_scope="session")

AGENTS = 450
# Hundreds of clients share this process: a pong may be late here, and that is not what is looked at.
PATIENT = {"ping-interval-s": "5", "pong-timeout-s": "4", "drain-timeout-s": "3", "connect-timeout-s": "5"}


@asynccontextmanager
async def publishing(publisher: Publisher, interval_s: float) -> AsyncIterator[None]:
    task = asyncio.create_task(publisher.publish(interval_s))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest_asyncio.fixture(loop_scope="session")
async def patient(cluster: Cluster) -> AsyncIterator[Cluster]:
    options = [replica.options for replica in cluster.replicas]
    for replica in cluster.replicas:
        replica.options = {**replica.options, **PATIENT}
    await asyncio.gather(*(restart(cluster, number) for number in range(3)))
    yield cluster
    for replica, before in zip(cluster.replicas, options, strict=True):
        replica.options = before
    await asyncio.gather(*(restart(cluster, number) for number in range(3)))


async def restart(cluster: Cluster, number: int) -> None:
    replica = cluster.replicas[number]
    replica.drain()
    assert await replica.ended(15) == 0
    await replica.start()
    await eventually(replica.is_ready)


async def test_three_replicas_one_after_the_other(patient: Cluster, crew: Crew) -> None:
    agents = [crew.agent(f"agent{number}", idle_s=10 * SCALE) for number in range(AGENTS)]
    for number, agent in enumerate(agents):
        agent.come()
        if number % 50 == 49:
            await asyncio.sleep(0.2)
    await crew.all_in(30)
    publisher = Publisher(patient, crew.room)
    began = asyncio.get_running_loop().time()
    async with publishing(publisher, 0.25):
        for number in range(3):
            moving = [
                agent for agent in agents if agent.current and agent.current.life.replica == life_of(patient, number)
            ]
            assert len(moving) > AGENTS / 20
            await restart(patient, number)
            await crew.all_in(15)
        await asyncio.sleep(0.5)
    await within(patient.ear.flush(), 20)
    kinds = [told.kind for agent in agents for told in patient.ear.sequence(agent.key) if told.at > began]
    assert kinds == []  # neither leave nor enter
    with contextlib.suppress(TimeoutError):
        await eventually(lambda: not missing(crew, publisher), 3)
    lost = missing(crew, publisher)
    assert lost == [], (len(lost), lost[:10])
    assert [key for key in {agent.key for agent in agents} if offline_s(crew, key) > SPREAD_S + 1.0 * SCALE] == []
    await crew.settled(20)


def life_of(cluster: Cluster, number: int) -> str:
    return cluster.replicas[number].life


def missing(crew: Crew, publisher: Publisher) -> list[tuple[str, str, str]]:
    """(agent, message, its sockets) of what an agent did not get though it held a socket on either side when it was published."""
    lost = []
    for agent in crew.agents:
        lives = [life for life in crew.record.lives_of(agent.key) if life.success_at is not None]
        heard = {message for life in lives for message in life.events}
        for began, at, message in publisher.sent:
            holds = any(life.success_at <= began and at <= (life.left_at or life.ended_at or at) for life in lives)
            if holds and message not in heard:
                spans = [
                    (life.replica, life.success_at - at, (life.left_at or life.ended_at or at) - at) for life in lives
                ]
                lost.append((agent.key[1], message, str(spans)))
    assert not any(life.gaps for life in crew.record.lives)
    return lost


def offline_s(crew: Crew, key: tuple[str, str]) -> float:
    """The longest time without any socket between the first and the last."""
    spans = sorted(
        (life.success_at, life.left_at or life.ended_at or float("inf"))
        for life in crew.record.lives_of(key)
        if life.success_at is not None
    )
    longest, until = 0.0, spans[0][1]
    for start, end in spans[1:]:
        longest, until = max(longest, start - until), max(until, end)
    return longest
