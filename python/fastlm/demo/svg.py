"""Pictures for the report as inline SVG; colours come from the page's style and follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style` is a class of the page's style sheet (`own`, `faint`, `other`)."""

    name: str
    points: Points
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


@dataclass(frozen=True)
class Bar:
    """One bar; `own` marks ours."""

    name: str
    value: float
    label: str
    own: bool = False
    note: str = ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover `[low, high]`."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / count))
    step *= min((m for m in (1, 2, 2.5, 5, 10) if span / (step * m) <= count), default=10)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    levels: Sequence[Level],
    *,
    x_label: str,
    y_label: str,
    width: int = 860,
    height: int = 340,
) -> str:
    """Lines over a common x axis, with labelled horizontal levels."""
    left, right, top, bottom = 52, 150, 14, 44
    values = [y for line in series for _, y in line.points] + [level.value for level in levels]
    xs = [x for line in series for x, _ in line.points]
    if not xs:
        return ""
    low, high = min(values), _calm_top(values)
    pad = 0.06 * max(high - low, 1e-6)
    low, high = max(0.0, low - pad), high + pad
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return top + (high - y) / (high - low) * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)} over '
        f'{escape(x_label)}">'
    ]
    # The first steps leave the picture at the top instead of flattening the rest.
    parts.append(
        f'<clipPath id="plot"><rect x="0" y="{top}" width="{width}" '
        f'height="{height - top - bottom}"/></clipPath>'
    )
    for tick in ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in ticks(x_low, x_high, 6):
        parts.append(
            f'<text class="tick" x="{px(tick):.1f}" y="{height - bottom + 18}" '
            f'text-anchor="middle">{_short(tick)}</text>'
        )
    labels: list[tuple[float, str, str]] = []
    for level in levels:
        y = py(level.value)
        parts.append(f'<line class="level" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        labels.append((y, f"{level.name} {level.value:.2f}", "tick"))
    for line in series:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline clip-path="url(#plot)" class="line {line.style}" points="{path}"/>')
        if line.dots:
            parts += [
                f'<circle clip-path="url(#plot)" class="dot {line.style}" cx="{px(x):.1f}" cy="{py(y):.1f}" '
                f'r="3.5"/>'
                for x, y in line.points
            ]
        last = line.points[-1][1]
        value = "" if line.style == "faint" else f" {last:.2f}"
        labels.append((py(last), line.name + value, f"name {line.style}"))
    for y, text, style in _apart(labels, 15, height - bottom):
        parts.append(f'<text class="{style}" x="{width - right + 8}" y="{y + 4:.1f}">{escape(text)}</text>')
    middle = (left + width - right) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(13 {(top + height - bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">'
        f"{escape(y_label)}</text></svg>"
    )
    return "".join(parts)


def bar_chart(bars: Sequence[Bar], *, width: int = 860, name_width: int = 220) -> str:
    """Horizontal bars from zero, the value beside each."""
    row, right = 38, 190
    largest = max((bar.value for bar in bars), default=0.0) or 1.0
    parts = [f'<svg viewBox="0 0 {width} {row * len(bars) + 4}" role="img" aria-label="bars">']
    for index, bar in enumerate(bars):
        y = index * row + 4
        length = max(2.0, bar.value / largest * (width - name_width - right))
        style = "own" if bar.own else "other"
        parts.append(
            f'<text class="label" x="{name_width - 12}" y="{y + 20}" '
            f'text-anchor="end">{escape(bar.name)}</text>'
        )
        parts.append(
            f'<rect class="bar {style}" x="{name_width}" y="{y + 3}" width="{length:.1f}" height="24" '
            f'rx="4"/>'
        )
        parts.append(
            f'<text class="value" x="{name_width + length + 10:.1f}" y="{y + 20}">{escape(bar.label)}'
            f'<tspan class="tick" dx="8">{escape(bar.note)}</tspan></text>'
        )
    return "".join(parts) + "</svg>"


def _calm_top(values: Sequence[float]) -> float:
    """Largest value that is shown: the first steps of a curve are so high that the rest would look flat."""
    ordered = sorted(values)
    return max(ordered[int(0.93 * (len(ordered) - 1))], ordered[len(ordered) // 2] * 1.2)


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _apart(
    labels: list[tuple[float, str, str]], distance: float, lowest: float
) -> list[tuple[float, str, str]]:
    """Moves labels so that none covers another."""
    placed: list[tuple[float, str, str]] = []
    for y, text, style in sorted(labels):
        placed.append((max(y, placed[-1][0] + distance) if placed else y, text, style))
    overflow = placed[-1][0] - lowest if placed else 0.0
    if overflow > 0:  # push back up from the bottom
        limit = lowest
        for index in range(len(placed) - 1, -1, -1):
            y, text, style = placed[index]
            placed[index] = (min(y, limit), text, style)
            limit = placed[index][0] - distance
    return placed
