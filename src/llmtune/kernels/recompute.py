"""Recomputing instead of storing: how a tensor was made, noted beside it.

The output of a norm and the product of a feed-forward layer are cheap to compute again from what their own backward
passes save in any case. The fused LoRA layers that take them as inputs, and would save them, look here first. The
recomputed tensor has the same bits. This is activation checkpointing (arXiv:1604.06174) for single tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Recomputation", "mark_recomputable", "recomputation_of"]


class Recomputation(NamedTuple):
    """`function(*inputs)` gives the tensor again."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def mark_recomputable(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Note on a tensor of any shape how it was computed, and return it: tensor = function(*inputs).

    inputs: tensors that are saved for the backward pass in any case. A tensor without a gradient is saved by nobody, so
    it gets no note.
    """
    if tensor.requires_grad:
        # On the object, not on the storage: a view or a copy has another shape, and so no note.
        tensor.__dict__["_recomputation"] = Recomputation(function, tuple(source.detach() for source in inputs))
    return tensor


def recomputation_of(tensor: Tensor) -> Recomputation | None:
    """Return how to compute a tensor of any shape again, or None where that is not noted (arXiv:1604.06174)."""
    return tensor.__dict__.get("_recomputation")
