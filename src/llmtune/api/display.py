"""Progress and lines inside a notebook: one output that is drawn anew, at most twice a second.

Lines as plain output, not as errors.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any

from llmtune.common.printing import print_to_stderr

__all__ = ["Display", "print_line", "progress_html"]

EVERY_S = 0.5


class Display:
    """Shows what `draw` gives in the notebook this process runs in, if it runs in one."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._last_s = float("-inf")
        self._handle: Any = None
        self._notebook = _notebook()

    def refresh(self, *, now: bool = False) -> None:
        """Draw anew, unless that was done within the last half second (`now`: all the same)."""
        if self._notebook is None or (not now and time.monotonic() - self._last_s < EVERY_S):
            return
        self._last_s = time.monotonic()
        shown = self._notebook.HTML(self._draw())
        if self._handle is None:
            self._handle = self._notebook.display(shown, display_id=True)
        else:
            self._handle.update(shown)


def _notebook() -> Any:
    """IPython's display module where a notebook's kernel runs this process, else None; it is not imported for that."""
    shell = sys.modules.get("IPython")
    current = shell.get_ipython() if shell is not None else None
    if current is None or not hasattr(current, "kernel"):
        return None
    return sys.modules.get("IPython.display")


def print_line(line: str) -> None:
    """Print a line on stderr; in a notebook, where stderr looks like a failure, as the cell's plain output."""
    if _notebook() is None:
        print_to_stderr(line)
    else:
        sys.stdout.write(line + "\n")  # a kernel sends it on by itself


def progress_html(name: str, state: str, step: int, total_steps: int | None) -> str:
    """One line and a bar.

    >>> progress_html("run", "training", 3, 12)
    '<div><b>run</b>: training, step 3 of 12 <progress value="3" max="12"></progress></div>'
    """
    of = f" of {total_steps}" if total_steps else ""
    bar = f' <progress value="{step}" max="{total_steps}"></progress>' if total_steps else ""
    return f"<div><b>{html.escape(name)}</b>: {html.escape(state)}, step {step}{of}{bar}</div>"
