"""What a run says, laid out for a terminal: labelled facts, choices in columns, memory as a bar, commands to copy.

Where there is no terminal the same facts are plain lines (`str` of each), which programs read. Nothing is shown by
colour alone, and every colour is one of the terminal's own, so that it is legible on dark and on light.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TextIO

# Not imported lazily: importing rich draws from Python's global random numbers, which are the training's once a run
# has started.
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmtune.common.decisions import Decision
from llmtune.common.text import Fact, readable_bytes

__all__ = ["LABEL_COLUMNS", "Screen", "is_ascii", "open_screen", "shares", "shortened", "side_by_side"]

LABEL_COLUMNS = 10
"""Columns of the labels on the left."""

WIDEST = 120
"""Columns a screen fills at most: eyes lose the line on a wider one. A choice's reason may go on to the edge."""

KEY_COLUMNS, VALUE_COLUMNS = 22, 18
"""Columns of a choice's key and value; longer ones are folded. Fixed, because choices are shown in two parts."""

LEAST_REASON_COLUMNS = 24
"""With less room than this beside key and value, a reason stands in the line below."""

WARNINGS = ("warning", "error")
_LABELLED = re.compile(r"(warning|note|run|changed|cleaned up|tokenizing)(?:: | {2,})(?=\S)")
"""How the lines begin that come one by one."""

_FILLS = ("█▓▒░╳═┃┅", "#=+-x:|.")
_COLOURS = ("blue", "magenta", "cyan", "green", "red")


