"""How a function hands lines for the user to its caller, who decides where they are shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from llmtune.common.text import readable_bytes

__all__ = ["Fact", "PrintLine", "print_to_stderr", "silent"]

PrintLine = Callable[[str], None]
"""Takes one line of text, without its line end."""


class Fact(NamedTuple):
    """A line with a label, which a terminal sets in columns.

    >>> print(Fact("memory", "3.00 kB planned", {"weights": 2000, "loss": 1000}))
    memory  3.00 kB planned (weights 2.00 kB, loss 1.00 kB)
    """

    label: str
    text: str
    parts: Mapping[str, int] = MappingProxyType({})
    """Bytes by name, in the order of a bar; those of 0 are left out."""
    plain: str = ""
    """The line where there is no terminal, if it is not label and text."""

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable_bytes(count)}" for name, count in self.parts.items() if count)
        return self.plain or f"{self.label:<7} {self.text}" + (f" ({parts})" if parts else "")


def silent(line: str) -> None:
    """Print nothing."""


def print_to_stderr(line: str) -> None:
    """Print one line with the program's name; a closed stderr is no error, because training goes on without it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"llmtune: {line}", file=sys.stderr, flush=True)  # noqa: T201
