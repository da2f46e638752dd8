"""What a run has seen: histograms, counters, closes, and one point a second.

Owns what is added up. Knows nothing of processes, locust, bounds or how it is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from presence_swarm.histogram import Histogram

GROUPS: Final = 4
BY_GROUP: Final = ("connect", "delivery", "cadence")
PLAIN: Final = ("unanswered", "silent", "outage", "overdue", "farewell", "lag", "stall")


class Figures:
    """Everything over some stretch of time."""

    def __init__(self) -> None:
        self.by_group = {name: [Histogram() for _ in range(GROUPS)] for name in BY_GROUP}
        self.plain = {name: Histogram() for name in PLAIN}
        self.counters: Counter[str] = Counter()
        self.missing = [0] * GROUPS  # by group, and in the counters all together
        self.closes: Counter[tuple[int, str]] = Counter()
        self.terminated_last_ns = 0
        self.connected_last_ns = 0
        self.took_s = 0.0  # of all shards together: what the reports in here are about

    def add(self, report: Mapping[str, Any]) -> None:
        for name in BY_GROUP:
            for histogram, taken in zip(self.by_group[name], report[name], strict=True):
                histogram.add(taken)
        for name in PLAIN:
            self.plain[name].add(report[name])
        self.counters.update(report["counters"])
        self.missing = [own + more for own, more in zip(self.missing, report["missing_by_group"], strict=True)]
        for code, error, count in report["closes"]:
            self.closes[code, error] += count
        self.terminated_last_ns = max(self.terminated_last_ns, report["terminated_last_ns"])
        self.connected_last_ns = max(self.connected_last_ns, report["connected_last_ns"])

    def all_groups(self, name: str) -> Histogram:
        merged = Histogram()
        for histogram in self.by_group[name]:
            merged.add(vars(histogram) | {"buckets": list(histogram.buckets.items())})
        return merged

    def unasked_closes(self) -> dict[str, int]:
        """Connections that the agents did not leave themselves, by `code error`."""
        return {f"{code} {error}".strip(): count for (code, error), count in self.closes.items() if error != "left"}

    def as_json(self, titles: Mapping[int, str]) -> dict[str, Any]:
        return {
            **{
                name: {titles.get(group, str(group)): h.as_json() for group, h in enumerate(histograms) if h.count}
                for name, histograms in self.by_group.items()
            },
            **{name: histogram.as_json() for name, histogram in self.plain.items() if histogram.count},
            "counters": dict(self.counters),
            "closes": {f"{code} {error}".strip(): count for (code, error), count in sorted(self.closes.items())},
        }


@dataclass
class Second:
    """One point of the charts."""

    connected: dict[str, int] = field(default_factory=dict)  # by shard
    connects: Histogram = field(default_factory=Histogram)
    delivery: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in range(GROUPS)])
    frames: int = 0

    def as_json(self, at_s: int, titles: Mapping[int, str]) -> dict[str, Any]:
        return {
            "at_s": at_s,
            "connected": sum(self.connected.values()),
            "connects": self.connects.count,
            "connect_p50_ms": round(self.connects.percentile_ms(0.5), 3),
            "connect_p99_ms": round(self.connects.percentile_ms(0.99), 3),
            "frames": self.frames,
            "delivery_p99_ms": {
                titles.get(group, str(group)): round(h.percentile_ms(0.99), 3)
                for group, h in enumerate(self.delivery)
                if h.count
            },
        }


@dataclass
class ShardFigures:
    """What a shard says of itself: was it late, was it busy."""

    lag: Histogram = field(default_factory=Histogram)
    stall: Histogram = field(default_factory=Histogram)
    shares: list[float] = field(default_factory=list)  # of a core, one a report

    @property
    def busiest_share(self) -> float:
        """The most over about five seconds."""
        span = 10
        sums = [sum(self.shares[i : i + span]) / span for i in range(max(0, len(self.shares) - span + 1))]
        return max(sums, default=sum(self.shares) / max(1, len(self.shares)))


class Record:
    """All reports of all shards, and samples of the replicas."""

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        self.total = Figures()
        self.windows: dict[str, Figures] = {}  # by name: what came while they were open
        self.open: set[str] = set()
        self.seconds: dict[int, Second] = {}
        self.shards: dict[str, ShardFigures] = {}
        self.gauges: dict[str, dict[str, int]] = {}
        self.samples: list[dict[str, Any]] = []
        self.marks: list[tuple[float, str]] = []

    def add(self, shard: str, report: dict[str, Any]) -> None:
        self.total.add(report)
        for name in self.open:
            self.windows[name].add(report)
            self.windows[name].took_s += report["took_s"]
        self.gauges[shard] = report["gauges"]
        second = self.seconds.setdefault(int(self.at_s(report["at_ns"])), Second())
        second.connected[shard] = report["gauges"]["connected"]
        second.frames += report["counters"]["frames"]
        for group in range(GROUPS):
            second.connects.add(report["connect"][group])
            second.delivery[group].add(report["delivery"][group])
        own = self.shards.setdefault(shard, ShardFigures())
        own.lag.add(report["lag"])
        own.stall.add(report["stall"])
        own.shares.append(report["cpu_s"] / report["took_s"])

    def at_s(self, at_ns: int) -> float:
        return (at_ns - self.start_ns) / 1e9

    def mark(self, at_ns: int, text: str) -> None:
        """A line in the charts."""
        self.marks.append((self.at_s(at_ns), text))

    def open_window(self, name: str) -> Figures:
        self.windows[name] = Figures()
        self.open.add(name)
        return self.windows[name]

    def close_window(self, name: str) -> None:
        self.open.discard(name)

    def forget_window(self, name: str) -> None:
        """Of no interest any more: not in the result."""
        self.close_window(name)
        del self.windows[name]

    def gauge(self, name: str) -> int:
        return sum(gauges[name] for gauges in self.gauges.values())
