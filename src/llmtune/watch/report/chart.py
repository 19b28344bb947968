"""One chart as HTML: lines as SVG paths, axes and legend as text, the values beside them for hovering and smoothing.

The SVG is stretched to the width of its place while lines keep their width and text its size, so the same chart fits a
phone, a notebook and a printed page. Everything is drawn here; the page's script only adds hovering and smoothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from llmtune.watch.report.markup import Markup, json_for_script, number, text
from llmtune.watch.series import Series

__all__ = ["Chart", "Line", "Mark", "ticks"]

WIDTH = HEIGHT = 1000
"""Size of the SVG's own coordinates."""
FREE_OF_NAME = 0.84
"""Part of the axis of steps that its name leaves free, in the narrowest chart."""
DRAWN_POINTS = 1500
"""Points of a line that are drawn at most; a page is rarely wider than that."""
KEPT_POINTS = 12_000
"""Points of a line that stand beside the drawing for hovering and smoothing."""
SIGNIFICANT_DIGITS = 5
EMPTY_EDGE = 0.04
"""Share of the height above and below the lines."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    series: Series
    kind: Literal["noisy", "plain", "points", "limit"] = "plain"
    """`noisy`: drawn faint, with its smoothed form above it; `points`: few values, each with a dot; `limit`: dashed."""
    colour: int = 0
    """Index of the page's palette."""


@dataclass(frozen=True)
class Mark:
    """A position on the x axis that deserves a look."""

    x: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    """Shown in the title; `bytes` and `percent` also decide how values are written."""
    note: str = ""
    """What the numbers mean, in one sentence."""
    from_zero: bool = False
    smoothing: float = 0.0
    """Share of the past in the smoothed form of noisy lines (see `Series.smoothed`)."""
    marks: Sequence[Mark] = ()
    x_name: str = "step"
    wide: bool = False

    def html(self, *, with_values: bool = True) -> Markup:
        """The chart; nothing where no line has a value.

        `with_values`: with the values beside it, which the page's script needs.
        """
        drawn = [line for line in self.lines if len(line.series.finite())]
        if not any(line.kind != "limit" for line in drawn):
            return ""
        frame = _frame(drawn, from_zero=self.from_zero)
        visible = [line for line in drawn if line.kind != "limit" or _is_within(line, frame)]
        body = "".join(_paths(line, frame, self.smoothing) for line in visible)
        marks = "".join(_mark(mark, frame) for mark in self.marks if frame.x0 <= mark.x <= frame.x1)
        values = self._values(visible, frame) if with_values else ""
        unit = f' <span class="unit">{text(self.unit)}</span>' if self.unit else ""
        svg = (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{text(self.title)}">{_grid(frame)}{marks}{body}</svg>'
        )
        return (
            f'<figure class="chart{" wide" if self.wide else ""}"><figcaption><b>{text(self.title)}</b>{unit}'
            f'{_legend(drawn, visible, self.unit)}</figcaption><div class="plot">{svg}{_labels(frame, self)}</div>'
            f"{f'<p class=note>{text(self.note)}</p>' if self.note else ''}{values}</figure>"
        )

    def _values(self, lines: Iterable[Line], frame: _Frame) -> Markup:
        entries = []
        for index, line in enumerate(lines):
            kept = line.series.thinned(KEPT_POINTS)
            entries.append(
                {
                    "name": line.name,
                    "kind": line.kind,
                    "colour": line.colour,
                    "id": index,
                    "x": _compact(kept.xs),
                    "y": [_rounded(value) for value in kept.values],
                }
            )
        content = {
            "frame": [frame.x0, frame.x1, frame.y0, frame.y1],
            "unit": self.unit,
            "x": self.x_name,
            "lines": entries,
        }
        return f'<script type="application/json">{json_for_script(json.dumps(content, separators=(",", ":")))}</script>'


