"""Everything the dashboard shows, as text: its head, charts, figures, answers and messages; a whole frame of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.common.text import printable
from llmtune.watch.charts import STYLES, charts_of, draw, letter
from llmtune.watch.figures import figures_of
from llmtune.watch.run_data import RunData

__all__ = ["SMOOTHING", "chart_texts", "figure_table", "frame", "head_lines", "message_lines", "sample_lines"]

SMOOTHING = 0.9
"""Share of the past in the smoothed loss."""

CHART_COLUMNS, CHART_ROWS = 36, 10
"""Columns a chart has at least beside another one, and rows of each."""

BAR_FILLS = "█░"
STATES = {
    "running": "green",
    "finished": "cyan",
    "stopped": "magenta",
    "interrupted": "red",
    "failed": "red",
    "diverged": "red",
}
ENDED = {
    "interrupted": "it was killed; `llmtune resume` goes on from its newest checkpoint",
    "stopped": "`llmtune resume` goes on with it",
    "failed": "`llmtune resume` goes on with it",
    "unknown": "nothing is written here yet",
}
"""What to do with a run in that state."""


def head_lines(runs: Sequence[RunData], columns: int) -> Text:
    """Return a line for each run: its state, a bar of its steps, and how long it has yet."""
    return Text("\n").join(_head(run, index, runs, columns) for index, run in enumerate(runs))


def _head(run: RunData, index: int, runs: Sequence[RunData], columns: int) -> Text:
    total, step, state = run.total_steps, run.step, run.state
    share = min(step / total, 1.0) if total else 0.0
    left_s = run.eta_seconds() if state == "running" else None
    words = f" {step:,}/{total:,} {share:4.0%}" if total else f" step {step:,}"
    words += f"  {_clock(left_s)} left" if left_s is not None else ""
    head = Text.assemble((f"{letter(index, runs)} ".lstrip(), f"bold {STYLES[index % len(STYLES)]}"))
    head.append(printable(run.name)[: max(columns // 2 - 4, 12)], "bold").append(" ")
    head.append(state, STATES.get(state, "dim")).append(" ")
    width = min(columns - len(head) - len(words) - 1, 50)
    if total and width >= 8:
        filled = round(share * width)
        head.append(BAR_FILLS[0] * filled, STYLES[index % len(STYLES)]).append(BAR_FILLS[1] * (width - filled), "dim")
    head.append(words)
    if state in ENDED and len(runs) == 1:
        head.append(f"\n{ENDED[state]}", "dim")
    return head


def chart_texts(runs: Sequence[RunData], columns: int, rows: int, *, smoothing: float = SMOOTHING) -> list[Text]:
    """Return loss, gradient norm, learning rate, speed and memory, each `columns` x `rows`."""
    return [draw(chart, columns, rows) for chart in charts_of(runs, smoothing)]


def figure_table(run: RunData) -> Table:
    """Return the newest figures, what they mean and whether they look right."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for figure in figures_of(run):
        mark, style = ("ok", "green") if figure.is_fine else ("look", "bold red")
        verdict = Text.assemble((f"{mark}: ", style), figure.verdict) if figure.verdict else Text()
        value = Text.assemble((f"{figure.name} ", "cyan"), (figure.value, "bold"))
        table.add_row(value, verdict, Text(figure.meaning, "dim"))
    return table


def sample_lines(run: RunData, *, prompts: int | None = None) -> Text:
    """Return the answers to each prompt over the steps; of the first `prompts` prompts where that is given."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(sample.prompt, []).append((sample.step, sample.text))
    if not by_prompt:
        return Text("no samples: `evaluation.prompts` names prompts to answer at each evaluation", "dim")
    lines = []
    for prompt, answers in list(by_prompt.items())[:prompts]:
        lines.append(Text(printable(prompt), "bold"))
        for index, (step, text) in enumerate(answers):
            same = index > 0 and answers[index - 1][1] == text
            shown = Text("as before", "dim") if same else Text(printable(text))
            lines.append(Text.assemble((f"  step {step:<6,} ", "cyan"), shown))
    return Text("\n").join(lines)


def message_lines(run: RunData, *, most: int = 200) -> Text:
    """Return the newest events and skipped steps, the last one at the bottom."""
    rows: list[tuple[int, Text]] = [
        (
            event.step,
            Text.assemble(
                (f"step {event.step:<6,} {event.level}: ", "bold red" if event.level == "error" else "magenta"),
                printable(event.message),
                (f" {printable(event.advice)}", "dim"),
            ),
        )
        for event in run.events
    ]
    rows += [
        (
            skipped.step,
            Text.assemble((f"step {skipped.step + 1:<6,} skipped: ", "bold red"), printable(skipped.reason)),
        )
        for skipped in run.skipped
    ]
    rows.sort(key=lambda row: row[0])
    return Text("\n").join(text for _, text in rows[-most:]) if rows else Text("no messages", "dim")


def frame(runs: Sequence[RunData], columns: int, *, smoothing: float = SMOOTHING) -> RenderableType:
    """Return one picture of the runs for a terminal of `columns`: everything below each other."""
    across = max(min(columns // CHART_COLUMNS, 3), 1)
    charts = chart_texts(runs, columns // across - 1, CHART_ROWS, smoothing=smoothing)
    grid = Table.grid(padding=(0, 1, 1, 0))
    for first in range(0, len(charts), across):
        grid.add_row(*charts[first : first + across])
    parts: list[RenderableType] = [head_lines(runs, columns), Text(), grid]
    for index, run in enumerate(runs):
        name = f"{letter(index, runs)} {printable(run.name)}: ".lstrip() if len(runs) > 1 else ""
        parts += [Text(), Text(f"{name}figures", "bold"), figure_table(run)]
        parts += [Text(), Text(f"{name}answers", "bold"), sample_lines(run, prompts=3)]
        parts += [Text(), Text(f"{name}messages", "bold"), message_lines(run, most=8)]
    parts.append(Text(time.strftime("at %H:%M:%S"), "dim"))
    return Group(*parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
