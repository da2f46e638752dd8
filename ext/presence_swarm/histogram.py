"""The swarm's histograms, as they are taken: they merge, and give percentiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from presence_swarm.swarm import bucket_floors

if TYPE_CHECKING:
    from presence_swarm.swarm import Durations

FLOORS_NS: Final = bucket_floors()


class Histogram:
    """Durations of one kind. Percentiles are the upper end of their bucket, 1.6 % wide; least and most are exact."""

    def __init__(self) -> None:
        self.buckets: Counter[int] = Counter()
        self.count = 0
        self.sum_ns = 0
        self.least_ns = 0
        self.most_ns = 0

    def add(self, taken: Durations | Mapping[str, Any]) -> None:
        if not taken["count"]:
            return
        self.least_ns = min(self.least_ns, taken["least_ns"]) if self.count else taken["least_ns"]
        self.most_ns = max(self.most_ns, taken["most_ns"])
        self.count += taken["count"]
        self.sum_ns += taken["sum_ns"]
        for bucket, count in taken["buckets"]:
            self.buckets[bucket] += count

    @property
    def least_ms(self) -> float:
        return self.least_ns / 1e6

    @property
    def most_ms(self) -> float:
        return self.most_ns / 1e6

    def percentile_ms(self, fraction: float) -> float:
        """At least this share of the durations is not longer; 0 when there are none."""
        wanted, seen = fraction * self.count, 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                ceiling = FLOORS_NS[bucket + 1] if bucket + 1 < len(FLOORS_NS) else self.most_ns
                return min(ceiling, self.most_ns) / 1e6
        return self.most_ms

    def bars_ms(self) -> list[tuple[float, int]]:
        """(lower end in ms, count), a bar for every eighth of a power of two."""
        bars: Counter[float] = Counter()
        for bucket, count in self.buckets.items():
            bars[FLOORS_NS[bucket // 8 * 8] / 1e6] += count
        return sorted(bars.items())

    def as_json(self) -> dict[str, Any]:
        shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999}
        figures = {name: round(self.percentile_ms(share), 4) for name, share in shares.items()}
        bars = [[round(floor, 6), count] for floor, count in self.bars_ms()]
        return {"count": self.count, "least_ms": self.least_ms, **figures, "most_ms": self.most_ms, "bars": bars}
