"""Rotary positions (arXiv:2104.09864) of queries and keys in one kernel, written over the products that made them.

The library's version takes ten operations a layer forward and more backward. The attention module's own forward runs
here with one name in it bound to another function, so that everything else in it stays the library's.

Shapes: T tokens, H heads, D head width; the library hands over [1, H, T, D], views of [1, T, H, D].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

import llmtune.kernels.liger  # noqa: F401 - defines the operator
from llmtune.kernels.autograd import Context

__all__ = ["KernelRotary", "is_rotary_attention"]

NAME = "apply_rotary_pos_emb"
"""The function of the library, by the name under which its attention modules call it."""

Rotation = Callable[..., tuple[Tensor, Tensor]]


class _Rotary(torch.autograd.Function):
    """y = x cos + rotate_half(x) sin, and backward the rotation by the opposite angle.

    Both write over what they are given: nobody else reads a query's product, nor the gradient that attention made.
    """

    @staticmethod
    def forward(ctx: Context, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        query, key = query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous()
        torch.ops.llmtune.rotate_(query, key, cos, sin, False)
        ctx.save_for_backward(cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2)

    @staticmethod
    def backward(ctx: Context, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        grad_query, grad_key = grad_query.transpose(1, 2).contiguous(), grad_key.transpose(1, 2).contiguous()
        torch.ops.llmtune.rotate_(grad_query, grad_key, cos, sin, True)
        return grad_query.transpose(1, 2), grad_key.transpose(1, 2), None, None


def _rotate(
    library: Rotation, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    if unsqueeze_dim != 1 or cos.dim() != 3 or cos.shape[-1] != query.shape[-1]:
        return library(query, key, cos, sin, unsqueeze_dim)
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(query, key, cos.contiguous(), sin.contiguous())
    return rotated


class KernelRotary:
    """Mixin for a model's attention module: the same forward, with the kernel where it rotates queries and keys."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output, [1, T, E] -> [1, T, E].

        q, k = R(position) q, R(position) k before attention (arXiv:2104.09864)
        """
        return _with_kernel(super().forward.__func__)(self, *args, **kwargs)  # type: ignore[misc]


@cache
def _with_kernel(forward: FunctionType) -> FunctionType:
    """Return the same function in which NAME is the kernel's."""
    # Not set in the library's module: there every model of the process would find it, on the CPU too.
    names = {**forward.__globals__, NAME: partial(_rotate, forward.__globals__[NAME])}
    same = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    return same


def is_rotary_attention(module: nn.Module) -> bool:
    """Whether the module rotates its queries and keys by the library's function, whole heads by halves."""
    code = getattr(type(module).forward, "__code__", None)
    return type(module).__name__ in ATTENTIONS and code is not None and NAME in code.co_names


ATTENTIONS = frozenset(
    f"{family}Attention"
    for family in (
        *("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "SmolLM3", "Granite"),
        *("Gemma2", "Gemma3", "Starcoder2"),
    )
)
"""Classes of transformers whose function of that name is Llama's."""
