"""The four charts of a run that people look at, from the data of one run or of several, and how a chart is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from llmtune.watch.braille import DOTS_ACROSS, Plot, Range, range_of
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["STYLES", "Chart", "Line", "charts_of", "draw", "letter", "short", "short_bytes"]

STYLES = ("cyan", "magenta", "green", "red", "blue")
"""Colours of the runs in turn; each line also ends in the letter of its run where there are several."""

STEPS_OF_A_SHORT_RUN = 10
"""Up to so many steps nothing is smoothed, and in ten times as many as much as was asked for."""

AXIS_COLUMNS = 8
LEAST_COLUMNS, LEAST_ROWS = 24, 5


@dataclass(frozen=True)
class Line:
    """A series in a chart."""

    series: Series
    style: str
    marks: str = ""
    """A character for each point, instead of a line."""
    end_mark: str = ""
    """A character at the newest point."""


@dataclass(frozen=True)
class Chart:
    """What one chart shows."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[float, str]] = ()
    """Horizontal lines: value and name."""
    number: Callable[[float], str] = lambda value: f"{value:.3g}"
    """How a value of the axis is written."""


def charts_of(runs: Sequence[RunData], smoothing: float) -> list[Chart]:
    """Return loss, gradient norm, learning rate and speed of the runs; memory and its plan behind speed."""
    return [_loss(runs, smoothing), _gradients(runs), _learning_rate(runs), _speed(runs), _memory(runs)]


def draw(chart: Chart, columns: int, rows: int) -> Text:
    """Return a chart of exactly `rows` lines, none longer than `columns`: a title, the plot, and the axis of steps."""
    columns, rows = max(columns, LEAST_COLUMNS), max(rows, LEAST_ROWS)
    finite = [line.series.finite() for line in chart.lines]
    title = Text(fitting(chart.title, columns), "bold")
    if not any(len(series) for series in finite):
        return Text("\n").join([title, Text("no values yet", "dim"), *[Text()] * (rows - 2)])
    across = range_of([x for series in finite for x in (series.xs[:1] + series.xs[-1:])])
    values = [value for series in finite for value in series.values]
    up = range_of([*values, *(level for level, _ in chart.levels if _is_near(level, values))])
    width = columns - AXIS_COLUMNS
    plot = Plot(width, rows - 2, across, up)
    for level, _ in chart.levels:
        plot.level(level, "dim")
    for line in chart.lines:
        # Smallest and largest of each dot column; more points would fall on the same dots.
        series = line.series.thinned(3 * DOTS_ACROSS * width) if not line.marks else line.series
        if line.marks:
            for x, value in series.finite():
                plot.mark(x, value, line.marks, line.style)
        else:
            plot.line(series, line.style)
        if line.end_mark and (last := series.last) is not None:
            plot.mark(*last, line.end_mark, f"{line.style} bold")
    lines = [title]
    for index, cells in enumerate(plot.cells()):
        label = chart.number(up.high) if index == 0 else chart.number(up.low) if index == rows - 3 else ""
        # Appended, as the style of the text itself would make all that follows dim.
        axis = f"{label[: AXIS_COLUMNS - 1]:>{AXIS_COLUMNS - 1}}{'┤' if label else '│'}"
        row = Text().append(axis, "dim")
        # A stretch of one style at once: each piece costs the terminal library more than drawing it did.
        for style, stretch in groupby(cells, key=lambda cell: cell.style):
            row.append("".join(cell.character for cell in stretch), style)
        lines.append(row)
    return Text("\n").join([*lines, _axis(across, width)])


def fitting(title: str, columns: int) -> str:
    """Return a title without the last of its parts that do not fit: a number that is cut is another number.

    >>> fitting("loss 0.3287  o held-out 0.3384", 28), fitting("loss 0.3287", 8)
    ('loss 0.3287', 'loss 0.…')
    """
    while len(title) > columns and "  " in title:
        title = title.rpartition("  ")[0]
    return title if len(title) <= columns else f"{title[: columns - 1]}…"


def _is_near(level: float, values: list[float]) -> bool:
    """Whether a level is worth the room on the axis: within four times of what was measured."""
    return max(values) * 4 >= level >= min(values) / 4


def _axis(across: Range, width: int) -> Text:
    first, last = f"{across.low:,.0f}", f"step {across.high:,.0f}"
    return Text(f"{'':{AXIS_COLUMNS}}{first}{last:>{max(width - len(first), 0)}}", "dim")


