"""Line charts as SVG, in the colours of the page that holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 600, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 48


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    label: str = ""
    """Written under it."""
    tip: str = ""
    """Shown when the pointer rests on it."""


@dataclass(frozen=True, slots=True)
class Line:
    """`style` is a class of the page's style sheet: it sets the colour and how the line is drawn."""

    name: str
    style: str
    points: Sequence[Point]
    marked: bool = True
    """Whether each point has a dot."""


def line_chart(lines: Sequence[Line], *, title: str, x_title: str, y_title: str) -> str:
    """Both axes begin at 0. The chart scales to the width it is given."""
    x_ticks = _ticks(max((point.x for line in lines for point in line.points), default=0))
    y_ticks = _ticks(max((point.y for line in lines for point in line.points), default=0))

    def x(value: float) -> float:
        return _LEFT + value / x_ticks[-1] * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / y_ticks[-1] * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for tick in x_ticks:
        place = f'x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}"'
        parts.append(f'<text class="tick" {place} text-anchor="middle">{tick:,g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    turned = f'transform="translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text class="axis" {turned} text-anchor="middle">{escape(y_title)}</text>')
    for line in lines:
        places = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in line.points)
        parts.append(f'<polyline class="line {line.style}" points="{places}"/>')
        for point in line.points:
            if line.marked:
                place = f'cx="{x(point.x):.1f}" cy="{y(point.y):.1f}"'
                parts.append(
                    f'<circle class="dot {line.style}" {place} r="4"><title>{escape(point.tip)}</title></circle>'
                )
            if point.label:
                place = f'x="{x(point.x):.1f}" y="{y(point.y) + 18:.1f}"'
                parts.append(f'<text class="label" {place} text-anchor="middle">{escape(point.label)}</text>')
    return "\n".join([*parts, "</svg>"])


def _ticks(highest: float) -> list[float]:
    """From 0 in four to seven even steps of 1, 2 or 5 times a power of ten to at least `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if highest / (power * factor) <= 6)
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]
