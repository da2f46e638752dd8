"""Charts as inline SVG. Pure: numbers in, text out; knows nothing of what the numbers mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 34
BAR_LEFT = 190  # of bars with a name before them
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, over `length` pixels from `start`; in a logarithmic one both are positive."""

    low: float
    high: float
    start: float
    length: float
    is_log: bool = False

    def at(self, value: float) -> float:
        if self.is_log:
            value, low, high = (math.log10(max(v, self.low)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / ((high - low) or 1) * self.length

    def ticks(self) -> list[float]:
        if self.is_log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [10.0**e for e in exponents if self.low <= 10.0**e <= self.high * 1.001]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) or 1))
        while (self.high - self.low) / step < 4:
            step /= 2
        return [self.low + step * i for i in range(int((self.high - self.low) / step) + 1)]


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    unit: str,
    marks: Sequence[tuple[float, str]] = (),
    bounds: dict[str, float] | None = None,
    is_log: bool = False,
) -> str:
    """Lines over seconds; `marks` are vertical, `bounds` horizontal."""
    points = [point for line in series.values() for point in line]
    if not points:
        return "<p>Nothing to show.</p>"
    most = max([y for _, y in points] + list((bounds or {}).values()))
    low = max(0.01, min([y for _, y in points if y > 0], default=0.01)) if is_log else 0.0
    x = Axis(0, max(1.0, *(at for at, _ in points)), LEFT, WIDTH - LEFT - RIGHT)
    y = Axis(low, max(most * 1.05, low * 10 if is_log else 1e-9), HEIGHT - BOTTOM, TOP + BOTTOM - HEIGHT, is_log)
    parts = [_grid(x, y, "s", unit), *(_mark(x, at, text) for at, text in marks)]
    parts += [_bound_across(y, value, text) for text, value in (bounds or {}).items()]
    for number, (_, line) in enumerate(series.items()):
        path = " ".join(f"{x.at(at):.1f},{y.at(value):.1f}" for at, value in line)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
    return _svg(parts) + _legend(list(series))


def histogram_chart(
    series: Mapping[str, Sequence[tuple[float, int]]], *, unit: str, bounds: dict[str, float], floor: float = 0.01
) -> str:
    """Counts over a logarithmic axis, on a logarithmic scale, so that the one that was late is seen."""
    bars = [bar for bars in series.values() for bar in bars]
    if not bars:
        return "<p>Nothing to show.</p>"
    high = max([at for at, _ in bars] + list(bounds.values())) * 1.5
    x = Axis(floor, high, LEFT, WIDTH - LEFT - RIGHT, is_log=True)
    y = Axis(0.7, max(count for _, count in bars) * 1.3, HEIGHT - BOTTOM, TOP + BOTTOM - HEIGHT, is_log=True)
    parts = [_grid(x, y, unit, "")]
    for number, line in enumerate(series.values()):
        colour = COLOURS[number % len(COLOURS)]
        for at, count in line:
            left, top = x.at(max(at, floor)), y.at(count)
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(1.0, 10 - 3 * number):.1f}" '
                f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{colour}" fill-opacity="0.6"/>'
            )
    parts += [_bound_along(x, value, text) for text, value in bounds.items()]
    return _svg(parts) + _legend(list(series))


def bar_chart(bars: Mapping[str, int], *, unit: str) -> str:
    """A bar for each name, the longest first, with its number behind it."""
    if not bars:
        return "<p>None.</p>"
    most, row = max(bars.values()), 22
    parts = []
    for number, (name, count) in enumerate(sorted(bars.items(), key=lambda bar: -bar[1])):
        top, length = number * row + 4, max(1.0, count / most * (WIDTH - BAR_LEFT - 110))
        parts.append(f'<text x="{BAR_LEFT - 6}" y="{top + 12}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{BAR_LEFT}" y="{top}" width="{length:.1f}" height="{row - 6}" fill="{COLOURS[0]}" fill-opacity="0.6"/>'
        )
        parts.append(f'<text x="{BAR_LEFT + length + 6:.1f}" y="{top + 12}">{count:,} {escape(unit)}</text>')
    return _svg(parts, len(bars) * row + 8)


def _svg(parts: Sequence[str], height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _grid(x: Axis, y: Axis, x_unit: str, y_unit: str) -> str:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_unit)}</text>')
    parts.append(f'<text x="2" y="{TOP - 2}">{escape(y_unit)}</text>')
    return "".join(parts)


def _mark(x: Axis, at: float, text: str) -> str:
    place = x.at(at)
    return (
        f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{escape(text)}</title></line>"
    )


def _bound_across(y: Axis, value: float, text: str) -> str:
    at = y.at(value)
    return (
        f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="bound" x="{WIDTH - RIGHT - 4}" y="{at - 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _bound_along(x: Axis, value: float, text: str) -> str:
    at = x.at(value)
    return (
        f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="bound" x="{at - 4:.1f}" y="{TOP + 10}" text-anchor="end">{escape(text)}</text>'
    )


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2 and not any(names):
        return ""
    items = (f'<span style="color:{COLOURS[i % len(COLOURS)]}">■</span> {escape(name)}' for i, name in enumerate(names))
    return f'<p class="legend">{" &nbsp; ".join(items)}</p>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
