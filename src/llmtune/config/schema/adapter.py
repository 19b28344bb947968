"""The keys `adapter.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AdapterConfig"]


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA: which small matrices are trained beside the frozen base."""

    method: Literal["none", "lora"] = "none"
    """`none` trains every weight of the model, `lora` only low-rank updates."""

    r: int = 16
    """Rank of the update."""

    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`)."""

    dropout: float = 0.0
    """Fraction of the adapter's input dropped in training."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: `all-linear`, a list of name endings, or one regular expression over full names."""

    rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""

    dora: bool = False
    """Weight-decomposed update (arXiv:2402.09353)."""

    modules_to_save: tuple[str, ...] = ()
    """Whole modules trained and saved beside the adapter, by name ending (for example `lm_head`)."""

    train_tokens: tuple[str, ...] = ()
    """Tokens (added when new) whose embedding rows are trained beside the adapter."""
