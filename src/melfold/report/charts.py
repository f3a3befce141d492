"""Charts as plain SVG. Colours come from the page's style sheet, by class, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 38
POINTS = 200
"""Of a line; a longer one is averaged."""


@dataclass(frozen=True)
class Line:
    """A line or a cloud of points.

    Args:
        style: the number of its colour.
        names: what each point says when pointed at.
        labels: what is written beside each point.
        low, high: the ends of each point's interval.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    dots: bool = False
    line: bool = True
    names: Sequence[str] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Level:
    """A horizontal line with a name, such as a medal's."""

    name: str
    y: float
    kind: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart and what it shows, in words, for those who cannot see it."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    diagonal: bool = False
    x_texts: Sequence[tuple[float, str]] = ()
    """Ticks of the x axis in place of round numbers."""
    about: str = ""
    width: int = WIDTH
    height: int = HEIGHT

    def svg(self) -> Markup:
        """The chart; empty if no line has a point."""
        if not any(len(line.x) for line in self.lines):
            return Markup("")
        frame = _Frame(self)
        parts = [*frame.grid(), *frame.level_lines()]
        if self.diagonal:
            low, high = max(frame.x0, frame.y0), min(frame.x1, frame.y1)
            parts.append(f'<line class="diagonal" {frame.ends(low, low, high, high)}/>')
        for line in self.lines:
            parts += frame.draw(line)
        parts += frame.level_names()
        title = escape(self.title + (f". {self.about}" if self.about else ""))
        return Markup(
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
        )


class _Frame:
    """The axes of a chart: from values to pixels."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        xs = [x for line in chart.lines for x in line.x]
        ys = [y for line in chart.lines for y in (*line.y, *line.low, *line.high)] + [level.y for level in chart.levels]
        self.x0, self.x1 = chart.x_range or _padded(xs, 0.0 if chart.lines[0].line else 0.08)
        self.y0, self.y1 = chart.y_range or _padded(ys, 0.08)

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.chart.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(TOP + (self.y1 - value) / (self.y1 - self.y0) * (self.chart.height - TOP - BOTTOM), 1)

    def ends(self, x0: float, y0: float, x1: float, y1: float) -> str:
        return f'x1="{self.x(x0)}" y1="{self.y(y0)}" x2="{self.x(x1)}" y2="{self.y(y1)}"'

    def grid(self) -> list[str]:
        chart, parts = self.chart, []
        y_ticks, x_ticks = ticks(self.y0, self.y1, 4), ticks(self.x0, self.x1, 5)
        for value in y_ticks:
            parts.append(f'<line class="grid" {self.ends(self.x0, value, self.x1, value)}/>')
            parts.append(f'<text x="{LEFT - 6}" y="{self.y(value) + 3.5}" text-anchor="end">{_number(value, y_ticks)}</text>')
        foot = chart.height - BOTTOM + 15
        for value, text in chart.x_texts or [(value, _number(value, x_ticks)) for value in x_ticks]:
            parts.append(f'<text x="{self.x(value)}" y="{foot}" text-anchor="middle">{escape(text)}</text>')
        parts.append(f'<line class="axis" {self.ends(self.x0, self.y0, self.x1, self.y0)}/>')
        x_label, y_label = escape(chart.x_label), escape(chart.y_label)
        middle = (LEFT + chart.width - RIGHT) / 2
        parts.append(f'<text class="name" x="{middle}" y="{chart.height - 5}" text-anchor="middle">{x_label}</text>')
        height = (TOP + chart.height - BOTTOM) / 2
        parts.append(f'<text class="name" transform="translate(11 {height}) rotate(-90)" text-anchor="middle">{y_label}</text>')
        return parts

    def level_lines(self) -> list[str]:
        inside = [level for level in self.chart.levels if self.y0 <= level.y <= self.y1]
        return [f'<line class="level {level.kind}" {self.ends(self.x0, level.y, self.x1, level.y)}/>' for level in inside]

    def level_names(self) -> list[str]:
        return [
            f'<text class="halo" x="{LEFT + 4}" y="{self.y(level.y) - 4}">{escape(level.name)}</text>'
            for level in self.chart.levels
            if self.y0 <= level.y <= self.y1
        ]

    def draw(self, line: Line) -> list[str]:
        xs, ys = thin(line.x, line.y) if line.line and not line.dots else (line.x, line.y)
        points, parts = [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)], []
        for x, low, high in zip(line.x, line.low, line.high, strict=False):
            parts.append(f'<line class="whisker s{line.style}" {self.ends(x, low, x, high)}/>')
        if line.line and len(points) > 1:
            path = " ".join(f"{x:g},{y:g}" for x, y in points)
            parts.append(f'<polyline class="line s{line.style}" points="{path}"/>')
        if line.dots or len(points) == 1:
            for number, (x, y) in enumerate(points):
                name = f"<title>{escape(line.names[number])}</title>" if number < len(line.names) else ""
                parts.append(f'<circle class="dot s{line.style}" cx="{x:g}" cy="{y:g}" r="3.6">{name}</circle>')
        return parts + self._labels(points, line.labels)

    def _labels(self, points: list[tuple[float, float]], labels: Sequence[str]) -> list[str]:
        """Text beside points, on the side that has room; one that would cover another is left to the tooltip."""
        parts: list[str] = []
        taken: list[tuple[float, float, float, float]] = []
        for (x, y), name in zip(points, labels, strict=False):
            name = name if len(name) <= 18 else name[:17] + "…"
            width, left = 6.0 * len(name), x > (LEFT + self.chart.width - RIGHT) / 2
            x0 = x - 8 - width if left else x + 8
            box = (x0, y - 7, x0 + width, y + 7)
            if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                continue
            taken.append(box)
            anchor, at = ("end", x - 7) if left else ("start", x + 7)
            parts.append(f'<text class="halo" x="{at:g}" y="{y + 3.5:g}" text-anchor="{anchor}">{escape(name)}</text>')
        return parts


def thin(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """A line of at most so many points, each the mean of its neighbours; the last one is kept."""
    if len(x) <= points:
        return list(x), list(y)
    edges = np.linspace(0, len(x) - 1, points).astype(int)
    means = [np.add.reduceat(np.asarray(v[:-1], float), edges[:-1]) / np.diff(edges) for v in (x, y)]
    return [*means[0], x[-1]], [*means[1], y[-1]]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within a range, about so many."""
    raw = (high - low) / about
    step = 10 ** math.floor(math.log10(raw))
    step *= min((1, 2, 5, 10), key=lambda m: abs(m * step - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float, all_ticks: Sequence[float]) -> str:
    step = all_ticks[1] - all_ticks[0] if len(all_ticks) > 1 else abs(value) or 1
    if step < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}"


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * share or (0 if high > low else abs(high) * 0.05 or 0.5)
    return low - room, high + room
