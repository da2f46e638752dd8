"""The scenarios by name: each a function of a run, a judge and nothing else, in a module of its own.

Owns the list. A scenario opens the run with what it needs, plays its part, and leaves verdicts with the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from loadtest.running import Run
from loadtest.scenarios import (
    crash,
    database_stall,
    deploy,
    lesson_start,
    moving,
    mute_agents,
    replacement,
    steady,
    sweep,
    webinar_flood,
)
from loadtest.verdicts import Judge

Scenario: TypeAlias = Callable[[Run, Judge], None]

SCENARIOS: dict[str, Scenario] = {
    module.__name__.rpartition(".")[2]: module.play
    for module in (
        lesson_start,
        steady,
        webinar_flood,
        mute_agents,
        deploy,
        moving,
        replacement,
        crash,
        sweep,
        database_stall,
    )
}
OF_TWO_REPLICAS = frozenset({"moving", "replacement", "sweep"})  # neither more nor fewer
