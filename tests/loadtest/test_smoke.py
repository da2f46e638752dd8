"""Scenarios from end to end, as a person runs them: locust, shards, real servers, a report. And what may be asked for."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PASSED, NOT_COUNTED, BAD_USAGE = 0, 2, 2


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest.run", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def words_for(folder: Path, scenario: str, agents: int) -> list[str]:
    return [scenario, "--agents", str(agents), "--quick", "--bounds-scale", "10", "--out", str(folder)]


def report_of(folder: Path, scenario: str, agents: int) -> dict[str, Any]:
    done = run(*words_for(folder, scenario, agents))
    assert done.returncode in (PASSED, NOT_COUNTED), done.stdout + done.stderr
    return report_in(folder)


def report_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".html").read_text().startswith("<!doctype html>")
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["passed"]
    return result


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as own:
        port: int = own.getsockname()[1]
        return port


def test_a_scenario_with_locusts_page_until_ctrl_c(tmp_path: Path) -> None:
    port = free_port()
    words = [*words_for(tmp_path, "mute_agents", 300), "--web", str(port)]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "loadtest.run", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "over: " in line:
                break
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert "<title>Locust</title>" in client.get("/").text
            rows = {row["method"] for row in client.get("/stats/requests").json()["stats"]}
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode in (PASSED, NOT_COUNTED), "".join(said) + rest
    assert {"CONNECT", "EVENT", "PING", "CLOSE", "END"} <= rows
    result = report_in(tmp_path)
    assert result["total"]["closes"]["4500 auth_timed_out"] == 15
    assert result["total"]["counters"]["connects"] == 300 - 15
    assert result["locust"]["CONNECT rooms of 30"] == 300 - 3 * 15
    assert result["locust"]["CLOSE without a connect_request"] == 15


def test_a_crowd_connects_again_on_another_replica(tmp_path: Path) -> None:
    result = report_of(tmp_path, "replacement", 90)
    assert result["total"]["closes"] == {"4505 replaced": 90}
    assert result["windows"]["the replacement"]["connect"]["the crowd"]["count"] == 90
    assert set(result["replicas"]) == {"replica 0", "replica 1"}


def test_what_a_dead_replica_leaves_is_swept(tmp_path: Path) -> None:
    result = report_of(tmp_path, "sweep", 90)
    verdicts = {verdict["guarantee"]: verdict["measured"] for verdict in result["verdicts"]}
    assert verdicts["sessions swept to the history"] == "88"
    assert verdicts["agent.leave of those who stayed away"] == "88"
    assert result["total"]["closes"] == {"1006": 90}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["steady", "--agents", "18001"], "18,000"),
        (["steady", "--agents", "36001", "--replicas", "2"], "36,000"),
        (["moving", "--replicas", "3"], "none for a scenario of two"),
    ],
)
def test_more_than_a_replica_holds_is_refused(words: list[str], complaint: str) -> None:
    done = run(*words)
    assert done.returncode == BAD_USAGE
    assert complaint in done.stderr
