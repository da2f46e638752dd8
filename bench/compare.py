"""Measure again and compare with the last kept result: `python bench/compare.py [--fast]`.

Exit status 1 when something became slower than noise explains. `--fast` measures the parts only and takes about a minute; it
is for machines that others use too: what looks slower is measured again, and has to be twice as slow beyond the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from changes import Change, Pair, change_of, pairs, report
from figures import Figures
from parts import measure_parts
from peers import PRESENCE
from processes import machine
from run import RESULTS, Scale, about_run, measure_all, within_descriptor_limit
from table import PART_ROWS, ROWS, PartRow

KEPT = RESULTS / "full.json"
FAST_PASSES = 2
SECOND_LOOKS = 3  # at what looks slower
ALLOWANCE = 0.25  # see docs/benchmarks.md for where they come from
WIDE_ALLOWANCE = 1.0  # of the fast one, and on another machine
SAME_MACHINE = ("cpu", "cores", "python")

Judge = Callable[..., Change]  # `change_of` for these two machines


def main() -> int:
    arguments = parse_arguments()
    kept_file = json.loads(arguments.against.read_text())
    kept = Figures.from_json(kept_file["figures"])
    is_same_machine = all(kept_file["machine"][name] == machine()[name] for name in SAME_MACHINE)
    allowance = ALLOWANCE if is_same_machine and not arguments.fast else WIDE_ALLOWANCE
    judge = partial(change_of, allowance=allowance, is_same_machine=is_same_machine)
    new = Figures()
    if arguments.fast:
        changes = fast_changes(kept, new, judge)
    else:
        scale = kept_scale(kept_file)
        measure_all(new, scale)
        changes = [*part_changes(kept, new, judge), *whole_changes(kept, new, judge)]
        write(RESULTS / "compare.json", {**about_run(scale), "figures": new.as_json()})
    print(f"\nAgainst {kept_file['taken_at']}, commit {kept_file['commit']}:", end=" ")
    print("the same machine" if is_same_machine else f"ANOTHER MACHINE ({kept_file['machine']['cpu']})")
    print("\n".join(report(changes)))
    for title in only_new(kept, new):
        print(f"not in the kept result: {title}")
    slower = [change for change in changes if change.is_slower]
    for change in slower:
        print(f"slower: {change.title}: ×{change.factor:.2f}, where noise explains ×{change.bound:.2f}")
    return 1 if slower else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="the parts only")
    parser.add_argument("--against", type=Path, default=KEPT, help="the kept result (bench/results/full.json)")
    return parser.parse_args()


def kept_scale(kept: dict[str, Any]) -> Scale:
    """The sizes of the kept run, as far as this process may open sockets."""
    names = set(Scale.__dataclass_fields__) & set(kept)
    scale = Scale(**{name: kept[name] for name in names})
    if within_descriptor_limit(scale.sockets) < scale.sockets:
        raise SystemExit("the kept result has more sockets than this process may open: nothing can be compared")
    return scale


def fast_changes(kept: Figures, new: Figures, judge: Judge) -> list[Change]:
    measure_parts(new, RESULTS, passes=FAST_PASSES)
    for _ in range(SECOND_LOOKS):
        suspects = {
            row.test for row in PART_ROWS for change in changes_of_part(row, kept, new, judge) if change.is_slower
        }
        if not suspects:
            break
        print(f"again: {', '.join(sorted(suspects))}", flush=True)
        measure_parts(new, RESULTS, passes=1, tests=" or ".join(sorted(suspects)))
    return part_changes(kept, new, judge)


def part_changes(kept: Figures, new: Figures, judge: Judge) -> list[Change]:
    return [change for row in PART_ROWS for change in changes_of_part(row, kept, new, judge)]


def changes_of_part(row: PartRow, kept: Figures, new: Figures, judge: Judge) -> Iterator[Change]:
    for size in row.sizes:
        figure = f"{row.group}/{size}"
        both = pairs(kept.of(figure), new.of(figure))
        own = both.pop(row.who, None)
        if own is None:
            continue
        peers = {who: pair for who, pair in both.items() if who not in row.seams}
        yield judge(f"{figure}, ns", own, peers, more_is_better=False)


def whole_changes(kept: Figures, new: Figures, judge: Judge) -> list[Change]:
    changes = []
    for row in ROWS:
        own_kept, own_new = (row.series(figures).get(PRESENCE) for figures in (kept, new))
        if own_kept is None or own_new is None or not row.is_compared:
            continue
        peers = pairs(row.peers(kept), row.peers(new))
        own = Pair(own_kept, own_new)
        changes.append(judge(row.title, own, peers, more_is_better=row.more_is_better))
    return changes


def only_new(kept: Figures, new: Figures) -> list[str]:
    titles = [row.title for row in ROWS if row.series(new) and not row.series(kept)]
    return titles + [
        row.title
        for row in PART_ROWS
        if new.of(f"{row.group}/{row.sizes[0]}") and not kept.of(f"{row.group}/{row.sizes[0]}")
    ]


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
