"""How long agents are told to stay away while nobody can be served: the longer it lasts, the longer.

Owns since when agents are refused. Knows nothing of what is away, of sockets or of clocks: the time is an argument.
"""

from __future__ import annotations

from typing import Final

GROWTH: Final = 0.5  # seconds more for each second that it lasts
MAX_SPREAD_S: Final = 30.0  # so long after its end everybody has come again


class Outage:
    """From the first agent that is refused to the next one that is served."""

    def __init__(self, spread_s: float) -> None:
        """`spread_s`: within which agents are told to come back when nothing is wrong, and at the beginning."""
        self._spread_s = spread_s
        self._max_spread_s = max(spread_s, MAX_SPREAD_S)
        self._began: float | None = None
        self._last = 0.0

    def end(self) -> None:
        """Somebody was served."""
        self._began = None

    def spread_s(self, now: float) -> float:
        """One more is refused: the longest time that it should stay away. `now` in seconds, of a monotonic clock."""
        if self._began is None or now - self._last > 2 * self._max_spread_s:  # who was refused then has not come back
            self._began = now
        self._last = now
        return min(self._max_spread_s, self._spread_s + GROWTH * (now - self._began))
