"""What was measured: readings by figure and by who reached them. Knows nothing of how they are taken or shown.

A figure is more than its median: every reading is kept, with the share of a core that the client and the server needed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

SATURATED = 0.95  # a client that needed more of its core may have been the bottleneck


@dataclass
class Reading:
    value: float
    client_share: float | None = None  # of one core
    server_share: float | None = None

    @property
    def server_us(self) -> float:
        """For a rate: microseconds of the server's CPU for each. It holds on a busy machine, where a rate does not."""
        return (self.server_share or 0.0) / self.value * 1e6


@dataclass
class Series:
    """The readings of one figure by one peer, one a round."""

    readings: list[Reading] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        return [reading.value for reading in self.readings]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def server_us(self) -> Series:
        return Series([Reading(reading.server_us) for reading in self.readings])

    @property
    def client_share(self) -> float | None:
        shares = [reading.client_share for reading in self.readings if reading.client_share is not None]
        return statistics.median(shares) if shares else None

    @property
    def is_saturated(self) -> bool:
        return (self.client_share or 0.0) > SATURATED


class Figures:
    def __init__(self) -> None:
        self._series: dict[str, dict[str, Series]] = {}
        self.skipped: dict[str, str] = {}  # who was left out, and why

    def add(
        self,
        figure: str,
        who: str,
        value: float,
        *,
        client_share: float | None = None,
        server_share: float | None = None,
    ) -> None:
        series = self._series.setdefault(figure, {}).setdefault(who, Series())
        series.readings.append(Reading(value, client_share, server_share))

    def of(self, figure: str) -> dict[str, Series]:
        """The series of a figure by who reached it; empty when it was not measured."""
        return self._series.get(figure, {})

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """What `as_json` wrote."""
        figures = cls()
        for figure, by_peer in kept.items():
            if figure == "skipped":
                figures.skipped = dict(by_peer)
                continue
            for who, series in by_peer.items():
                for reading in series["readings"]:
                    figures.add(figure, who, **reading)
        return figures

    def as_json(self) -> dict[str, Any]:
        return {
            figure: {
                who: {
                    "median": series.median,
                    "min": min(series.values),
                    "max": max(series.values),
                    "client_was_saturated": series.is_saturated,
                    "readings": [asdict(reading) for reading in series.readings],
                }
                for who, series in by_peer.items()
            }
            for figure, by_peer in self._series.items()
        } | {"skipped": self.skipped}
