"""The parts: pytest-benchmark over bench/test_*.py in a process of its own, its readings taken from `extra_info`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from figures import Figures
from processes import ROOT

PASSES = 3
ROUNDS = 2  # in each pass
TIMEOUT_S = 300


def measure_parts(
    figures: Figures, results: Path, *, passes: int = PASSES, rounds: int = ROUNDS, tests: str = ""
) -> None:
    """A figure here is a group and a size: `timer start/1000`. `tests`: the names of some, as pytest's -k has them.

    Each pass is a process of its own: where the memory of one came to lie makes some loops twice as slow in it, for all of its
    rounds. pytest-benchmark's own JSON of the last pass stays in `results`.
    """
    for number in range(passes):
        _one_pass(figures, results, rounds, tests)
        print(f"pass {number + 1}: done", flush=True)


def _one_pass(figures: Figures, results: Path, rounds: int, tests: str) -> None:
    results.mkdir(parents=True, exist_ok=True)
    path = results / "parts.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--benchmark-only", f"--benchmark-json={path}", "--rounds", str(rounds), "-k", tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the benchmarks of the parts failed:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        figure = f"{benchmark['group']}/{benchmark['params']['size']}"
        for ns in benchmark["extra_info"]["ns_each"]:
            figures.add(figure, benchmark["params"]["who"], ns)
