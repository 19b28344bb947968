"""How a function hands lines for the user to its caller, who decides where they are shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

__all__ = ["PrintLine", "print_to_stderr", "silent"]

PrintLine = Callable[[str], None]
"""Takes one line of text, without its line end."""


def silent(line: str) -> None:
    """Print nothing."""


def print_to_stderr(line: str) -> None:
    """Print one line with the program's name; a closed stderr is no error, because training goes on without it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"llmtune: {line}", file=sys.stderr, flush=True)  # noqa: T201
