"""The type of the context that a `torch.autograd.Function` hands from its forward to its backward pass."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["Context"]


class Context(FunctionCtx):
    """The attributes that torch sets on every context; each function's own context adds those that it sets itself.

    A type only: torch makes the objects.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    """One for each argument of forward, in order."""
