"""How fast a flood may be for a run to say something of the gateway: as fast as those who listen, and the machine, can take it.

Owns the search for that rate. Knows nothing of rooms or bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Final

from loadtest.costs import shares_without_core
from loadtest.network import Losses
from loadtest.verdicts import DROPPED_SHARE, SWARM_LAG_P99_MS, SWARM_SHARE

if TYPE_CHECKING:
    from loadtest.running import Run

START_FRAMES_PER_S: Final = 15_000.0
MOST_FRAMES_PER_S: Final = 1_000_000.0
STEP: Final = 1.25
STEP_S: Final = 5.0
REPORTS_PER_S: Final = 2
DELIVERED_SHARE: Final = 0.95  # of the offered: below it a queue grows
MARGIN: Final = 0.8  # of what would make the run not count
WITHOUT_CORE_SHARE: Final = 0.2  # of a replica's time: beyond it others have the cores that it needs
TAKEN_SHARE: Final = 0.8  # of the last rate that was well: a step is short, the flood is long


def find_rate(run: Run, set_rate: Callable[[float], None]) -> tuple[float, str]:
    """Raise the rate step by step; somewhat less than the last one that was well, in frames/s, and what was short at the next."""
    frames_per_s = START_FRAMES_PER_S
    while frames_per_s < MOST_FRAMES_PER_S:
        set_rate(frames_per_s)
        shortage = _shortage(run, frames_per_s)
        run.say(f"{frames_per_s:,.0f} frames/s: {shortage or 'well'}")
        if shortage:
            return frames_per_s / STEP * TAKEN_SHARE, shortage
        frames_per_s *= STEP
    return frames_per_s / STEP * TAKEN_SHARE, "nothing was short"


def _shortage(run: Run, frames_per_s: float) -> str:
    """What is short at this rate, over one step; empty: nothing is."""
    run.settle()
    losses, step, sampled = Losses.now(), run.record.open_window("step"), len(run.record.samples)
    run.rest(STEP_S)
    run.record.forget_window("step")
    frames, took_s = step.counters["frames"], step.took_s / len(run.shards)
    for name, own in run.record.shards.items():
        recent = own.shares[-max(2, round(took_s * REPORTS_PER_S)) :]
        share = sum(recent) / len(recent)
        if share > SWARM_SHARE * MARGIN:
            return f"{name} of the swarm needs {share:.0%} of a core"
    for number, shares in shares_without_core(run.record.samples[sampled:]).items():
        if fmean(shares) > WITHOUT_CORE_SHARE:
            return f"replica {number} has no core for {fmean(shares):.0%} of the time"
    lag_ms = step.plain["lag"].percentile_ms(0.99)
    if lag_ms > SWARM_LAG_P99_MS * MARGIN:
        return f"the swarm reads late: p99 {lag_ms:.0f} ms"
    dropped = Losses.now().since(losses).dropped
    if dropped > frames * DROPPED_SHARE * MARGIN:
        return f"the kernel drops packets: {dropped:,} of {frames:,}"
    if took_s and frames / took_s < frames_per_s * DELIVERED_SHARE:
        return f"no more than {frames / took_s:,.0f} frames/s arrive"
    return ""
