"""Figures, verdicts, the page and the comparison: numbers in, judgement and text out."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from loadtest.charts import bar_chart, histogram_chart, line_chart
from loadtest.compare import compare
from loadtest.costs import agent_line, waits_of
from loadtest.figures import Record, ShardFigures
from loadtest.network import Losses
from loadtest.picture import BROWSERS, picture
from loadtest.report import page
from loadtest.verdicts import Judge, why_not_counted

from presence_swarm import swarm
from presence_swarm.histogram import FLOORS_NS, Histogram


def durations(*values_ns: int) -> dict[str, Any]:
    counts = Counter(max(i for i, floor in enumerate(FLOORS_NS) if floor <= value) for value in values_ns)
    return {
        "count": len(values_ns),
        "sum_ns": sum(values_ns),
        "least_ns": min(values_ns, default=0),
        "most_ns": max(values_ns, default=0),
        "buckets": [list(pair) for pair in counts.items()],
    }


def histogram(*values_ms: float) -> Histogram:
    made = Histogram()
    made.add(durations(*(int(value * 1e6) for value in values_ms)))
    return made


def report(**changed: Any) -> dict[str, Any]:
    taken = swarm.Swarm(1).take()
    return {**taken, "at_ns": 1_000_000_000, "took_s": 0.5, "cpu_s": 0.1, "gauges": swarm.Swarm(1).gauges(), **changed}


def test_buckets_ascend_and_are_narrow() -> None:
    assert FLOORS_NS[:3] == [0, 1, 2]
    for lower, upper in pairwise(FLOORS_NS):
        assert lower < upper <= max(lower + 1, lower * (1 + 1 / 64) + 1)


def test_percentiles_are_never_too_small() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    own = histogram(*values)
    assert own.percentile_ms(0.5) == pytest.approx(3.0, rel=0.02)
    assert own.percentile_ms(0.5) >= 3.0
    assert own.percentile_ms(0.999) == own.most_ms == 100.0
    assert own.least_ms == 1.0
    assert Histogram().percentile_ms(0.99) == 0.0
    assert sum(count for _, count in own.bars_ms()) == 5


def test_histograms_merge() -> None:
    own = histogram(5.0)
    own.add(durations())
    own.add(durations(2_000_000, 9_000_000))
    assert (own.count, own.least_ms, own.most_ms) == (3, 2.0, 9.0)


def test_verdicts() -> None:
    judge = Judge()
    judge.at_most_ms("in time", 10.0, 10.0)
    judge.equal("all", 3, 3)
    judge.between_ms("deadline", histogram(5000.2, 5099.0), 5000)
    judge.at_least("rate", 1500.0, 1500.0, "/s")
    assert judge.passed
    for miss in (
        lambda own: own.at_most_ms("late", 10.1, 10.0),
        lambda own: own.at_most_ms("not measured", None, 10.0),
        lambda own: own.equal("one lost", 2, 3),
        lambda own: own.at_least("slow", 1499.0, 1500.0, "/s"),
        lambda own: own.at_least("no rate", None, 1500.0, "/s"),
        lambda own: own.between_ms("early", histogram(4990.0), 5000),
        lambda own: own.between_ms("late", histogram(5000.0, 5101.0), 5000),
        lambda own: own.between_ms("nobody", Histogram(), 5000),
        lambda own: own.percentile("nobody", Histogram(), 0.99, 25),
    ):
        strict = Judge()
        miss(strict)
        assert not strict.passed
    wide = Judge(scale=2)
    wide.at_most_ms("late, on a busy machine", 19.0, 10.0)
    wide.at_least("slow, on a busy machine", 751.0, 1500.0, "/s")
    assert wide.passed


def test_a_late_or_saturated_swarm_does_not_count() -> None:
    good = ShardFigures(histogram(1.0), histogram(1.0), [0.5] * 20)
    assert why_not_counted({"shard 0": good}, Losses(9, 9), 100_000) == []
    assert len(why_not_counted({"shard 0": good}, Losses(11, 12), 100_000)) == 1
    late = ShardFigures(histogram(*[60.0] * 5), histogram(1.0), [0.5])
    still = ShardFigures(histogram(1.0), histogram(300.0), [0.5])
    busy = ShardFigures(histogram(1.0), histogram(1.0), [0.1] * 20 + [0.99] * 10)
    assert len(why_not_counted({"a": late, "b": still, "c": busy}, Losses(), 1)) == 3


def result(*, passed: bool = True) -> dict[str, Any]:
    record = Record(0)
    window = record.open_window("flood <1>")
    taken = report(closes=[[4001, "pong_timed_out", 2]])
    taken["connect"][0] = durations(2_000_000, 3_000_000)
    taken["cadence"][0] = durations(200_000, 40_000_000)
    taken["delivery"][1] = durations(2_000_000)
    record.add("shard 0", taken)
    assert window.by_group["delivery"][1].count == 1
    judge = Judge()
    judge.equal("agents <all>", 2 if passed else 1, 2)
    titles = {0: "rooms of 30", 1: "room of 5,000"}
    return {
        "scenario": "steady",
        "command": "python -m loadtest.run steady",
        "taken_at": "2026-01-31T09:30:00+00:00",
        "commit": "abc",
        "machine": {"cpu": "x", "cores": 2, "kernel": "6", "python": "3", "load": 0.1, "loopback_queue": 1000},
        "agents": 100,
        "gateway": {"ping-interval-s": "30"},
        "passed": judge.passed,
        "counts": True,
        "doubts": [] if passed else ["shard 0 read late"],
        "verdicts": [verdict.as_json() for verdict in judge.verdicts],
        "facts": {"flood": "fast"},
        "total": record.total.as_json(titles),
        "windows": {name: figures.as_json(titles) for name, figures in record.windows.items()},
        "seconds": [second.as_json(at, titles) for at, second in record.seconds.items()],
        "marks": [[0.5, "begins & ends"]],
        "per_agent": [[0.0, 1_000, 5.0], [1.0, 900, 4.0]],
        "replicas": {"replica 0": [[0.0, 1_000_000, 0.1], [1.0, 2_000_000, 0.2]]},
        "swarm": {
            "shard 0": dict.fromkeys(("lag_p99_ms", "lag_most_ms", "stall_most_ms", "busiest_share", "share"), 0.1)
        },
    }


def test_the_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    text = page(result())
    assert not re.search(r"""(src|href)\s*=|url\(|<script|@import""", text)
    for part in ("agents &lt;all&gt;", "flood &lt;1&gt;", "4001 pong_timed_out", "begins &amp; ends", "rooms of 30"):
        assert part in text
    assert text.count("<svg") == text.count("</svg>") == 11
    assert "does not count" not in text
    assert "does not count" in page(result(passed=False))


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser for the picture")
def test_the_page_as_a_picture(tmp_path: Path) -> None:
    report, out = tmp_path / "report.html", tmp_path / "report.png"
    report.write_text(page(result()))
    picture(report, out, width=600, height=500)
    head = out.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (600, 500)
    without = tmp_path / "without.html"
    without.write_text("<body></body>")
    picture(without, tmp_path / "without.png", width=600, height=500)
    assert out.stat().st_size > 2 * (tmp_path / "without.png").stat().st_size


def test_two_runs_compared() -> None:
    lines, lost = compare(result(), result(passed=False))
    assert lost == ["agents <all>"]
    assert "| agents <all> | 2 | 1 ✗ |" in lines
    assert any(line.startswith("| connect: rooms of 30 |") for line in lines)
    assert compare(result(), result())[1] == []


def test_the_cost_of_an_agent_over_time() -> None:
    def sample(at_s: int, connected: int, *replicas: tuple[int, float] | None) -> dict[str, Any]:
        own = [None if r is None else {"rss": r[0], "cpu_s": r[1]} for r in replicas]
        return {"at_ns": at_s * 10**9, "connected": connected, "replicas": own}

    samples = [
        sample(1, 0, (1000, 1.0)),
        sample(2, 0, (1000, 1.0)),
        sample(3, 5, (9000, 2.0)),  # fewer than a tenth
        sample(4, 100, (51_000, 2.5)),
        sample(6, 100, (51_000, 2.7), (2000, 7.0)),  # a new one: empty, and without a CPU time before
        sample(7, 50, None, (12_000, 7.5)),
    ]
    assert agent_line(samples, 10**9) == [[3.0, 500, 5000.0], [5.0, 500, 1000.0], [6.0, 200, 10000.0]]


def test_how_long_a_replica_was_without_a_core() -> None:
    samples = [
        {"at_ns": at_s * 10**9, "replicas": [{"waited_s": waited_s}, other]}
        for at_s, waited_s, other in [(1, 0.0, None), (2, 0.5, {"waited_s": 3.0}), (3, 0.6, {"waited_s": 3.0})]
    ]
    assert list(waits_of(samples).values()) == [
        "30.0% of the time, 50% of the worst second",
        "0.0% of the time, 0% of the worst second",
    ]


def test_charts_of_nothing() -> None:
    assert "Nothing" in line_chart({"": []}, unit="ms")
    assert "None" in bar_chart({}, unit="connections")
    assert "Nothing" in histogram_chart({}, unit="ms", bounds={"x": 50.0})
    assert "NaN" not in line_chart({"": [(0.0, 0.0)]}, unit="ms", is_log=True, bounds={"x": 25.0})
