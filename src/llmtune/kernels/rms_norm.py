"""RMS normalisation (arXiv:1910.07467) as one autograd function, which saves its input and one number a token.

The library's version, in single operations, saves three tensors as large as its input, one of them in float32, and
passes over them a dozen times. Where its output is only the input of linear layers, it is rounded to autocast's type
here, once, and not by each of those layers; and fused LoRA layers compute it again in the backward pass where they
would save it (`recompute`).

Shapes: [..., E], E the width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from llmtune.kernels.autograd import Context
from llmtune.kernels.patching import original_class_name
from llmtune.kernels.recompute import mark_recomputable

__all__ = ["FusedRmsNorm", "KernelRmsNorm", "is_rms_norm", "mark_norms_before_products"]


def _scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """Return x [..., E] times one float32 number a row [..., 1], rounded once to the type of x."""
    rows = x.reshape(1, -1, x.shape[-1])
    scale, shift = factor.reshape(-1), torch.zeros_like(factor).reshape(-1)
    # Batch normalisation with mean 0 and variance 1, each row as a channel, is this product in one pass over memory;
    # widening, multiplying and rounding are three.
    return torch.native_batch_norm(rows, scale, shift, shift, torch.ones_like(shift), False, 0.0, 0.0)[0].view(x.shape)


def _normalize(x: Tensor, inverse_rms: Tensor, weight: Tensor, *, dtype: torch.dtype | None) -> Tensor:
    output = _scale_rows(x, inverse_rms) * weight
    return output if dtype is None else output.to(dtype)


class _RmsNorm(torch.autograd.Function):
    """y = w * round(x / rms(x)) with rms(x) = sqrt(mean(x^2) + eps) in float32; returns y and 1 / rms(x).

    y is rounded to `dtype` where that is given. The gradient: with g = w * grad and r = 1 / rms(x),
    d x = r g - r^3 x mean(g x).
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        # A norm with a float32 sum reads bf16 inputs directly, where `x.float()` would copy them.
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse_rms = squares.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse_rms, weight)
        ctx.mark_non_differentiable(inverse_rms)
        return _normalize(x, inverse_rms, weight, dtype=dtype), inverse_rms

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Context, grad: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, inverse_rms, weight = ctx.saved_tensors
        width = x.shape[-1]
        if x.dtype == torch.float32:
            grad = grad.float()
        # The gradient of layer normalisation about a mean of 0 is r (g - mean(g)) - r^3 x mean(g x). Its fused kernel
        # computes all of that; the term with mean(g), which RMS normalisation does not have, is added back below.
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype).contiguous(),
            x,
            [width],
            torch.zeros_like(inverse_rms),
            inverse_rms,
            weight.float(),
            None,
            [True, False, False],
        )
        with torch.autocast(x.device.type, enabled=False):  # tiles run a backward pass inside autocast
            mean = (grad @ weight.to(grad.dtype)).unsqueeze(-1).float() / width
        grad_x.add_((mean * inverse_rms).to(x.dtype))
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * _scale_rows(x, inverse_rms)).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return grad_x, grad_weight, None, None


class FusedRmsNorm:
    """Mixin for a model's RMS norm: the same arithmetic as one autograd function."""

    weight: Tensor
    variance_epsilon: float
    rounds_output: bool = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension, [..., E] -> [..., E].

        y = w x / sqrt(mean(x^2) + eps) (arXiv:1910.07467)
        """
        device_type = hidden_states.device.type
        is_rounded = self.rounds_output and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_rounded else None
        output, inverse_rms = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)
        return mark_recomputable(output, partial(_normalize, dtype=dtype), hidden_states, inverse_rms, self.weight)


# ---- on CUDA: torch's own kernel ----


def _kernel(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):  # which would widen all of it to float32
        return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)


def _kernel_backward(
    grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        grad_x, grad_weight = torch.ops.aten._fused_rms_norm_backward(
            grad.contiguous(), x, [x.shape[-1]], inverse_rms, weight, [True, needs_weight]
        )
    return grad_x, grad_weight if needs_weight else weight.new_empty(0)


def _shapes(x: Tensor, _weight: Tensor, _eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _shapes_backward(
    _grad: Tensor, x: Tensor, _inverse_rms: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape if needs_weight else 0)


# Operators of their own: a build of torch without CUDA takes torch's apart into single operations, and a memory plan
# made there would count those.
OPERATORS = torch.library.Library("llmtune", "FRAGMENT")
if not hasattr(torch.ops.llmtune, "rms_norm"):  # a module that is loaded under two names must not define them twice
    OPERATORS.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
    OPERATORS.define(
        "rms_norm_backward(Tensor grad, Tensor x, Tensor inverse_rms, Tensor weight, bool needs_weight) "
        "-> (Tensor, Tensor)"
    )
    for _key, _forward, _backward in (
        ("CUDA", _kernel, _kernel_backward),
        ("CPU", _kernel, _kernel_backward),
        ("Meta", _shapes, _shapes_backward),
    ):
        OPERATORS.impl("rms_norm", _forward, _key)
        OPERATORS.impl("rms_norm_backward", _backward, _key)


def _normalize_by_kernel(x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype | None) -> Tensor:
    output: Tensor = torch.ops.llmtune.rms_norm(x, weight, eps)[0]
    return output if dtype is None else output.to(dtype)


class _KernelRmsNorm(torch.autograd.Function):
    """y = round(w x / rms(x)) by torch's kernel: rounded once, where the library rounds before the weight too."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
        x = x.contiguous()
        output, inverse_rms = torch.ops.llmtune.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, inverse_rms, weight)
        return output if dtype is None else output.to(dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        x, inverse_rms, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = torch.ops.llmtune.rms_norm_backward(
            grad.to(x.dtype), x, inverse_rms, weight, needs_weight
        )
        return grad_x, grad_weight if needs_weight else None, None, None


class KernelRmsNorm:
    """Mixin for a model's RMS norm on a CUDA device: torch's fused kernel, which passes over memory once."""

    weight: Tensor
    variance_epsilon: float
    rounds_output: bool = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension, [..., E] -> [..., E].

        y = w x / sqrt(mean(x^2) + eps) (arXiv:1910.07467)
        """
        if self.weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        device_type = hidden_states.device.type
        is_rounded = self.rounds_output and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_rounded else None
        output = _KernelRmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)
        again = partial(_normalize_by_kernel, eps=self.variance_epsilon, dtype=dtype)
        return mark_recomputable(output, again, hidden_states, self.weight)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is an RMS norm with exactly this arithmetic."""
    return type(module).__name__ in NORMS


def mark_norms_before_products(parent: nn.Module) -> None:
    """Have those of its fused norms round their output whose output is used only as the input of linear layers."""
    for name, child in parent.named_children():
        if isinstance(child, (FusedRmsNorm, KernelRmsNorm)) and name in BEFORE_PRODUCTS:
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
