"""The parts: pytest-benchmark over bench/test_*.py in a process of its own, its readings taken from `extra_info`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from figures import Figures
from processes import ROOT

TIMEOUT_S = 300


def measure_parts(figures: Figures, results: Path) -> None:
    """pytest-benchmark's own JSON stays in `results`; a figure here is a group and a size: `timer start/1000`."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / "parts.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--benchmark-only", f"--benchmark-json={path}"],
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
    print("parts: done", flush=True)
