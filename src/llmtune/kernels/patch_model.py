"""All fused functions of a model at once: the engine and the plan's trace of it switch the same ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmtune.kernels.lora import frozen_sources, fuse_adapters, unfuse_adapters
from llmtune.kernels.rms_norm import fuse_norms, unfuse_norms
from llmtune.kernels.swiglu import fuse_swiglus, unfuse_swiglus
from llmtune.kernels.weight_prepack import Source, drop_prepacked

__all__ = ["fuse", "prepackable", "unfuse"]


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
    drop_prepacked(model)
    unfuse_adapters(model)
    unfuse_norms(model)
    unfuse_swiglus(model)


def prepackable(model: Any) -> list[Source]:
    """The layers of a fused transformers model whose weights may be laid out beforehand: those under LoRA layers, and a
    frozen head.
    """
    sources = frozen_sources(model)
    head = model.get_output_embeddings()
    if sources and type(head) is nn.Linear and not any(weight.requires_grad for weight in head.parameters()):
        sources.append(Source(head, lambda: head.weight))
    return sources
