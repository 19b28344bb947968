"""The source of a config value: a line of a file, an environment variable, a flag, the command line or a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFAULT", "Origin"]


@dataclass(frozen=True)
class Origin:
    """The source of a value; printed as `where` alone.

    >>> print(Origin("file", "configs/dev.yaml:14"))
    configs/dev.yaml:14
    """

    kind: Literal["default", "file", "env", "flag", "override"]
    """The layer that the value is written in."""

    where: str
    """For people: `configs/dev.yaml:14`, `env LLMTUNE_DATA__MAX_LENGTH`, `--samples`, `command line` or `default`."""

    def __str__(self) -> str:
        return self.where


DEFAULT = Origin("default", "default")
