"""The charts of one run or of several over each other: a table of kinds, each a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmtune.watch.report.chart import Chart, Line, Mark
from llmtune.watch.report.markup import Markup
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["CHARTS", "charts_html", "loss_charts", "smoothing_for"]

UNINTERESTING = ("epoch", "progress", "num_tokens", "num_loss_tokens", "num_sequences", "step_seconds")
"""Numbers of a training line that count up or say the same as another chart."""
UNINTERESTING_ENDINGS = ("_num_loss_tokens", "_num_answers", "_num_pairs", "loss_tokens_per_second")
CONSTANT_ENDINGS = ("step", "cpu_count", ".index", "_total_bytes", "power_limit_watts")
"""Figures of the machine that are the same all the time."""
FEWEST_SMOOTHED = 20
"""Below so many points a smoothed line says nothing that the points do not."""
MOST_OTHER_CHARTS = 24
COLOUR_OF_A_SHARED_LEVEL = 7
"""Grey: a run has it only where eight are compared."""
UNITS = {"_bytes": "bytes", "_use": "percent", ".use": "percent"}
"""Endings of names -> the unit of their values."""


@dataclass(frozen=True)
class ChartKind:
    """One row of `CHARTS`."""

    title: str
    metric: str
    note: str
    unit: str = ""
    kind: Literal["noisy", "plain"] = "noisy"
    from_zero: bool = True
    level: str = ""
    """Name of a level that the line is held against."""
    limit: Callable[[RunData], float | None] | None = None
    """Its value in a run."""


def smoothing_for(points: int) -> float:
    """Share of the past in the smoothed line of so many points: it follows a tenth of a short run, less of a long one.

    >>> smoothing_for(10), smoothing_for(100), smoothing_for(100_000)
    (0.0, 0.9, 0.97)
    """
    return 0.0 if points < FEWEST_SMOOTHED else min(0.97, round(1 - 10 / points, 2))


def _clip(run: RunData) -> float | None:
    value = run.flat_config.get("training.max_grad_norm")
    return float(value) if isinstance(value, int | float) and value else None


CHARTS: tuple[ChartKind, ...] = (
    ChartKind(
        "Gradient norm",
        "grad_norm",
        "Length of the gradient before clipping. Even is good; spikes are unusual rows, or a learning rate too high.",
        level="clipped above",
        limit=_clip,
    ),
    ChartKind("Learning rate", "learning_rate", "Size of each update: warm-up, then the schedule.", kind="plain"),
    ChartKind("Speed", "tokens_per_second", "Real tokens a second, padding not counted.", "tokens/s"),
    ChartKind(
        "Memory",
        "memory_bytes",
        "Most memory held so far, and what was planned.",
        "bytes",
        "plain",
        level="planned",
        limit=lambda run: run.planned_bytes,
    ),
    ChartKind(
        "Model FLOPs utilization", "mfu", "Part of the device's peak rate that the model's own work took.", "percent"
    ),
)
"""Every chart but the loss, in their order. A new one is one row."""


LOSS_NOTES = {
    "loss": "Lower is better. Held-out loss that rises while training loss falls means the rows are being memorized.",
    "reward": "Higher is better. Held-out reward that falls while that of training rises means prompts are memorized.",
}


def loss_charts(runs: Sequence[RunData]) -> list[Chart]:
    """The losses of the runs, and the rewards of those that learn from them; one chart for each unit."""
    return [_loss_chart(runs, unit) for unit in dict.fromkeys(run.loss_unit for run in runs)]


def _loss_chart(runs: Sequence[RunData], unit: str) -> Chart:
    """Training loss, smoothed, with the held-out points, and a mark at every event and skipped window."""
    several, lines, marks, longest = len(runs) > 1, [], [], 0
    drawn = [(place, run) for place, run in enumerate(runs) if run.loss_unit == unit]
    for place, run in drawn:
        prefix = f"{run.name}: " if several else ""
        train = run.metrics.get(run.loss_metric, Series())
        longest = max(longest, len(train))
        lines.append(Line(f"{prefix}training", train, "noisy", place))
        for number, (name, series) in enumerate(run.heldout_sets.items()):
            if several and name:
                continue  # the table has each data set; here they would hide the lines
            words = f"{prefix}held-out" + (f", source {name}" if name else "")
            lines.append(Line(words, series, "points", place if several else 1 + number))
        if not several:
            marks += [Mark(skip.step, f"window skipped after step {skip.step}: {skip.reason}") for skip in run.skipped]
            marks += [Mark(event.step, f"step {event.step}: {event.message}") for event in run.events]
    measured = drawn[0][1].measured
    return Chart(
        measured.capitalize(),
        lines,
        unit=unit,
        note=LOSS_NOTES[measured],
        smoothing=smoothing_for(longest),
        marks=marks,
        wide=True,
    )


def charts_html(runs: Sequence[RunData], *, with_values: bool = True) -> Markup:
    """All charts, those without a value left out; `with_values` as in `Chart.html`."""
    charts = [*loss_charts(runs), *(_chart(kind, runs) for kind in CHARTS), *_other_charts(runs), *_system_charts(runs)]
    return "".join(chart.html(with_values=with_values) for chart in charts)


def _chart(kind: ChartKind, runs: Sequence[RunData]) -> Chart:
    several, lines, longest = len(runs) > 1, [], 0
    levels: dict[float, list[int]] = {}
    for place, run in enumerate(runs):
        series = run.metrics.get(kind.metric, Series())
        longest = max(longest, len(series))
        lines.append(Line(run.name if several else kind.title.lower(), series, kind.kind, place))
        level = kind.limit(run) if kind.limit is not None and len(series) else None
        if level is not None:
            levels.setdefault(level, []).append(place)
    lines += [_level_line(kind, value, places, runs) for value, places in levels.items()]
    return Chart(kind.title, lines, kind.unit, kind.note, from_zero=kind.from_zero, smoothing=smoothing_for(longest))


def _level_line(kind: ChartKind, value: float, places: Sequence[int], runs: Sequence[RunData]) -> Line:
    """One line for a level and all the runs, by their places, that it belongs to."""
    ends = [x for place in places for x in runs[place].metrics[kind.metric].xs]
    is_shared = len(places) == sum(kind.metric in run.metrics for run in runs)
    name = kind.level if is_shared else f"{', '.join(runs[place].name for place in places)}: {kind.level}"
    # The colour of one run would say that it is its own.
    colour = places[0] if len(places) == 1 and len(runs) > 1 else COLOUR_OF_A_SHARED_LEVEL
    return Line(name, Series([min(ends), max(ends)], [value, value]), "limit", colour)


def _other_charts(runs: Sequence[RunData]) -> list[Chart]:
    """A chart for every further number of the record, held-out losses excepted."""
    shown = {kind.metric for kind in CHARTS} | set(UNINTERESTING)
    names: dict[str, None] = {}
    for run in runs:
        losses = {run.loss_metric, run.heldout_metric}
        names |= dict.fromkeys(
            name
            for name in run.metrics
            if name not in shown | losses and not name.endswith(("_mean_nll", *UNINTERESTING_ENDINGS))
        )
    return [_plain(name, [run.metrics for run in runs], runs, "step") for name in list(names)[:MOST_OTHER_CHARTS]]


def _system_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Figures of the machine over time."""
    names = dict.fromkeys(name for run in runs for name in run.system if not name.endswith(CONSTANT_ENDINGS))
    return [_plain(name, [run.system for run in runs], runs, "seconds") for name in list(names)[:MOST_OTHER_CHARTS]]


def _plain(name: str, values: Sequence[dict[str, Series]], runs: Sequence[RunData], x_name: str) -> Chart:
    several = len(runs) > 1
    is_evaluation = name.startswith("eval_")
    unit = next((unit for ending, unit in UNITS.items() if name.endswith(ending)), "")
    words = name.removeprefix("eval_").removesuffix(f"_{unit}").replace("_", " ").replace(".", " ")
    title = f"Held-out {words}" if is_evaluation else words.capitalize()
    lines = [
        Line(run.name if several else words, of_run.get(name, Series()), "points" if is_evaluation else "plain", place)
        for place, (run, of_run) in enumerate(zip(runs, values, strict=True))
    ]
    return Chart(title, lines, unit, from_zero=bool(unit), x_name=x_name)
