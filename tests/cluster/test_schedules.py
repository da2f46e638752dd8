"""Random schedules of agents and faults: when all is healed, everything that was promised is true."""

from __future__ import annotations

import pytest
from schedules import Run, generate, shrunk

from cluster import Cluster
from waiting import within

pytestmark = pytest.mark.asyncio(loop_scope="session")

RUN_S = 50.0
SHRINK_S = 60.0


async def test_a_random_schedule(cluster: Cluster, seed: int, request: pytest.FixtureRequest) -> None:
    schedule = generate(seed)
    found = await within(Run(cluster, schedule).flaws(), RUN_S)
    if found:
        shortest = schedule
        if not request.config.getoption("--no-shrink", False):
            shortest, found = await shrunk(cluster, schedule, found, SHRINK_S)
        pytest.fail(
            f"{len(found)} flaws; again with --cluster-seed {seed}\n"
            + "\n".join(found[:20])
            + f"\n{shortest}\nlogs in {cluster.folder}",
            pytrace=False,
        )
