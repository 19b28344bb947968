"""RMS normalisation as one step of the graph, keeping its input and one number a token.

The library's version, in single operations, keeps three tensors as large as its input, one of them in float32, and
passes over them a dozen times. Where its output only feeds linear layers, it is rounded to autocast's type here, once,
and not by each of those layers; and fused layers make it again in the backward pass where they would keep it
(`recipe`).

Shapes: [..., E], E the width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.kernels.patching import original_class_name
from llmtune.kernels.recompute import with_recipe

__all__ = ["FusedRmsNorm", "is_rms_norm", "mark_norms_before_products"]


def _times_row(x: Tensor, factor: Tensor) -> Tensor:
    """Return x [..., E] times one float32 number a row [..., 1], rounded once to the type of x.

    Batch normalisation by known figures, 0 and 1, is just that in one pass, with each row as a channel; single
    operations take three.
    """
    rows = x.reshape(1, -1, x.shape[-1])
    scale, shift = factor.reshape(-1), torch.zeros_like(factor).reshape(-1)
    return torch.native_batch_norm(rows, scale, shift, shift, torch.ones_like(shift), False, 0.0, 0.0)[0].view(x.shape)


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor, *, dtype: torch.dtype | None) -> Tensor:
    output = _times_row(x, inverse) * weight
    return output if dtype is None else output.to(dtype)


class _RmsNorm(torch.autograd.Function):
    """y = w * round(x / rms(x)), rms in float32, rounded once to `dtype` where that is given, and 1 / rms(x).

    ArXiv:1910.07467.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = squares.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        return _scaled(x, inverse, weight, dtype=dtype), inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, inverse, weight = ctx.saved_tensors
        width = x.shape[-1]
        if x.dtype == torch.float32:
            grad = grad.float()
        # layer normalisation about a mean of 0 differs from this in one term, the mean of w * grad: its fused kernel
        # does all the rest
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype).contiguous(),
            x,
            [width],
            torch.zeros_like(inverse),
            inverse,
            weight.float(),
            None,
            [True, False, False],
        )
        with torch.autocast(x.device.type, enabled=False):  # tiles run this inside it
            mean = (grad @ weight.to(grad.dtype)).unsqueeze(-1).float() / width
        grad_x.add_((mean * inverse).to(x.dtype))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * _times_row(x, inverse)).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return grad_x, grad_weight, None, None


class FusedRmsNorm:
    """What is put before a model's RMS norm: the same arithmetic in one step."""

    weight: Tensor
    variance_epsilon: float
    rounds_output: bool = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if self.rounds_output and torch.is_autocast_enabled(kind) else None
        output, inverse = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)
        return with_recipe(output, partial(_scaled, dtype=dtype), hidden_states, inverse, self.weight)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is an RMS norm with exactly this arithmetic."""
    return type(module).__name__ in NORMS


def mark_norms_before_products(parent: nn.Module) -> None:
    """Have those of its fused norms round their output whose output is used only as the input of linear layers."""
    for name, child in parent.named_children():
        if isinstance(child, FusedRmsNorm) and name in BEFORE_PRODUCTS:
            child.rounds_output = original_class_name(child) not in MIXTURE_NORMS


MIXTURE_NORMS = frozenset(("MixtralRMSNorm", "Qwen3MoeRMSNorm"))
NORMS = MIXTURE_NORMS | {
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite", "SmolLM3")
}
"""Classes of transformers whose arithmetic is that of `_RmsNorm`: scaled by w after rounding, w as it is (Gemma's 1 + w
is another).
"""

BEFORE_PRODUCTS = ("input_layernorm", "post_attention_layernorm")
"""Norms whose output these classes use only as the input of linear layers.

A mixture of experts also adds up its outputs in that type.
"""
