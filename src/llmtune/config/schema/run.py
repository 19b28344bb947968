"""The keys `run.*`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it is called."""

    output_dir: str = "runs"
    """Folder in which run folders are made."""

    name: str = "{model}-{config}-{timestamp}"
    """Name of the run and of its folder; `{model}`, `{config}`, `{timestamp}` and `{seed}` are filled in."""

    seed: int = 42
    """Seed of everything random in training: initial weights, dropout, order of the rows."""

    tags: tuple[str, ...] = ()
    """Words to find the run by, kept in run.json and sent to trackers."""

    notes: str | None = None
    """Free text about the run, kept in run.json and sent to trackers."""