class Screen:
    """Lays out facts on a console; `verbose`: reasons in full. Its `line` is a `PrintLine`."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self._console, self._verbose = console, verbose
        self._has_shortened = False

    def line(self, line: str) -> None:
        """Show a line that came alone, its label in the column of labels."""
        found = _LABELLED.match(line)
        label = found[1] if found else ""
        self.facts([Fact(label, line[found.end() :] if found else line)])

    def title(self, *parts: str) -> None:
        """Show what follows under a rule with these words in it."""
        dash, dot = ("-", "-") if is_ascii(self._console) else ("─", "·")
        words = f" {f' {dot} '.join(part for part in parts if part)} "
        rest = min(self._console.width, WIDEST) - 2 - len(words)
        self._print(Text.assemble((dash * 2, "dim"), (words, "bold"), (dash * max(rest, 2), "dim")))

    def facts(self, facts: Iterable[Fact]) -> None:
        """Show each fact behind its label, which is not repeated; the parts of a size as a bar."""
        grid = self._grid(LABEL_COLUMNS - 1)
        last = None
        for fact in facts:
            label = fact.label.rstrip(":")
            style = "bold red" if label in WARNINGS else "cyan"
            grid.add_row(Text("" if label == last else label, style), Text(fact.text))
            last = label
            if fact.parts:
                grid.add_row("", self._bar(fact.parts))
        self._print(Padding(grid, (0, 0, 0, 1)))

    def decisions(self, heading: str, decisions: Sequence[Decision]) -> None:
        """Show choices as key, value and reason under a heading (none for the second part of a list)."""
        if heading:
            self._print("")
            self._print(Text(f" {heading}", "bold"))
        room = self._console.width - KEY_COLUMNS - VALUE_COLUMNS - 7
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=KEY_COLUMNS, overflow="fold")
        grid.add_column(overflow="fold", width=VALUE_COLUMNS if room >= LEAST_REASON_COLUMNS else None)
        for decision in decisions:
            value = self._shortened(str(decision.value), 2 * VALUE_COLUMNS)
            cells = [Text(decision.key, "cyan"), Text(value)]
            if room >= LEAST_REASON_COLUMNS:
                grid.add_row(*cells, Text(self._shortened(decision.reason, room), "dim"))
            else:
                grid.add_row(*cells)
                grid.add_row("", Text(self._shortened(decision.reason, self._console.width - KEY_COLUMNS - 5), "dim"))
        self._print(Padding(grid, (0, 0, 0, 2)))

    def end_of_decisions(self) -> None:
        """Say where the reasons are in full, if one was shortened."""
        if self._has_shortened:
            where = Text("in full: --verbose, and `decisions` in the run's run.json", "dim")
            self._print(Padding(where, (0, 0, 0, 2)))
        self._print("")

    def commands(self, heading: str, commands: Iterable[tuple[str, str]]) -> None:
        """Show commands to copy, each behind its purpose."""
        self._print("")
        self._print(Text(f" {heading}", "bold"))
        for purpose, command in commands:
            shown = Text.assemble((f" {purpose:<{LABEL_COLUMNS}}", "cyan"), command)
            # Never folded by us: what a terminal folds itself is still one line when it is copied.
            self._print(shown, soft_wrap=True)

    def _shortened(self, text: str, columns: int) -> str:
        shown = text if self._verbose else shortened(text, columns, mark="..." if self._ascii else "…")
        self._has_shortened |= shown != text
        return shown

    @property
    def _ascii(self) -> bool:
        return is_ascii(self._console)

    def _grid(self, first_columns: int) -> Table:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=first_columns, overflow="fold")
        grid.add_column(overflow="fold", max_width=min(self._console.width, WIDEST) - first_columns - 3)
        return grid

    def _bar(self, parts: Mapping[str, int]) -> Text:
        """The parts side by side, each with a fill of its own, and below them what each fill stands for."""
        fills = _FILLS[self._ascii]
        parts = {name: count for name, count in parts.items() if count}
        styles = [(fills[index % len(fills)], _COLOURS[index % len(_COLOURS)]) for index in range(len(parts))]
        columns = min(self._console.width, WIDEST) - LABEL_COLUMNS - 4
        cells = shares(list(parts.values()), columns)
        bar = Text.assemble(*((fill * count, style) for (fill, style), count in zip(styles, cells, strict=True)))
        legend = [
            Text.assemble((fill * 2, style), f" {name} {readable_bytes(count)}")
            for (fill, style), (name, count) in zip(styles, parts.items(), strict=True)
        ]
        return Text("\n").join([bar, *side_by_side(legend, columns)])

    def _print(self, shown: Padding | Text | str, *, soft_wrap: bool = False) -> None:
        with suppress(OSError):  # the terminal is gone, and the run is not: as with plain lines
            self._console.print(shown, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


def open_screen(stream: TextIO | None = None, *, verbose: bool = False) -> Screen | None:
    """Return a screen on `stream` (stderr when not given); None where it is no terminal, or one without a cursor."""
    # Its own stream at each line: while a bar is drawn, rich puts another one there that prints above the bar.
    console = Console(file=stream) if stream is not None else Console(stderr=True)
    is_shown = sys.stderr is not None and console.is_terminal and not console.is_dumb_terminal
    return Screen(console, verbose=verbose) if is_shown else None


def is_ascii(console: Console) -> bool:
    """Return whether only ASCII can be shown."""
    return console.options.ascii_only or os.environ.get("LC_ALL") in ("C", "POSIX")


def side_by_side(cells: Iterable[Text], columns: int) -> list[Text]:
    """Return lines of at most `columns` that hold the cells in order; a cell is never torn apart."""
    lines: list[Text] = []
    for cell in cells:
        if lines and len(lines[-1]) + 3 + len(cell) <= columns:
            lines[-1] = Text.assemble(lines[-1], "   ", cell)
        else:
            lines.append(cell)
    return lines


def shares(counts: Sequence[int], cells: int) -> list[int]:
    """Share `cells` by `counts`, at least one to each, so that they add up to `cells`.

    >>> shares([70, 20, 9, 1], 20)
    [14, 4, 1, 1]
    >>> shares([1000, 1, 1], 10)
    [8, 1, 1]
    """
    total = sum(counts)
    exact = [count * cells / total for count in counts]
    shared = [max(int(share), 1) for share in exact]
    # Largest remainder first; where the smallest took more than their share, the largest gives it.
    by_remainder = sorted(range(len(counts)), key=lambda index: shared[index] - exact[index])
    for index in by_remainder[: max(cells - sum(shared), 0)]:
        shared[index] += 1
    shared[shared.index(max(shared))] += min(cells - sum(shared), 0)
    return shared


def shortened(text: str, columns: int, *, mark: str = "…") -> str:
    """Return `text` in at most `columns`, cut behind a clause where one ends in the second half, else behind a word.

    >>> shortened("no padding, loss on trained rows only; equal to the plain forward", 40)
    'no padding, loss on trained rows only …'
    >>> shortened("usual from scratch", 40)
    'usual from scratch'
    """
    if len(text) <= columns:
        return text
    room = text[: columns - len(mark)]
    ends = [found.start() for found in re.finditer(r"[;:,]? |\.$", text[: len(room) + 1])]
    clauses = [found.start() for found in re.finditer(r"; |: | \(", room) if found.start() >= columns // 2]
    cut = (clauses or ends or [len(room) - 1])[-1]
    return f"{text[:cut].rstrip(' ,;:')} {mark}"
