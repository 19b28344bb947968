"""The product of a SwiGLU feed-forward layer (arXiv:2002.05202), silu(gate) * up, as one autograd function.

It saves gate and up only. The library's two operations also save silu(gate), a third tensor of that width in each
layer. Here it is computed again in the backward pass, from the gate that is read there anyway, and the products are
written over temporary tensors; a fused LoRA layer after it need not save the product either (`recompute`). The numbers
are the library's, bit by bit.

Shapes: [..., I], I the width of the feed-forward layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmtune.kernels.autograd import Context
from llmtune.kernels.recompute import mark_recomputable

__all__ = ["FusedSwiglu", "is_swiglu"]


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate).mul_(up)


class _Swiglu(torch.autograd.Function):
    """y = silu(gate) * up; d gate = grad * up * silu'(gate), d up = grad * silu(gate)."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_up = functional.silu(gate).mul_(grad)
        grad_gate = grad * up
        # Into its own input: each entry is read before it is written, and no third tensor of this width is made.
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


class FusedSwiglu:
    """Mixin for a model's feed-forward module: the same arithmetic, with silu(gate) * up as one autograd function."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute the module's output, [..., E] -> [..., E].

        y = down(silu(gate(x)) * up(x)) (arXiv:2002.05202)
        """
        gate, up = self.gate_proj(x), self.up_proj(x)
        output: Tensor = self.down_proj(mark_recomputable(_Swiglu.apply(gate, up), _product, gate, up))
        return output


def is_swiglu(module: nn.Module) -> bool:
    """Whether the module computes down_proj(silu(gate_proj(x)) * up_proj(x)) and nothing more."""
    return type(module).__name__ in FEED_FORWARDS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


FEED_FORWARDS = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "SmolLM3", "Olmo", "Olmo2", "Cohere")
)
"""Classes of transformers whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing more."""
