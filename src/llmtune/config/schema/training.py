"""The keys `training.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TrainingConfig"]


@dataclass(frozen=True)
class TrainingConfig:
    """How weights are updated."""

    epochs: float = 3.0
    """Passes over the training rows; a fraction is allowed."""

    max_steps: int | None = None
    """Stop after this many steps; replaces `epochs` as the length of the schedule."""

    max_minutes: float | None = None
    """Stop, saved and resumable, after this many minutes of training."""

    batch_size: int | Literal["auto"] = 8
    """Sequences in one micro-batch on one device. `auto` finds one that fits and keeps the global batch."""

    gradient_accumulation_steps: int = 1
    """Micro-batches summed into one step on each device."""

    learning_rate: float | None = None
    """Peak learning rate; when not given 2e-4 for LoRA, 2e-5 for full tuning, by size from scratch, and said."""

    weight_decay: float | None = None
    """Decoupled decay of matrices (never of norms, biases); when not given 0 for LoRA, 0.01 for full tuning, 0.1 from scratch."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "muon", "sgd"] = "adamw"
    """Optimizer; the 8-bit and paged ones and lion come from bitsandbytes."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""

    eps: float = 1e-8
    """Added to Adam's denominator."""

    lr_schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "wsd"] = "linear"
    """How the learning rate moves after warm-up."""

    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    warmup_ratio: float | None = None
    """Warm-up as a fraction of all steps, rounded up."""

    min_lr_ratio: float = 0.0
    """Learning rate at the end as a fraction of the peak (linear, cosine, polynomial, wsd)."""

    max_grad_norm: float | None = 1.0
    """Clip the gradient of a whole window to this norm; null does not clip, the norm is reported all the same."""

    step_in_backward: bool = False
    """Move each weight as soon as its gradient is complete, and drop that gradient: full tuning then never holds all gradients (the window
    must be one micro-batch for that). Not with clipping (`max_grad_norm: null`), fp16, `tracking.watch` or several processes."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the arithmetic in forward and backward; `auto` takes bf16 where the hardware multiplies it natively."""

    compile: bool = False
    """Compile each decoder block with torch.compile."""

    engine: Literal["auto", "plain"] = "auto"
    """`auto` uses the fast paths that are proven equal here; `plain` the library's own forward on padded batches."""

    neftune_alpha: float | None = None
    """Noise added to embeddings in training, alpha / sqrt(length x width) (arXiv:2310.05914)."""

    max_skipped_steps: int = 3
    """Windows with non-finite loss or gradients that may be skipped, and are named, before the run stops with exit 7."""
