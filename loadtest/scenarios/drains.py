"""The verdicts on a replica that was told to end: what its agents heard, when it was gone, and what it left behind."""

from __future__ import annotations

from collections.abc import Mapping

from loadtest.figures import Figures
from loadtest.running import Run
from loadtest.verdicts import DRAIN_SPARE_MS, TERMINATED_MS, Judge


def judge_end(
    run: Run, judge: Judge, replica: int, window: Figures, *, at_ns: int, end: Mapping[str, int], sessions: int
) -> None:
    """`window`: what the swarm has seen since SIGTERM at `at_ns`; `end`: the process's; `sessions`: its rows before it."""
    who = f"replica {replica}"
    limit_ms = run.timing.drain_timeout_s * 1e3 + DRAIN_SPARE_MS
    ended_ms = (end["at_ns"] - at_ns) / 1e6
    told_ms = (window.terminated_last_ns - at_ns) / 1e6 if window.terminated_last_ns else None
    left = run.stand.ask("rows")["by_replica"].get(f"load-{replica}", 0)
    judge.equal(f"{who}: agents told", window.counters["terminated"], sessions)
    judge.at_most_ms(f"{who}: SIGTERM to `terminated` at the last agent", told_ms, TERMINATED_MS)
    judge.at_most_ms(f"{who}: SIGTERM to all closed, all rows written, exit", ended_ms, limit_ms)
    judge.equal(f"{who}: exit status", end["status"], 0)
    judge.equal(f"{who}: sessions of it left in the database", left, 0)
    run.facts[f"{who}: the drain by its own log"] = course_of(run, replica, ended_ms / 1e3)


def course_of(run: Run, replica: int, ended_s: float) -> str:
    """Where the time went between SIGTERM and the end of the process."""
    started, finished = (
        run.stand.ask("logged", replica=replica, event=f"drain_{step}") for step in ("started", "finished")
    )
    if not (started and finished):
        return "no word of it"
    return (
        f"told {started['told_s']:.2f} s, {finished['closed']:,} closed at the end in {finished['closing_s']:.2f} s, "
        f"rows and leaves {finished['writing_s']:.2f} s, answers to close frames {finished['answers_s']:.2f} s, "
        f"over after {finished['took_s']:.2f} s, process gone {ended_s - finished['took_s']:.2f} s later"
    )