def short(value: float | None) -> str:
    """Return a number in four digits, `-` for none.

    >>> short(6.25534), short(None), short(0.00012345)
    ('6.255', '-', '0.0001234')
    """
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def letter(index: int, runs: Sequence[RunData]) -> str:
    """Return the letter of a run among several; nothing for a run alone."""
    return chr(ord("A") + index % 26) if len(runs) > 1 else ""


def _series(run: RunData, name: str) -> Series:
    return run.metrics.get(name, Series())


def _lines(runs: Sequence[RunData], name: str) -> list[Line]:
    return _lines_of([_series(run, name) for run in runs], runs)


def _lines_of(series: Sequence[Series], runs: Sequence[RunData]) -> list[Line]:
    return [Line(line, STYLES[index % len(STYLES)], end_mark=letter(index, runs)) for index, line in enumerate(series)]


def _newest(lines: Sequence[Line], number: Callable[[float], str] = short) -> str:
    """The newest value of each line, for a title."""
    found = [(line.end_mark, line.series.last) for line in lines]
    return "  ".join(f"{mark} {number(last[1])}".strip() for mark, last in found if last is not None)


def _loss(runs: Sequence[RunData], smoothing: float) -> Chart:
    lines: list[Line] = []
    smooth: list[Line] = []
    heldout: list[Line] = []
    others: list[str] = []
    for index, run in enumerate(runs):
        if run.loss_unit != runs[0].loss_unit:
            # A loss of pairs or a reward over nats per token would be read as one scale.
            others.append(letter(index, runs))
            continue
        style, loss = STYLES[index % len(STYLES)], _series(run, run.loss_metric)
        # An average over more steps than a short run has would lag behind it.
        weight = min(smoothing, max(1 - STEPS_OF_A_SHORT_RUN / max(len(loss), 1), 0.0))
        # The raw line of several runs would hide the others.
        lines += [Line(loss, "dim")] if len(runs) == 1 else []
        smooth.append(Line(loss.smoothed(weight), style, end_mark=letter(index, runs)))
        heldout.append(Line(_series(run, run.heldout_metric), f"{style} bold", marks="o"))
    newest = _newest(
        [Line(line.series, "", end_mark=mark.end_mark) for line, mark in zip(heldout, smooth, strict=True)]
    )
    title = f"{runs[0].measured} {_newest(smooth)}" + (f"  o held-out {newest}" if newest else "")
    title += f"  ({', '.join(others)}: another unit)" if others else ""
    return Chart(title, [*lines, *smooth, *heldout])


def _gradients(runs: Sequence[RunData]) -> Chart:
    lines = _lines(runs, "grad_norm")
    clips = [run.flat_config.get("training.max_grad_norm") for run in runs]
    values = [float(clip) if isinstance(clip, int | float) and clip > 0 else None for clip in clips]
    levels = [(value, "clip") for value in dict.fromkeys(values) if value is not None]
    clipped = _level_words("clipped at", values, runs, "{:g}".format)
    return Chart(f"gradient norm {_newest(lines)}{clipped}", lines, levels)


def _learning_rate(runs: Sequence[RunData]) -> Chart:
    lines = _lines(runs, "learning_rate")
    return Chart(f"learning rate {_newest(lines)}", lines, number=lambda value: f"{value:.2g}")


def _speed(runs: Sequence[RunData]) -> Chart:
    lines = _lines(runs, "tokens_per_second")
    return Chart(
        f"tokens/s {_newest(lines, lambda value: f'{value:,.0f}')}", lines, number=lambda value: f"{value:,.0f}"
    )


def _memory(runs: Sequence[RunData]) -> Chart:
    lines = _lines(runs, "memory_bytes")
    values = [run.planned_bytes for run in runs]
    levels = [(value, "planned") for value in dict.fromkeys(values) if value is not None]
    planned = _level_words("planned", values, runs, short_bytes)
    return Chart(f"memory {_newest(lines, short_bytes)}{planned}", lines, levels, number=short_bytes)


def _level_words(
    name: str, values: Sequence[float | None], runs: Sequence[RunData], number: Callable[[float], str]
) -> str:
    """The end of a title that names a level: once where the runs share it, else for each with its letter."""
    if all(value is None for value in values):
        return ""
    if len(set(values)) == 1 and values[0] is not None:
        return f"  ╌ {name} {number(values[0])}"
    own = [f"{letter(index, runs)} {number(value)}" for index, value in enumerate(values) if value is not None]
    return f"  ╌ {name} {', '.join(own)}"


def short_bytes(count: float) -> str:
    """Return a number of bytes in three digits, for an axis.

    >>> short_bytes(613_570_000), short_bytes(1.414e9), short_bytes(0)
    ('614 MB', '1.41 GB', '0 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            digits = max(2 - int(math.log10(count / size)), 0)
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"
