"""Two runs side by side: `python -m loadtest.compare A.json B.json`. Exit status 1: the second one missed what the first kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DURATIONS = ("p50_ms", "p99_ms", "p999_ms", "most_ms")
NOTABLE = 0.2  # a change by more than that is pointed out; smaller ones are the machine's mood


def durations_of(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Every histogram by its name: `connect: rooms of 30`, `outage`, `flood: delivery: rooms of 30`."""
    for prefix, figures in [("", result["total"]), *((f"{n}: ", f) for n, f in result["windows"].items())]:
        for name, own in figures.items():
            if name in ("counters", "closes"):
                continue
            if "count" in own:
                yield prefix + name, own
            else:
                yield from ((f"{prefix}{name}: {group}", histogram) for group, histogram in own.items())


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The lines to print, and the guarantees that the second run lost."""
    lines = [f"{r['scenario']}, {r['agents']:,} agents, {r['taken_at']}, {r['commit']}" for r in (first, second)]
    if first["scenario"] != second["scenario"] or first["agents"] != second["agents"]:
        lines.append("These are not the same test.")
    for name, result in (("first", first), ("second", second)):
        lines += [f"The {name} run does not count: {doubt}" for doubt in result["doubts"]]
    lost = []
    before = {verdict["guarantee"]: verdict for verdict in first["verdicts"]}
    lines += ["", "| guarantee | first | second |", "|---|---|---|"]
    for verdict in second["verdicts"]:
        old = before.get(verdict["guarantee"])
        cells = [f"{v['measured']}{'' if v['passed'] else ' ✗'}" if v else "" for v in (old, verdict)]
        lines.append(f"| {verdict['guarantee']} | {cells[0]} | {cells[1]} |")
        if old is not None and old["passed"] and not verdict["passed"]:
            lost.append(verdict["guarantee"])
    old_durations = dict(durations_of(first))
    lines += ["", "| ms, first → second | p50 | p99 | p99.9 | most |", "|---|---|---|---|---|"]
    for name, own in durations_of(second):
        if name in old_durations:
            cells = [_change(old_durations[name][key], own[key]) for key in DURATIONS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines, lost


def _change(old: float, new: float) -> str:
    text = f"{old:,.2f} → {new:,.2f}"
    if old > 0 and abs(new / old - 1) > NOTABLE:
        text += f" ({new / old - 1:+.0%})"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description="Compare two load test runs.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    lines, lost = compare(*(json.loads(path.read_text()) for path in (arguments.first, arguments.second)))
    print("\n".join(lines))
    for guarantee in lost:
        print(f"lost: {guarantee}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
