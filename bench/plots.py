"""Plots as SVG files of their own: points, and lines through them. Pure: numbers in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from loadtest.charts import COLOURS, Axis

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 40, 44
STYLE = "text{font:12px sans-serif;fill:#24292f}.grid{stroke:#d0d7de}.title{font-weight:bold}"

Points = Sequence[tuple[float, float]]


def plot(title: str, x_title: str, series: Mapping[str, Points], lines: Mapping[str, Points] | None = None) -> str:
    """Dots of each series; `lines` are dashed, in the colour of the series of the same place. Both axes begin at 0."""
    lines = lines or {}
    points = [point for line in (*series.values(), *lines.values()) for point in line]
    x = Axis(0, max(at for at, _ in points) * 1.05, LEFT, WIDTH - LEFT - RIGHT)
    y = Axis(0, max(value for _, value in points) * 1.15, HEIGHT - BOTTOM, TOP + BOTTOM - HEIGHT)
    parts = [f"<style>{STYLE}</style>", f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    parts += [_text(LEFT, 16, title, "start", "title"), _text(WIDTH - RIGHT, HEIGHT - 6, x_title, "end")]
    parts += _grid(x, y)
    for number, line in enumerate(lines.values()):
        path = " ".join(f"{x.at(at):.1f},{y.at(value):.1f}" for at, value in line)
        parts.append(f'<polyline fill="none" stroke="{_colour(number)}" stroke-dasharray="5 4" points="{path}"/>')
    for number, (name, dots) in enumerate(series.items()):
        parts += [
            f'<circle cx="{x.at(at):.1f}" cy="{y.at(value):.1f}" r="4" fill="{_colour(number)}"/>' for at, value in dots
        ]
        parts.append(f'<circle cx="{LEFT + 6 + 190 * number}" cy="30" r="4" fill="{_colour(number)}"/>')
        parts.append(_text(LEFT + 16 + 190 * number, 34, name))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>\n'


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(_text(LEFT - 6, y.at(value) + 4, _number(value), "end"))
    parts += [_text(x.at(value), HEIGHT - BOTTOM + 16, _number(value), "middle") for value in x.ticks()]
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"' + (f' class="{style}"' if style else "")
    return f"<text {attributes}>{escape(text)}</text>"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
