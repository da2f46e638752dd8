"""The cluster that these tests share, and the options that say how many schedules to run, and which.

Owns one event loop for all of them: processes and sockets live through the session.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from crew import Crew, crew_of

from cluster import Cluster, running_cluster

SCHEDULES = 100
FIRST_SEED = 1
SECONDS_FOR_ONE = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cluster")
    group.addoption(
        "--chaos", type=int, metavar="N", help=f"how many schedules to run, random ones; default {SCHEDULES}"
    )
    group.addoption(
        "--cluster-seed", type=int, metavar="SEED", help="run this schedule only, or from this one with --chaos"
    )
    group.addoption("--no-shrink", action="store_true", help="report a schedule that fails as it is")


def seeds(config: pytest.Config) -> list[int]:
    """Without options always the same ones; with --chaos others every time."""
    count, seed = config.getoption("--chaos", None), config.getoption("--cluster-seed", None)
    if count is None:
        return [seed] if seed is not None else list(range(FIRST_SEED, FIRST_SEED + SCHEDULES))
    first = seed if seed is not None else random.randrange(10**9)
    return list(range(first, first + count))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds(metafunc.config))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(shared_cluster: Cluster) -> Cluster:
    """Three replicas, ready, over one NATS and one PostgreSQL."""
    await shared_cluster.heal()
    return shared_cluster


@pytest_asyncio.fixture(loop_scope="session")
async def crew(cluster: Cluster) -> AsyncIterator[Crew]:
    """Agents in a classroom of their own."""
    async with crew_of(cluster) as crew:
        yield crew
