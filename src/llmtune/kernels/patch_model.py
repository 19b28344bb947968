"""All fused functions of a model at once: the engine and the plan's trace of it switch the same ones."""

from __future__ import annotations

from torch import nn

from llmtune.kernels.lora import fuse_adapters, unfuse_adapters
from llmtune.kernels.rms_norm import fuse_norms, unfuse_norms
from llmtune.kernels.swiglu import fuse_swiglus, unfuse_swiglus

__all__ = ["fuse", "unfuse"]


def fuse(model: nn.Module, device_type: str) -> int:
    """Give LoRA layers, feed-forward modules and, on a CPU, norms their fused forward; returns how many LoRA layers.

    Undo with `unfuse`.
    """
    fuse_swiglus(model)
    if device_type == "cpu":
        fuse_norms(model)
    return fuse_adapters(model)


def unfuse(model: nn.Module) -> None:
    """Give every module back its own forward."""
    unfuse_adapters(model)
    unfuse_norms(model)
    unfuse_swiglus(model)
