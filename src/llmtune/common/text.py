"""Text that can be shown on a terminal, written to a log or quoted in an error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "Fact",
    "PrintLine",
    "excerpt",
    "is_text",
    "print_line",
    "print_to_stderr",
    "printable",
    "readable_bytes",
    "readable_duration",
    "silent",
]


def is_text(text: str) -> bool:
    r"""Return False for a string with an undecodable byte or half a surrogate pair in it: UTF-8 cannot encode it.

    >>> is_text("Größe"), is_text("Gr\udcc3")
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: str | os.PathLike[str], keep: str = "") -> str:
    r"""Return text or a path with control characters and undecodable bytes as escapes, those in `keep` excepted.

    >>> printable("a\x1b[31m\nb"), printable("a\x1b\nb", keep="\n"), printable("Gr\udcc3")
    ('a\\x1b[31m\\nb', 'a\\x1b\nb', 'Gr\\udcc3')
    """
    text = os.fspath(text)
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def excerpt(text: str, limit: int = 60) -> str:
    r"""Return `text` on one line, escaped as by `printable` and cut to `limit` characters.

    >>> excerpt("a\nb"), excerpt("abcdefghij", 8)
    ('a\\nb', 'abcde...')
    """
    shown = printable(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def readable_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, with two digits after the point.

    >>> readable_bytes(999), readable_bytes(56_700_000), readable_bytes(1_500_000_000)
    ('999 B', '56.70 MB', '1.50 GB')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def readable_duration(seconds: float) -> str:
    """Seconds as people read them, in seconds, minutes or hours.

    >>> readable_duration(42), readable_duration(200), readable_duration(7500)
    ('42 s', '3.3 min', '2.1 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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


def print_line(line: str) -> None:
    """Print a line on stderr, with escapes for characters outside its encoding.

    A closed stderr is no error, because training goes on without it.
    """
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)  # noqa: T201


def print_to_stderr(line: str) -> None:
    """Print one line with the program's name."""
    print_line(f"llmtune: {line}")
