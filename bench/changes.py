"""Two results compared: what became slower, beyond what is noise. Pure: series in, changes out.

Two runs never had the same machine to themselves. So a figure counts as slower only when it is slower by itself and beside its
peers of the same run, which are what did not change: a slow moment of the machine falls on both, an odd moment of a
peer leaves the figure itself where it was. Results of two machines are compared beside the peers alone.

Of each series the best round counts, for what disturbs a round only ever makes it slower. How far the second best lies above
it says how far down the best one got; the four gaps of a comparison (own and peers, kept and new) add up to the noise that a
change has to exceed, over an allowance for what no round of a run shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from figures import Series

LARGEST_BOUND = 2.0  # a figure within one that is larger may have doubled all the same


@dataclass(frozen=True)
class Pair:
    """The same series, kept and new."""

    kept: Series
    new: Series

    def change(self, more_is_better: bool) -> float:
        """By what factor the best round's cost has grown."""
        return min(costs(self.new, more_is_better)) / min(costs(self.kept, more_is_better))

    def noise(self, more_is_better: bool) -> float:
        return gap(costs(self.kept, more_is_better)) + gap(costs(self.new, more_is_better))


@dataclass(frozen=True)
class Change:
    """What a figure has become: by itself and beside its peers its cost has grown `factor` at the least, `most` at the most."""

    title: str
    kept: float  # the best rounds
    new: float
    factor: float
    most: float
    bound: float
    yardstick: tuple[str, ...]  # the peers it was measured by; none: by itself

    @property
    def is_slower(self) -> bool:
        return self.factor > self.bound

    @property
    def is_too_noisy(self) -> bool:
        return self.bound > LARGEST_BOUND and not self.is_slower

    @property
    def verdict(self) -> str:
        if self.is_slower:
            return "SLOWER"
        if self.is_too_noisy:
            return "too noisy to say"
        return "faster" if self.most < 1 / self.bound else "as before"


def costs(series: Series, more_is_better: bool) -> list[float]:
    """What is better when it is less."""
    return [1 / value for value in series.values] if more_is_better else series.values


def gap(values: Sequence[float]) -> float:
    """How far the second best lies above the best, as a share of it; 0 of a single one."""
    best, second = sorted([*values, max(values)])[:2]
    return second / best - 1


def change_of(
    title: str,
    own: Pair,
    peers: Mapping[str, Pair],
    *,
    more_is_better: bool,
    allowance: float,
    is_same_machine: bool,
) -> Change:
    """By itself and beside its peers, whichever has grown less; on another machine beside its peers, if it has any."""
    factors, noise = [own.change(more_is_better)], own.noise(more_is_better)
    if peers:
        factors.append(factors[0] / statistics.geometric_mean([p.change(more_is_better) for p in peers.values()]))
        noise += statistics.fmean(pair.noise(more_is_better) for pair in peers.values())
    if not is_same_machine:
        factors = factors[-1:]
    best = max if more_is_better else min
    kept, new = best(own.kept.values), best(own.new.values)
    return Change(title, kept, new, min(factors), max(factors), 1 + allowance + noise, tuple(peers))


def pairs(kept: Mapping[str, Series], new: Mapping[str, Series]) -> dict[str, Pair]:
    """The peers of both runs."""
    return {who: Pair(kept[who], new[who]) for who in kept if who in new}


def report(changes: Iterable[Change]) -> list[str]:
    """The table, what became slower on top."""
    ordered = sorted(changes, key=lambda change: (not change.is_slower, change.is_too_noisy, -change.factor))
    lines = [
        "| best round | kept | now | growth of its cost | of which noise explains | |",
        "|---|---|---|---|---|---|",
    ]
    for change in ordered:
        cells = [change.title, f"{change.kept:,.4g}", f"{change.new:,.4g}", f"×{change.factor:.2f}"]
        by = "" if change.yardstick else " (no peer)"
        lines.append(f"| {' | '.join(cells)} | ×{change.bound:.2f} | {change.verdict}{by} |")
    return lines
