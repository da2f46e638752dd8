"""The scaling law: costs fitted to what was measured, and how many replicas, cores and messages they make. Pure: numbers only.

The CPU of the replicas over a stretch of time is taken to be a sum: so much for each replica, for each agent that is connected,
for each event that reaches a replica, and for each frame that goes out. The coefficients are fitted by least squares of the
relative errors, so that a window of a thousand agents counts as much as one of eighteen thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SESSION_S = 45 * 60.0  # how long an agent stays
LESSON_START_S = 600.0  # in which all arrive, at the worst
LEASE_RENEWALS_PER_S = 1 / 5  # of each replica
ROWS_OF_AN_OPENING = 1
ROWS_OF_A_CLOSE = 2  # deleted, and inserted into the history


@dataclass(frozen=True)
class Fit:
    """`y` is the sum of each coefficient times its quantity. `errors`: relative, one for each measurement."""

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def worst(self) -> float:
        return max(abs(error) for error in self.errors)

    @property
    def typical(self) -> float:
        """Root of the mean square."""
        return math.sqrt(sum(error**2 for error in self.errors) / len(self.errors))


def fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> Fit:
    """Least squares of the relative errors; values are positive, and no cost is negative: one that would be is 0.

    Raises ValueError when the rows do not tell the quantities apart.
    """
    scaled = [[x / y for x in row] for row, y in zip(rows, values, strict=True)]
    used = list(range(len(rows[0])))
    while True:
        normal = [[sum(row[i] * row[j] for row in scaled) for j in used] for i in used]
        found = dict(zip(used, solve(normal, [sum(row[i] for row in scaled) for i in used]), strict=True))
        least = min(found, key=lambda i: found[i])
        if found[least] >= 0:
            break
        used.remove(least)
    coefficients = tuple(found.get(i, 0.0) for i in range(len(rows[0])))
    errors = tuple(sum(c * x for c, x in zip(coefficients, row, strict=True)) - 1 for row in scaled)
    return Fit(coefficients, errors)


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Gauss's elimination with pivots."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-12 * max(abs(value) for value in matrix[i]):
            raise ValueError("the measurements do not tell these quantities apart")
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


@dataclass(frozen=True)
class Costs:
    """What was fitted. CPU in microseconds, of the replicas unless it says otherwise; memory in bytes."""

    replica_us_per_s: float
    agent_us_per_s: float
    event_us: float  # for each replica that it reaches
    frame_us: float
    connect_us: float  # with agent.enter to the others, on one replica
    close_us: float  # with agent.leave
    replica_bytes: float
    agent_bytes: float
    nats_us_per_s: float  # of nats-server, while anything is published
    nats_in_us: float  # and for each message that is published
    nats_out_us: float  # and for each that it delivers to a replica
    postgres_open_us: float  # of PostgreSQL, for a session that is opened
    postgres_close_us: float


@dataclass(frozen=True)
class Demand:
    agents: int
    events_per_s: float  # to each classroom
    room_size: int = 30

    @property
    def rooms(self) -> float:
        return self.agents / self.room_size


@dataclass(frozen=True)
class Load:
    """What goes on in a second."""

    cores: float  # of all replicas
    nats_in: float
    nats_out: float
    nats_cores: float
    rows: float
    postgres_cores: float


@dataclass(frozen=True)
class Sizing:
    """For one demand. `steady`: agents come and go; `arrival`: a lesson's start, all come within LESSON_START_S."""

    replicas: int
    memory_bytes: float
    steady: Load
    arrival: Load


def reached(replicas: int, room_size: int) -> float:
    """How many replicas have a member of a classroom, when a load balancer spreads them evenly."""
    return replicas * (1 - (1 - 1 / replicas) ** room_size)


def size(demand: Demand, costs: Costs, *, agents_max: int, share_max: float) -> Sizing:
    """As few replicas as hold the agents and use no more of a core each, at a lesson's start too."""
    replicas = max(1, math.ceil(demand.agents / agents_max))
    while (sizing := _with(replicas, demand, costs)).arrival.cores / replicas > share_max:
        replicas += 1
    return sizing


def _with(replicas: int, demand: Demand, costs: Costs) -> Sizing:
    turnover = demand.agents / SESSION_S
    return Sizing(
        replicas=replicas,
        memory_bytes=costs.replica_bytes * replicas + costs.agent_bytes * demand.agents,
        steady=_load(replicas, demand, costs, opened=turnover, closed=turnover),
        arrival=_load(replicas, demand, costs, opened=demand.agents / LESSON_START_S, closed=0.0),
    )


def _load(replicas: int, demand: Demand, costs: Costs, *, opened: float, closed: float) -> Load:
    """With so many sessions opened and closed a second."""
    each = reached(replicas, demand.room_size)
    events = demand.rooms * demand.events_per_s
    published = events + opened + closed
    cpu_us = (
        costs.replica_us_per_s * replicas
        + costs.agent_us_per_s * demand.agents
        + costs.event_us * (events * each + (opened + closed) * (each - 1))
        + costs.frame_us * events * demand.room_size
        + costs.connect_us * opened
        + costs.close_us * closed
    )
    return Load(
        cores=cpu_us / 1e6,
        nats_in=published,
        nats_out=published * each,
        nats_cores=(costs.nats_us_per_s + published * (costs.nats_in_us + costs.nats_out_us * each)) / 1e6,
        rows=opened * ROWS_OF_AN_OPENING + closed * ROWS_OF_A_CLOSE + replicas * LEASE_RENEWALS_PER_S,
        postgres_cores=(opened * costs.postgres_open_us + closed * costs.postgres_close_us) / 1e6,
    )
