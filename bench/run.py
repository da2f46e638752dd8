"""All benchmarks, beside the peers: the parts, sockets, pings, agents, fan-out, floods; JSON in bench/results, one table on stdout.

    python bench/run.py [--quick] [--only parts|sockets|pings|agents|fanout|flood|slow] [--update-readme]

The full run takes about fifteen minutes; it opens as many sockets as the descriptor limit allows, 18,000 at the most, all of
them on loopback addresses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fanout import measure_fanout
from figures import Figures
from flood import measure_flood
from parts import measure_parts
from pings import measure_pings
from processes import ROOT, commit, machine
from slow import measure_slow
from sockets import measure_agents, measure_sockets
from table import markdown

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PARTS = ("parts", "sockets", "pings", "agents", "fanout", "flood", "slow")
SPARE_DESCRIPTORS = 2_000
QUIET_LOAD = 0.7  # a load average above this, before anything has begun, is not ours


@dataclass(frozen=True)
class Scale:
    rounds: int
    sockets: int
    members: int
    events: int
    crowd: int


FULL = Scale(rounds=3, sockets=18_000, members=5_000, events=200, crowd=10_000)
QUICK = Scale(rounds=1, sockets=12_000, members=2_000, events=100, crowd=3_000)


def main() -> None:
    arguments = parse_arguments()
    scale = QUICK if arguments.quick else FULL
    scale = replace(scale, sockets=within_descriptor_limit(scale.sockets))
    figures = Figures()
    about = about_run(scale)
    measure_all(figures, scale, arguments.only)
    path = write_results(arguments, {**about, "figures": figures.as_json()})
    table = markdown(figures, heading(about))
    print(f"\n{table}\n\n{path.relative_to(ROOT)}")
    if arguments.update_readme:
        update_readme(table)


def measure_all(figures: Figures, scale: Scale, only: str | None = None) -> None:
    """Every part, or only one of them."""
    rounds = scale.rounds
    parts: dict[str, Callable[[], None]] = {
        "parts": lambda: measure_parts(figures, RESULTS),
        "pings": lambda: measure_pings(figures, rounds=rounds, sockets=scale.sockets),
        "sockets": lambda: measure_sockets(figures, rounds=rounds, sockets=scale.sockets),
        "agents": lambda: measure_agents(figures, rounds=rounds, agents=scale.sockets),
        "fanout": lambda: measure_fanout(
            figures, rounds=rounds, members=min(scale.members, scale.sockets), events=scale.events
        ),
        "flood": lambda: measure_flood(
            figures, rounds=rounds, crowd_size=min(scale.crowd, scale.sockets), agents=scale.sockets
        ),
        "slow": lambda: measure_slow(figures, rounds=rounds),
    }
    for name in PARTS:
        if only in {None, name}:
            print(f"{name}:", flush=True)
            parts[name]()


def about_run(scale: Scale) -> dict[str, Any]:
    """Before anything is measured."""
    return {
        "commit": commit(),
        "machine": machine(),
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": round(os.getloadavg()[0], 2),
        **asdict(scale),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one round of everything, on fewer sockets: a minute or two"
    )
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    parser.add_argument("--update-readme", action="store_true", help=f"put the table between {BEGIN} and {END}")
    arguments = parser.parse_args()
    if arguments.update_readme and arguments.only:
        parser.error("the README's table holds all figures: --update-readme goes without --only")
    return arguments


def within_descriptor_limit(wanted: int) -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit - SPARE_DESCRIPTORS >= wanted:
        return wanted
    sockets = max(500, limit - SPARE_DESCRIPTORS)
    print(f"{sockets:,} sockets, not {wanted:,}: this process may open {limit:,} descriptors (ulimit -n)", flush=True)
    return sockets


def heading(about: dict[str, Any]) -> str:
    computer = about["machine"]
    return (
        f"{about['taken_at'][:10]}, commit {about['commit']}, {computer['cores']} cores of {computer['cpu']}, "
        f"Linux {computer['kernel']}, Python {computer['python']}; client, servers, PostgreSQL and NATS share the machine. "
        f"{about['sockets']:,} sockets, 200 connects in flight; fan-out to one room of {about['members']:,}, "
        f"{about['events']} events of 190 B; "
        f"flood of a crowd of {about['crowd']:,}; {about['rounds']} round{'s' if about['rounds'] > 1 else ''}."
        + (f" **Others were at work (load {about['load_before']}).**" if about["load_before"] > QUIET_LOAD else "")
    )


def write_results(arguments: argparse.Namespace, results: dict[str, Any]) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = "-".join(filter(None, ["quick" if arguments.quick else "full", arguments.only]))
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def update_readme(table: str) -> None:
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README.name} has no {BEGIN} … {END}")
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
