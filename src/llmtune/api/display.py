"""Progress and lines in a notebook: one output that is redrawn now and then, and lines as plain output."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any

from llmtune.common.text import print_to_stderr

__all__ = ["Display", "print_line", "progress_html"]

EVERY_S = 0.5
MOST_OF_TIME = 0.01
"""Share of the time that drawing may take of a training."""


class Display:
    """Shows the HTML that `draw` returns in a notebook; outside of one it does nothing."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._next_s = float("-inf")
        self._handle: Any = None
        self._notebook = _notebook()

    def refresh(self, *, now: bool = False) -> None:
        """Redraw, at most twice a second and less often where drawing takes long; `now` redraws in any case."""
        started = time.monotonic()
        if self._notebook is None or (not now and started < self._next_s):
            return
        picture = self._notebook.HTML(self._draw())
        if self._handle is None:
            self._handle = self._notebook.display(picture, display_id=True)
        else:
            self._handle.update(picture)
        ended = time.monotonic()
        self._next_s = ended + max(EVERY_S, (ended - started) / MOST_OF_TIME)


def _notebook() -> Any:
    """Return IPython's display module where the kernel of a notebook runs this process, else None."""
    # Looked up, not imported: a notebook has loaded it already, and other programs do without it.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return sys.modules.get("IPython.display")


def print_line(line: str) -> None:
    """Print a line on stderr; in a notebook, which shows stderr like an error, as plain output of the cell."""
    if _notebook() is None:
        print_to_stderr(line)
    else:
        sys.stdout.write(line + "\n")  # a kernel flushes it


def progress_html(name: str, state: str, step: int, total_steps: int | None) -> str:
    """Return one line of HTML with a bar.

    >>> progress_html("run", "training", 3, 12)
    '<div><b>run</b>: training, step 3 of 12 <progress value="3" max="12"></progress></div>'
    """
    of = f" of {total_steps}" if total_steps else ""
    bar = f' <progress value="{step}" max="{total_steps}"></progress>' if total_steps else ""
    return f"<div><b>{html.escape(name)}</b>: {html.escape(state)}, step {step}{of}{bar}</div>"
