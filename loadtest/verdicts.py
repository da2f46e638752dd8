"""Guarantees and whether they were kept. Pure: figures in, rows of the verdict table out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from loadtest.figures import ShardFigures
from loadtest.network import Losses
from presence_swarm.histogram import Histogram

# A swarm past these was itself what was measured.
SWARM_LAG_P99_MS: Final = 50.0
SWARM_STALL_MS: Final = 250.0
SWARM_SHARE: Final = 0.95
DROPPED_SHARE: Final = 1e-4  # of the frames, by the kernel: more than that is seen in a p99

PING_P999_MS: Final = 50.0
PING_MOST_MS: Final = 250.0
DEADLINE_LATE_MS: Final = 100.0
DEADLINE_EARLY_MS: Final = 5.0  # two sockets' time stamps
CONNECT_P99_MS: Final = 250.0
DELIVERY_P99_MS: Final = 25.0
TERMINATED_MS: Final = 1_000.0
OFFLINE_SPARE_MS: Final = 1_000.0  # beyond an agent's own reconnect delay
SWEEP_MS: Final = 2_000.0  # from the end of the lease
REPLACEMENTS_PER_S: Final = 1_500.0
DRAIN_SPARE_MS: Final = 500.0  # the end comes that long after the drain's own time at the latest


@dataclass(frozen=True)
class Verdict:
    """One row: what was promised and what was seen. `measured` None: nothing to judge by, which is a failure."""

    guarantee: str
    bound: str
    measured: str
    passed: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Collects verdicts. `scale` widens bounds on times: for smoke runs on machines that others use too."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.verdicts: list[Verdict] = []

    def at_most_ms(self, guarantee: str, value_ms: float | None, bound_ms: float) -> None:
        bound_ms *= self.scale
        measured = "nothing" if value_ms is None else f"{value_ms:,.1f} ms"
        passed = value_ms is not None and value_ms <= bound_ms
        self.verdicts.append(Verdict(guarantee, f"≤ {bound_ms:,.0f} ms", measured, passed))

    def at_least(self, guarantee: str, value: float | None, bound: float, unit: str) -> None:
        """A rate: `scale` lowers its bound."""
        bound /= self.scale
        measured = "nothing" if value is None else f"{value:,.0f} {unit}"
        self.verdicts.append(
            Verdict(guarantee, f"≥ {bound:,.0f} {unit}", measured, value is not None and value >= bound)
        )

    def between_ms(self, guarantee: str, histogram: Histogram, due_ms: float) -> None:
        """Every one of them at its deadline, and at most DEADLINE_LATE_MS later."""
        least_ms, most_ms = due_ms - DEADLINE_EARLY_MS, due_ms + DEADLINE_LATE_MS * self.scale
        passed = histogram.count > 0 and least_ms <= histogram.least_ms and histogram.most_ms <= most_ms
        measured = f"{histogram.least_ms:,.1f} to {histogram.most_ms:,.1f} ms ({histogram.count:,})"
        self.verdicts.append(Verdict(guarantee, f"{due_ms:,.0f} to {most_ms:,.0f} ms", measured, passed))

    def equal(self, guarantee: str, value: object, wanted: object) -> None:
        self.verdicts.append(Verdict(guarantee, str(wanted), str(value), value == wanted))

    def percentile(self, guarantee: str, histogram: Histogram, fraction: float, bound_ms: float) -> None:
        value_ms = histogram.percentile_ms(fraction) if histogram.count else None
        self.at_most_ms(f"{guarantee}, p{fraction * 100:g}", value_ms, bound_ms)

    def cadence(self, histogram: Histogram) -> None:
        """The ping of every agent, in its time."""
        self.percentile("ping cadence error", histogram, 0.999, PING_P999_MS)
        self.at_most_ms("ping cadence error, max", histogram.most_ms if histogram.count else None, PING_MOST_MS)

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)


def why_not_counted(shards: dict[str, ShardFigures], losses: Losses, frames: int) -> list[str]:
    """Why a run proves nothing: the swarm was late or had too little of a core, or the kernel lost packets."""
    reasons = []
    for name, own in shards.items():
        if own.lag.percentile_ms(0.99) > SWARM_LAG_P99_MS:
            reasons.append(
                f"{name} read late: p99 {own.lag.percentile_ms(0.99):.0f} ms, allowed {SWARM_LAG_P99_MS:.0f} ms"
            )
        if own.stall.most_ms > SWARM_STALL_MS:
            reasons.append(f"{name} stood still for {own.stall.most_ms:.0f} ms, allowed {SWARM_STALL_MS:.0f} ms")
        if own.busiest_share > SWARM_SHARE:
            reasons.append(f"{name} needed {own.busiest_share:.0%} of a core, allowed {SWARM_SHARE:.0%}")
    if losses.dropped > frames * DROPPED_SHARE:
        lost = f"{losses.dropped:,} packets, and TCP sent {losses.sent_again:,} again"
        reasons.append(f"the kernel's loopback queue lost {lost} (net.core.netdev_max_backlog)")
    return reasons
