"""Lines drawn with braille characters: each cell of a terminal holds two by four dots."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from llmtune.watch.series import Series

__all__ = ["Cell", "Plot", "Range", "range_of"]

DOTS_ACROSS, DOTS_DOWN = 2, 4
BLANK = 0x2800
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the dot in [row][column] of a cell (Unicode 15.0, Braille Patterns)."""


class Range(NamedTuple):
    """The values that an axis spans; `low` < `high`."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Place of `value` on the axis: 0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


class Cell(NamedTuple):
    """One character, and the style of what was drawn there last."""

    character: str
    style: str


def range_of(values: list[float]) -> Range:
    """Return the range of the finite values, widened where it has no width; 0 to 1 where there are none.

    >>> range_of([2.0, math.nan, 5.0]), range_of([3.0]), range_of([])
    (Range(low=2.0, high=5.0), Range(low=2.5, high=3.5), Range(low=0.0, high=1.0))
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Range(0.0, 1.0)
    low, high = min(finite), max(finite)
    # Below this the axis would have one value for both ends in floating point.
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        half = abs(low) / 6 or 0.5
        return Range(low - half, high + half)
    return Range(low, high)


class Plot:
    """A field of `columns` x `rows` cells that lines, marks and levels are drawn on."""

    def __init__(self, columns: int, rows: int, across: Range, up: Range) -> None:
        self._columns, self._rows = columns, rows
        self._across, self._up = across, up
        self._dots = [[0] * columns for _ in range(rows)]
        self._styles = [[""] * columns for _ in range(rows)]
        self._marks: dict[tuple[int, int], Cell] = {}
        self._levels: dict[int, str] = {}

    def line(self, series: Series, style: str) -> None:
        """Draw straight lines between the points of each part without a gap; a point alone is a dot."""
        for part in series.runs():
            places = [self._place(x, value) for x, value in part]
            self._dot(*places[0], style)
            for start, end in pairwise(places):
                self._segment(start, end, style)

    def mark(self, x: float, value: float, character: str, style: str) -> None:
        """Draw a character at a point, over whatever is there."""
        column, row = self._place(x, value)
        self._marks[row // DOTS_DOWN, column // DOTS_ACROSS] = Cell(character, style)

    def level(self, value: float, style: str) -> None:
        """Draw a broken horizontal line, behind everything; nothing where the value is outside the field."""
        if self._up.low <= value <= self._up.high:
            self._levels[self._place(self._across.low, value)[1] // DOTS_DOWN] = style

    def cells(self, *, dash: str = "╌") -> list[list[Cell]]:
        """The field, its rows from the top."""
        return [[self._cell(row, column, dash) for column in range(self._columns)] for row in range(self._rows)]

    def _cell(self, row: int, column: int, dash: str) -> Cell:
        if (row, column) in self._marks:
            return self._marks[row, column]
        if self._dots[row][column]:
            return Cell(chr(BLANK + self._dots[row][column]), self._styles[row][column])
        return Cell(dash, self._levels[row]) if row in self._levels else Cell(" ", "")

    def _place(self, x: float, value: float) -> tuple[int, int]:
        """The dot of a point, counted from the upper left; the nearest edge for one outside."""
        width, height = self._columns * DOTS_ACROSS - 1, self._rows * DOTS_DOWN - 1
        across = min(max(self._across.share(x), 0.0), 1.0)
        up = min(max(self._up.share(value), 0.0), 1.0)
        return round(across * width), round((1 - up) * height)

    def _dot(self, column: int, row: int, style: str) -> None:
        self._dots[row // DOTS_DOWN][column // DOTS_ACROSS] |= _BITS[row % DOTS_DOWN][column % DOTS_ACROSS]
        self._styles[row // DOTS_DOWN][column // DOTS_ACROSS] = style

    def _segment(self, start: tuple[int, int], end: tuple[int, int], style: str) -> None:
        steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        for step in range(1, steps + 1):
            share = step / steps
            self._dot(
                round(start[0] + (end[0] - start[0]) * share), round(start[1] + (end[1] - start[1]) * share), style
            )
