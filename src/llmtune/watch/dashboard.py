"""The dashboard in a terminal: charts, figures, answers and messages of runs, while they are written and afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from rich.console import Group, RenderableType
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Static

from llmtune.common.text import printable
from llmtune.watch.charts import charts_of, draw
from llmtune.watch.frame import SMOOTHING, figure_table, head_lines, message_lines, sample_lines
from llmtune.watch.pace import rest_after
from llmtune.watch.run_data import RunData

__all__ = ["Dashboard", "Source"]

SECONDS_BETWEEN_READINGS = 2.0

WEIGHTS = (0.0, 0.6, SMOOTHING, 0.98)
"""Shares of the past in the smoothed loss, in the order of the key."""


class Source(Protocol):
    """Where the data of a run come from: a run folder, or a log."""

    @property
    def data(self) -> RunData:
        """What was read so far; another object after a file was cut."""
        ...

    def refresh(self) -> bool:
        """Read what is new, and return whether anything was."""
        ...


class Dashboard(App[None]):
    """Shows the runs of `sources`; reads them again every two seconds."""

    CSS = """
    Screen { layout: vertical; }
    #head { height: auto; padding: 0 1; }
    #body { padding: 0 1; scrollbar-size-vertical: 1; }
    #view { width: 100%; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("1", "show('charts')", "charts"),
        Binding("2", "show('figures')", "figures"),
        Binding("3", "show('answers')", "answers"),
        Binding("4", "show('messages')", "messages"),
        Binding("m", "memory", "memory"),
        Binding("s", "smooth", "smooth"),
    ]
    ENABLE_COMMAND_PALETTE = False
    TITLE = "llmtune"

    def __init__(self, sources: Sequence[Source], *, seconds: float = SECONDS_BETWEEN_READINGS) -> None:
        # The terminal's own colours: a dark page in a light terminal would be unlike everything around it.
        super().__init__()
        self._sources = sources
        self._seconds = seconds
        self._shown = "charts"
        self._with_memory = False
        self._smoothing = WEIGHTS.index(SMOOTHING)
        self._busy_s: float | None = None
        """Processor time at the last reading; None where what follows is not counted: a start, what a key asks for."""
        self._rests_until = 0.0
        self._states: list[str] | None = None
        """Of the runs when they were drawn; None before."""

    @property
    def runs(self) -> list[RunData]:
        """The data of the runs."""
        return [source.data for source in self._sources]

    def compose(self) -> ComposeResult:
        """Make the head, the view and the line of keys."""
        yield Static(id="head")
        with VerticalScroll(id="body"):
            yield Static(id="view")
        yield Footer()

    def on_mount(self) -> None:
        """Draw, and read again from now on."""
        self.theme = "ansi-dark"
        self.read()
        self.set_interval(self._seconds, self.read_sparingly)

    def on_resize(self, event: events.Resize) -> None:  # noqa: ARG002
        """Draw for the new size."""
        self.draw_at_once()

    def read_sparingly(self) -> None:
        """Read, unless that and drawing would take too much from the run (see `pace`)."""
        now, busy_s = time.monotonic(), time.process_time()
        if now < self._rests_until:
            return
        # Everything since the last reading: most of the work is done after it, when the screen is drawn.
        if self._busy_s is not None:
            self._rests_until = now + rest_after(busy_s - self._busy_s)
        self._busy_s = busy_s
        self.read()

    def read(self) -> None:
        """Read what is new, and draw where anything was."""
        # Every one of them, and not only up to the first that has something new.
        news = [source.refresh() for source in self._sources]
        # A run that is killed changes no file.
        if any(news) or [run.state for run in self.runs] != self._states:
            self.draw()

    def draw_at_once(self) -> None:
        """Draw what a key asks for; no rest follows from that."""
        self._busy_s = None
        self.draw()

    def draw(self) -> None:
        """Draw head and view for the size of the terminal."""
        self._states = [run.state for run in self.runs]
        columns = self.size.width - 3  # the margins, and the scroll bar
        head = head_lines(self.runs, columns)
        self.query_one("#head", Static).update(head)
        rows = self.size.height - 1 - len(head.split("\n"))
        view = self._charts(columns, rows) if self._shown == "charts" else self._each(VIEWS[self._shown])
        self.query_one("#view", Static).update(view)

    def action_show(self, view: str) -> None:
        """Show another view, from its top."""
        self._shown = view
        self.query_one("#body", VerticalScroll).scroll_home(animate=False)
        self.draw_at_once()

    def action_memory(self) -> None:
        """Show memory instead of speed as the fourth chart, or the other way round."""
        self._with_memory = not self._with_memory
        self.draw_at_once()

    def action_smooth(self) -> None:
        """Smooth the loss more, and after the most not at all."""
        self._smoothing = (self._smoothing + 1) % len(WEIGHTS)
        self.notify(f"smoothing {WEIGHTS[self._smoothing]:g}", timeout=2)
        self.draw_at_once()

    def _charts(self, columns: int, rows: int) -> Text:
        weight = WEIGHTS[self._smoothing]
        loss, gradients, learning_rate, speed, memory = charts_of(self.runs, weight)
        lines: list[Text] = []
        # One text, line by line: a table around the charts takes longer than drawing them does.
        for pair in ((loss, gradients), (learning_rate, memory if self._with_memory else speed)):
            # Without `allow_blank` rich would leave out the last line of a chart that has no values yet.
            texts = (draw(chart, columns // 2 - 1, rows // 2) for chart in pair)
            left, right = (text.split("\n", allow_blank=True) for text in texts)
            for line, beside in zip(left, right, strict=True):
                lines.append(line.append(" " * (columns // 2 - line.cell_len)).append_text(beside))
        return Text("\n").join(lines)

    def _each(self, show: Callable[[RunData], RenderableType]) -> RenderableType:
        if len(self.runs) == 1:
            return show(self.runs[0])
        return Group(*(part for run in self.runs for part in (Text(printable(run.name), "bold"), show(run), Text())))


VIEWS: dict[str, Callable[[RunData], RenderableType]] = {
    "figures": figure_table,
    "answers": sample_lines,
    "messages": message_lines,
}
"""Views of one run at a time."""
