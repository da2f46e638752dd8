"""The result of a run as one JSON document: what the page shows and what two runs are compared by.

Owns the document's form. Knows nothing of how it is shown.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.costs import agent_line, cost_of, replica_lines, waits_of
from loadtest.lines import ROOT
from loadtest.network import loopback_queue
from loadtest.running import Run
from loadtest.verdicts import Judge


def result_of(scenario: str, command: str, began: float, run: Run, judge: Judge, doubts: list[str]) -> dict[str, Any]:
    record = run.record
    return {
        "scenario": scenario,
        "command": command,
        "taken_at": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "agents": run.agents,
        "gateway": dict(setting.split("=") for setting in run.timing.settings()),
        "passed": judge.passed,
        "counts": not doubts,
        "doubts": doubts,
        "verdicts": [verdict.as_json() for verdict in judge.verdicts],
        "facts": run.facts | cost_of(record.samples) | waits_of(record.samples) | losses_of(run),
        "total": record.total.as_json(run.titles),
        "windows": {name: figures.as_json(run.titles) for name, figures in record.windows.items()},
        "locust": {f"{e.method} {e.name}": e.num_requests for e in run.environment.stats.entries.values()},
        "seconds": [second.as_json(at_s, run.titles) for at_s, second in sorted(record.seconds.items())],
        "marks": [[round(at_s, 2), text] for at_s, text in record.marks],
        "replicas": replica_lines(record.samples, record.start_ns),
        "per_agent": agent_line(record.samples, record.start_ns),
        "swarm": {
            name: {
                "lag_p99_ms": own.lag.percentile_ms(0.99),
                "lag_most_ms": own.lag.most_ms,
                "stall_most_ms": own.stall.most_ms,
                "busiest_share": own.busiest_share,
                "share": statistics.fmean(own.shares) if own.shares else 0.0,
            }
            for name, own in record.shards.items()
        },
    }


def losses_of(run: Run) -> dict[str, str]:
    lost = f"{run.losses.dropped:,} dropped, {run.losses.sent_again:,} sent again"
    return {"packets that the kernel lost, whoever sent them": lost}


def _machine() -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "loopback_queue": loopback_queue(),
    }


def _commit() -> str:
    """The commit of what was tested; `-dirty` when a source of it has been changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "ext")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")
