"""The keys `distributed.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DistributedConfig"]


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes training one model."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """How weights and gradients are shared between processes."""

    deepspeed_config: str | None = None
    """JSON file for DeepSpeed."""

    timeout_s: float = 120.0
    """Seconds after which a silent process counts as lost."""
