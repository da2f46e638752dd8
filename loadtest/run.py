"""Run one scenario: `python -m loadtest.run SCENARIO [--agents N] [--quick]`.

Exit status: 0 all bounds kept, 1 one was missed, 2 the run does not count (the swarm itself was late or saturated).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import locust  # noqa: F401 - first: it patches what blocks

from loadtest.report import write_result
from loadtest.results import result_of
from loadtest.running import AGENTS_PER_REPLICA, QUICK, REAL, Run
from loadtest.scenarios import OF_TWO_REPLICAS, SCENARIOS
from loadtest.verdicts import Judge, why_not_counted

PASSED, MISSED, NOT_COUNTED = 0, 1, 2
RESULTS = Path("loadtest/results")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.run", description="Load tests of the whole gateway.")
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--agents", type=int, default=18_000, help="how many there are (18,000)")
    parser.add_argument(
        "--replicas", type=int, help="how many there are, 18,000 agents on each at the most (the scenario's own)"
    )
    parser.add_argument(
        "--pin", action="store_true", help="replicas on the first half of the cores, all else on the second"
    )
    parser.add_argument("--quick", action="store_true", help="short time-outs and phases: under a minute")
    parser.add_argument("--web", type=int, metavar="PORT", help="locust's page with its charts on this port")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the report ({RESULTS})")
    parser.add_argument("--seed", type=int, default=1, help="of the agents' random delays (1)")
    parser.add_argument(
        "--bounds-scale", type=float, default=1.0, help="widens bounds on times, for machines that others use too (1)"
    )
    parser.add_argument(
        "--flood-frames", type=int, help="webinar_flood: frames a second to the large room (what the swarm can take)"
    )
    arguments = parser.parse_args(words)
    if arguments.replicas is not None and (arguments.scenario in OF_TWO_REPLICAS or not 1 <= arguments.replicas <= 16):
        parser.error("--replicas: 1 to 16, and none for a scenario of two")
    most = AGENTS_PER_REPLICA * (arguments.replicas or 1)
    if not 30 <= arguments.agents <= most:
        parser.error(f"--agents: 30 to {most:,}")
    return arguments


def command_of(arguments: argparse.Namespace) -> str:
    words = [arguments.scenario, "--agents", str(arguments.agents), "--seed", str(arguments.seed)]
    words += ["--replicas", str(arguments.replicas)] if arguments.replicas else []
    words += [f"--{name}" for name in ("pin", "quick") if getattr(arguments, name)]
    words += ["--bounds-scale", f"{arguments.bounds_scale:g}"] if arguments.bounds_scale != 1 else []
    if arguments.flood_frames:
        words += ["--flood-frames", str(arguments.flood_frames)]
    return "python -m loadtest.run " + " ".join(words)


def pin() -> list[int]:
    """This process, and all that it starts, on the second half of the cores; returns the first half, for the replicas."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    os.sched_setaffinity(0, cores[half:] or cores)
    return cores[:half]


def keep_logs(run: Run, page: Path) -> Path:
    """What the replicas said, beside the report of a run that missed a bound."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, text in run.logs.items():
        (folder / name).write_text(text)
    return folder


def stay(run: Run) -> None:
    """The scenario is over; locust's page stays until Ctrl-C."""
    run.say("over: Ctrl-C writes the report and ends it")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


def main() -> int:
    arguments = parse_arguments()
    del sys.argv[1:]  # locust's page reads them as its own options
    timing = QUICK if arguments.quick else REAL
    run = Run(
        timing,
        agents=arguments.agents,
        web_port=arguments.web,
        seed=arguments.seed,
        replicas=arguments.replicas,
        flood_frames_per_s=arguments.flood_frames,
        replica_cores=pin() if arguments.pin else (),
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
        print(f"the replicas' logs: {keep_logs(run, page)}")
        return MISSED
    return NOT_COUNTED if doubts else PASSED


if __name__ == "__main__":
    sys.exit(main())
