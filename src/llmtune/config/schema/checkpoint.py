"""The keys `checkpoint.*`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckpointConfig"]


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is made safe, and what is kept."""

    every_steps: int | None = None
    """Save after every so many steps; at each epoch's end when not given. The end and a stop always save."""

    keep_last: int = 3
    """Newest checkpoints kept; older ones are deleted once their successor is verified. 0 keeps all."""

    keep_best: bool = True
    """Keep the model with the lowest held-out loss in checkpoints/best."""
