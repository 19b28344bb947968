"""Where a config value came from: a line of a file, an environment variable, a flag, the command line or a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFAULT", "Origin"]


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
