"""How a function hands lines for the user to its caller, who decides where they are shown."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["PrintLine", "silent"]

PrintLine = Callable[[str], None]
"""Takes one line of text, without its line end."""


def silent(line: str) -> None:
    """Print nothing."""
