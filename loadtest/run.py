"""Run one scenario: `python -m loadtest.run SCENARIO [--agents N] [--quick]`.

Exit status: 0 all bounds kept, 1 one was missed, 2 the run does not count (the swarm itself was late or saturated).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import locust  # noqa: F401 - first: it patches what blocks

from loadtest.report import write_result
from loadtest.results import result_of
from loadtest.running import QUICK, REAL, Run
from loadtest.scenarios import SCENARIOS
from loadtest.verdicts import Judge, why_not_counted

PASSED, MISSED, NOT_COUNTED = 0, 1, 2
RESULTS = Path("loadtest/results")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.run", description="Load tests of the whole gateway.")
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--agents", type=int, default=18_000, help="how many there are (18,000)")
    parser.add_argument("--quick", action="store_true", help="short time-outs and phases: under a minute")
    parser.add_argument("--web", type=int, metavar="PORT", help="locust's page with its charts on this port")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the report ({RESULTS})")
    parser.add_argument("--seed", type=int, default=1, help="of the agents' random delays (1)")
    parser.add_argument(
        "--bounds-scale", type=float, default=1.0, help="widens bounds on times, for machines that others use too (1)"
    )
    parser.add_argument(
        "--flood-frames", type=int, default=60_000, help="webinar_flood: frames a second to the large room (60,000)"
    )
    arguments = parser.parse_args(words)
    if not 30 <= arguments.agents <= 18_000:
        parser.error("--agents: 30 to 18,000")
    return arguments


def command_of(arguments: argparse.Namespace) -> str:
    words = [arguments.scenario, "--agents", str(arguments.agents), "--seed", str(arguments.seed)]
    words += ["--quick"] if arguments.quick else []
    words += ["--bounds-scale", f"{arguments.bounds_scale:g}"] if arguments.bounds_scale != 1 else []
    if arguments.scenario == "webinar_flood":
        words += ["--flood-frames", str(arguments.flood_frames)]
    return "python -m loadtest.run " + " ".join(words)


def stay(run: Run) -> None:
    """The scenario is over; locust's page stays until Ctrl-C."""
    run.say("over: Ctrl-C writes the report and ends it")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


def main() -> int:
    arguments = parse_arguments()
    timing = QUICK if arguments.quick else REAL
    run = Run(
        timing,
        agents=arguments.agents,
        web_port=arguments.web,
        seed=arguments.seed,
        flood_frames_per_s=arguments.flood_frames,
    )
    judge = Judge(arguments.bounds_scale)
    began = time.time()
    try:
        SCENARIOS[arguments.scenario](run, judge)
        if arguments.web is not None:
            stay(run)
    finally:
        run.close()
    doubts = why_not_counted(run.record.shards, run.losses, run.record.total.counters["frames"])
    result = result_of(arguments.scenario, command_of(arguments), began, run, judge, doubts)
    page = write_result(arguments.out, result)
    for verdict in judge.verdicts:
        print(f"{'pass' if verdict.passed else 'FAIL'}  {verdict.guarantee}: {verdict.measured} ({verdict.bound})")
    for doubt in doubts:
        print(f"does not count: {doubt}")
    print(page)
    if not judge.passed:
        return MISSED
    return NOT_COUNTED if doubts else PASSED


if __name__ == "__main__":
    sys.exit(main())
