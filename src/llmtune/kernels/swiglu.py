"""The product of a SwiGLU feed-forward layer, silu(gate) * up, as one step of the graph that keeps gate and up alone.

The library's two operations also keep silu(gate), a third tensor of that width in each layer. Here it is computed again
in the backward pass, from the gate that is read there anyway, and the products are written over it where nobody else
holds it; a fused layer behind it need not keep the product either (`recipe`). The numbers are the library's, bit by
bit. arXiv:2002.05202.

Shapes: [..., I], I the width of the feed-forward layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmtune.kernels.recompute import with_recipe

__all__ = ["FusedSwiglu", "is_swiglu"]


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate).mul_(up)


class _Swiglu(torch.autograd.Function):
    """y = silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_up = functional.silu(gate).mul_(grad)
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


class FusedSwiglu:
    """What is put before a model's feed-forward module: the same arithmetic, with silu(gate) * up in one step."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute the module's output, [..., E] -> [..., E]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        output: Tensor = self.down_proj(with_recipe(_Swiglu.apply(gate, up), _product, gate, up))
        return output


def is_swiglu(module: nn.Module) -> bool:
    """Whether the module computes down_proj(silu(gate_proj(x)) * up_proj(x)) and nothing more."""
    return type(module).__name__ in FEED_FORWARDS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


FEED_FORWARDS = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "SmolLM3", "Olmo", "Olmo2", "Cohere")
)
"""Classes of transformers whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing more."""
