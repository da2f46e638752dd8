"""What bench/compare.py calls slower: only what is slower by itself and beside its peers, beyond the noise of both runs."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
changes = importlib.import_module("changes")
figures = importlib.import_module("figures")

STEADY = [100.0, 101.0, 102.0]


def series(*values: float) -> Any:
    return figures.Series([figures.Reading(value) for value in values])


def pair(kept: list[float], new: list[float]) -> Any:
    return changes.Pair(series(*kept), series(*new))


def scaled(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def judged(own: Any, *peers: Any, more_is_better: bool = False, is_same_machine: bool = True) -> Any:
    named = {f"peer {number}": peer for number, peer in enumerate(peers)}
    return changes.change_of(
        "figure", own, named, more_is_better=more_is_better, allowance=0.1, is_same_machine=is_same_machine
    )


def test_the_same_again_is_as_before() -> None:
    change = judged(pair(STEADY, STEADY), pair(STEADY, STEADY))
    assert (change.factor, change.verdict) == (1.0, "as before")


def test_what_alone_became_slower_is_slower() -> None:
    change = judged(pair(STEADY, scaled(STEADY, 1.3)), pair(STEADY, STEADY))
    assert change.factor == pytest.approx(1.3)
    assert change.is_slower
    assert change.verdict == "SLOWER"


def test_a_slow_machine_slows_everything_down() -> None:
    slow = scaled(STEADY, 3.0)
    change = judged(pair(STEADY, slow), pair(STEADY, slow))
    assert change.factor == pytest.approx(1.0)
    assert not change.is_slower


def test_a_peer_in_a_good_moment_makes_nothing_slower() -> None:
    change = judged(pair(STEADY, STEADY), pair(STEADY, scaled(STEADY, 0.5)))
    assert change.factor == pytest.approx(1.0)
    assert not change.is_slower


def test_of_a_slow_machine_only_what_is_slower_than_its_peers_counts() -> None:
    change = judged(pair(STEADY, scaled(STEADY, 3.0)), pair(STEADY, scaled(STEADY, 2.0)))
    assert change.factor == pytest.approx(1.5)
    assert change.is_slower


def test_another_machine_is_judged_by_the_peers_alone() -> None:
    own = pair(STEADY, STEADY)  # on a machine that is twice as fast
    change = judged(own, pair(STEADY, scaled(STEADY, 0.5)), is_same_machine=False)
    assert change.factor == pytest.approx(2.0)
    assert change.is_slower


def test_a_rate_that_fell_is_a_cost_that_grew() -> None:
    fallen = judged(pair(STEADY, scaled(STEADY, 0.5)), pair(STEADY, STEADY), more_is_better=True)
    assert fallen.factor == pytest.approx(2.0)
    assert fallen.is_slower
    risen = judged(pair(STEADY, scaled(STEADY, 2.0)), pair(STEADY, STEADY), more_is_better=True)
    assert risen.factor == pytest.approx(0.5)
    assert risen.verdict == "faster"


def test_what_only_looks_faster_beside_a_peer_in_a_bad_moment_is_as_before() -> None:
    change = judged(pair(STEADY, STEADY), pair(STEADY, scaled(STEADY, 2.0)))
    assert change.factor == pytest.approx(0.5)
    assert change.verdict == "as before"


def test_without_peers_a_figure_is_its_own_yardstick() -> None:
    assert judged(pair(STEADY, scaled(STEADY, 1.3))).is_slower
    assert not judged(pair(STEADY, scaled(STEADY, 1.05))).is_slower


def test_the_noise_of_a_run_widens_its_bound() -> None:
    noisy = [100.0, 125.0, 140.0]
    change = judged(pair(STEADY, noisy), pair(STEADY, STEADY))
    assert change.bound == pytest.approx(1 + 0.1 + 0.01 + 0.25 + 0.02)
    assert not judged(pair(STEADY, scaled(noisy, 1.3)), pair(STEADY, STEADY)).is_slower
    assert judged(pair(STEADY, scaled(noisy, 1.5)), pair(STEADY, STEADY)).is_slower


def test_one_good_round_is_enough_to_clear_it() -> None:
    assert not judged(pair(STEADY, [160.0, 155.0, 101.0]), pair(STEADY, STEADY)).is_slower


def test_what_is_too_noisy_is_not_called_as_before_unless_it_is_slower_than_all_that_noise() -> None:
    noisy = [100.0, 220.0, 230.0]
    change = judged(pair(STEADY, noisy), pair(STEADY, STEADY))
    assert change.verdict == "too noisy to say"
    assert not change.is_slower
    assert judged(pair(STEADY, scaled(noisy, 5.0)), pair(STEADY, STEADY)).verdict == "SLOWER"


def test_noise_alone_fails_nothing() -> None:
    """A machine that takes up to half of some rounds' time, and is twice as slow in every other run."""
    choose = random.Random(7)

    def rounds(machine: float) -> list[float]:
        return [100.0 * machine * (1 + choose.random() / 2 * (choose.random() < 0.5)) for _ in range(3)]

    def run(kept: float, new: float) -> Any:
        return pair(rounds(kept), rounds(new))

    machines = [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
    slower = [judged(run(*speeds), run(*speeds), run(*speeds)).is_slower for speeds in machines for _ in range(1_000)]
    assert sum(slower) / len(slower) < 0.01


def test_the_peers_of_both_runs_count_and_no_others() -> None:
    both = changes.pairs({"a": series(1), "gone": series(1)}, {"a": series(2), "new": series(3)})
    assert {who: both[who].change(False) for who in both} == {"a": 2.0}


def test_the_report_begins_with_what_became_slower() -> None:
    slow = judged(pair(STEADY, scaled(STEADY, 1.5)))
    fast = judged(pair(STEADY, scaled(STEADY, 0.5)), pair(STEADY, STEADY))
    lines = changes.report([fast, slow])
    assert lines[2] == "| figure | 100 | 150 | ×1.50 | ×1.12 | SLOWER (no peer) |"
    assert lines[3] == "| figure | 100 | 50 | ×0.50 | ×1.14 | faster |"


def test_figures_survive_their_file() -> None:
    kept = figures.Figures()
    kept.add("upgrades", "Presence", 10.0, client_share=0.5, server_share=0.9)
    kept.skipped["peer"] = "not installed"
    again = figures.Figures.from_json(json.loads(json.dumps(kept.as_json())))
    assert again.as_json() == kept.as_json()
