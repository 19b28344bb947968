"""Where a config value came from: a line of a file, an environment variable, a flag, the command line or a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFAULT", "Origin", "is_text", "printable"]


@dataclass(frozen=True)
class Origin:
    """The place a value came from; printed, it is the place alone.

    >>> print(Origin("file", "configs/dev.yaml:14"))
    configs/dev.yaml:14
    """

    kind: Literal["default", "file", "env", "flag", "override"]
    """Which layer it stands in."""

    place: str
    """What to show: `configs/dev.yaml:14`, `env LLMTUNE_DATA__MAX_LENGTH`, `--samples`, `command line` or `default`."""

    def __str__(self) -> str:
        return self.place


DEFAULT = Origin("default", "default")


def is_text(text: str) -> bool:
    r"""Say whether the text can be written down: not where a byte that could not be read, or half a character, stands
    in it.

    >>> is_text("Größe"), is_text("Gr\udcc3")
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: str, limit: int = 60) -> str:
    r"""Return `text` on one line, control characters escaped and cut to `limit` characters.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