@dataclass(frozen=True)
class _Frame:
    """The part of the plane that is shown."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return WIDTH * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return HEIGHT * (self.y1 - value) / (self.y1 - self.y0)


def _frame(lines: Sequence[Line], *, from_zero: bool) -> _Frame:
    """The smallest frame around all lines with some air; a far limit does not flatten the others."""
    shown = [line.series.finite() for line in lines if line.kind != "limit"]
    xs = [x for series in shown for x in (series.xs[0], series.xs[-1])]
    low = min(min(series.values) for series in shown)
    high = max(max(series.values) for series in shown)
    limits = [line.series.values[0] for line in lines if line.kind == "limit"]
    span = high - (min(0.0, low) if from_zero else low)
    near = [limit for limit in limits if low - span <= limit <= high + span]
    low, high = min([low, *near]), max([high, *near])
    if from_zero:
        low = min(low, 0.0)
    air = (high - low) * EMPTY_EDGE or abs(high) * EMPTY_EDGE or 1.0
    bottom = low if from_zero and low == 0 else low - air
    x0, x1 = min(xs), max(xs)
    return _Frame(x0, x1 if x1 > x0 else x0 + 1, bottom, high + air)


def _is_within(line: Line, frame: _Frame) -> bool:
    return all(frame.y0 <= value <= frame.y1 for value in line.series.values)


def _paths(line: Line, frame: _Frame, smoothing: float) -> Markup:
    """The SVG of one line."""
    colour = f"c{line.colour % 8}"
    if line.kind == "limit":
        y = f"{frame.y(line.series.values[0]):.2f}"
        return f'<path class="limit {colour}" d="M0,{y}H{WIDTH}"/>'
    path = _path(line.series, frame)
    if line.kind == "noisy":
        smooth = _path(line.series.smoothed(smoothing), frame)
        return f'<path class="noisy {colour}" d="{path}"/><path class="smooth {colour}" d="{smooth}"/>'
    dots = ""
    if line.kind == "points":
        places = "".join(f"M{frame.x(x):.2f},{frame.y(y):.2f}h0" for x, y in line.series.thinned(400).finite())
        dots = f'<path class="dots {colour}" d="{places}"/>'
    return f'<path class="line {colour}" d="{path}"/>{dots}'


def _path(series: Series, frame: _Frame) -> str:
    """The `d` of a path through the points, interrupted at gaps."""
    parts = []
    for run in series.thinned(DRAWN_POINTS).runs():
        points = [f"{frame.x(x):.2f},{frame.y(y):.2f}" for x, y in run]
        # A lone point between two gaps would be invisible without a length.
        parts.append("M" + "L".join(points) + ("h0" if len(points) == 1 else ""))
    return "".join(parts)


def _grid(frame: _Frame) -> Markup:
    lines = "".join(f"M0,{frame.y(value):.2f}H{WIDTH}" for value in ticks(frame.y0, frame.y1, 5))
    return f'<path class="grid" d="{lines}"/>'


def _mark(mark: Mark, frame: _Frame) -> Markup:
    return f'<path class="mark" d="M{frame.x(mark.x):.2f},0V{HEIGHT}"><title>{text(mark.label)}</title></path>'


def _labels(frame: _Frame, chart: Chart) -> Markup:
    """The numbers of both axes, placed in percent of the plot."""
    ys = "".join(
        f'<i class="y" style="top:{frame.y(value) / HEIGHT:.2%}">{number(value, chart.unit)}</i>'
        for value in ticks(frame.y0, frame.y1, 5)
    )
    at_x = ticks(frame.x0, frame.x1, 6)
    if chart.x_name == "step":
        at_x = [value for value in at_x if value == int(value)]
    # The name of the axis stands at its end, with the last value: a number of a tick there would be under it.
    at_x = [value for value in at_x if frame.x(value) < FREE_OF_NAME * WIDTH]
    xs = "".join(f'<i class="x" style="left:{frame.x(value) / WIDTH:.2%}">{number(value)}</i>' for value in at_x)
    return f'{ys}{xs}<i class="xname">{text(chart.x_name)} {number(frame.x1)}</i>'


def _legend(lines: Sequence[Line], visible: Sequence[Line], unit: str) -> Markup:
    words = []
    for line in lines:
        last = line.series.last
        value = f" <b>{number(last[1], unit)}</b>" if last is not None else ""
        away = "" if line in visible else " (outside the picture)"
        words.append(f'<span class="key {line.kind} c{line.colour % 8}">{text(line.name)}{value}{away}</span>')
    return f'<span class="legend">{"".join(words)}</span>'


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them.

    >>> ticks(0.03, 1.0, 5), ticks(0, 7, 5)
    ([0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 2.0, 4.0, 6.0])
    """
    raw = (high - low) / most
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _compact(xs: Sequence[float]) -> object:
    """Positions as [first, distance, count] where they are evenly spaced, as those of most runs are."""
    values = [int(x) if x == int(x) else round(x, 3) for x in xs]
    if len(values) > 2:
        step = values[1] - values[0]
        if all(later - earlier == step for earlier, later in pairwise(values)):
            return {"from": values[0], "by": step, "n": len(values)}
    return values


def _rounded(value: float) -> float | None:
    """A value with the digits that a reader of the page can use; None for a gap."""
    return None if math.isnan(value) else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
