"""What the micro-benchmarks share: each reports nanoseconds for one operation, measured inside its own loop.

A Python call costs more than most of what is measured here, so the time of a round says little; `ns_each` is the figure.
It is in the JSON as `extra_info` and in a table at the end of the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest

ROUNDS = 5

Loop = Callable[[], float]  # runs many operations and returns the nanoseconds that one of them took
Report = Callable[[Loop], None]

readings: list[tuple[str, str, str, float]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=ROUNDS, help=f"rounds of every benchmark ({ROUNDS})")


@pytest.fixture
def ns_each(benchmark: Any, request: pytest.FixtureRequest) -> Report:
    """Runs a loop a few times; the figure is the median, the JSON has every round. With --benchmark-disable it runs once."""

    def report(loop: Loop) -> None:
        rounds: list[float] = []
        benchmark.pedantic(lambda: rounds.append(loop()), rounds=request.config.getoption("--rounds"), warmup_rounds=1)
        counted = rounds[1:] or rounds  # the first one warms up
        benchmark.extra_info["ns_each"] = [round(ns, 1) for ns in counted]
        parameters = request.node.callspec.params
        readings.append((benchmark.group, parameters["who"], str(parameters["size"]), statistics.median(counted)))

    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for group in dict.fromkeys(reading[0] for reading in readings):
        rows = [reading for reading in readings if reading[0] == group]
        sizes = list(dict.fromkeys(size for _, _, size, _ in rows))
        terminalreporter.section(f"{group}, ns each")
        terminalreporter.write_line(f"{'':28}" + "".join(f"{size:>12}" for size in sizes))
        for who in dict.fromkeys(who for _, who, _, _ in rows):
            figures = {size: ns for _, name, size, ns in rows if name == who}
            cells = "".join(f"{figures[size]:12,.1f}" if size in figures else f"{'':12}" for size in sizes)
            terminalreporter.write_line(f"{who:28}{cells}")
