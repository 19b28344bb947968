"""The keys `tracking.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TrackingConfig"]


@dataclass(frozen=True)
class TrackingConfig:
    """Who is told about each step."""

    every_steps: int = 1
    """Steps between two lines."""

    trackers: tuple[Literal["console", "jsonl", "tensorboard", "wandb"], ...] = ("console", "jsonl", "tensorboard")
    """Where metrics go."""

    project: str = "llmtune"
    """Project name for trackers that have projects."""

    tags: tuple[str, ...] = ()
    """Further tags for trackers."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of wandb; its own setting (WANDB_MODE) when not given."""

    watch: Literal[False, "gradients", "all"] = False
    """Send histograms of gradients, or of gradients and weights, to trackers that take them."""
