"""One scenario from end to end, as a person runs it: locust, shards, real servers, a report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED, NOT_COUNTED = 0, 2


def test_a_scenario_runs_and_reports(tmp_path: Path) -> None:
    words = ["mute_agents", "--agents", "300", "--quick", "--bounds-scale", "10", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.run", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode in (PASSED, NOT_COUNTED), done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["passed"]
    assert result["total"]["closes"]["4500 auth_timed_out"] == 15
    assert result["total"]["counters"]["connects"] == 300 - 15
    assert result["locust"]["CONNECT rooms of 30"] == 300 - 3 * 15
    assert result["locust"]["CLOSE without a connect_request"] == 15
    assert path.with_suffix(".html").read_text().startswith("<!doctype html>")
