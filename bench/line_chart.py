"""A line chart as inline SVG: no library, no fonts of its own, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linerate.bench.record_table import number
from linerate.shards.html_page import escaped

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 24


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value; low and high are drawn as a whisker."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    """less to be trusted than the others: projected, or noisy"""
    told: str = ""
    """shown when pointed at"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points joined in their order."""

    points: Sequence[Point]
    style: str = "data"
    """class in the page's style: data, ideal or projected"""
    marks: bool = True


def line_chart(
    lines: Sequence[Line],
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_title: str,
    caption: str,
    logarithmic: bool = False,
) -> str:
    """The SVG and a line below it. x_ticks: place and label. Both axes are logarithmic, or y starts at 0."""
    points = [point for line in lines for point in line.points]
    values = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    places = [*(point.x for point in points), *(x for x, _ in x_ticks)]
    y_ticks = log_ticks(min(values), max(values)) if logarithmic else ticks(max(values))
    scale_x = _scale(min(places), max(places), LEFT + 14, WIDTH - RIGHT - 14, logarithmic)
    scale_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(y_title)}">',
        *(_y_tick(value, scale_y(value)) for value in y_ticks),
        *(_x_tick(label, scale_x(x)) for x, label in x_ticks),
    ]
    for line in lines:
        parts += _line(line, scale_x, scale_y)
    return f"{''.join(parts)}</svg><small>{escaped(caption)}</small>"


def ticks(top: float, *, most: int = 5) -> list[float]:
    """Round values from 0 up to the first at or above `top`."""
    if top <= 0:
        return [0.0, 1.0]
    rough = top / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    count = math.ceil(top / step - 1e-9)
    return [step * place for place in range(count + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose both; fewer where these would be many. Both above 0."""
    for steps in ((1, 2, 5), (1,)):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        found = [s * 10.0**power for power in range(first, last + 1) for s in steps]
        below = max(value for value in found if value <= low * (1 + 1e-9))
        above = min((value for value in found if value >= high * (1 - 1e-9)), default=found[-1])
        inside = [value for value in found if below <= value <= max(above, 2 * below)]
        if len(inside) <= 8:
            break
    return inside


def _scale(low: float, high: float, start: float, end: float, logarithmic: bool) -> Callable[[float], float]:
    if logarithmic:
        low, high = math.log(low), math.log(high)
    width = high - low

    def place(value: float) -> float:
        at = math.log(value) if logarithmic else value
        share = (at - low) / width if width else 0.5
        return start + (end - start) * min(1.0, max(0.0, share))

    return place


def _x_tick(label: str, x: float) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escaped(label)}</text>'


def _y_tick(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    )


def _line(line: Line, scale_x: Callable[[float], float], scale_y: Callable[[float], float]) -> list[str]:
    style = f'class="{line.style}"'
    at = [(scale_x(p.x), scale_y(p.y)) for p in line.points]
    parts = [f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>']
    if not line.marks:
        return parts
    for point, (x, y) in zip(line.points, at, strict=True):
        if point.low is not None and point.high is not None:
            low, high = scale_y(point.low), scale_y(point.high)
            ends = "".join(f"M{x - 4:.1f} {end:.1f}h8" for end in (low, high))
            parts.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>')
        hollow = " hollow" if point.hollow else ""
        parts.append(
            f'<circle class="mark{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{escaped(point.told)}</title></circle>"
        )
    return parts
