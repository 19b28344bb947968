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

from llmtune.kernels.patching import patch, unpatch
from llmtune.kernels.recompute import with_recipe

__all__ = ["fuse_swiglus", "unfuse_swiglus"]


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


class _FusedSwiglu:
    """What is put before a model's feed-forward module: the same arithmetic, with silu(gate) * up in one step."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute the module's output, [..., E] -> [..., E]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        output: Tensor = self.down_proj(with_recipe(_Swiglu.apply(gate, up), _product, gate, up))
        return output


def fuse_swiglus(model: nn.Module) -> int:
    """Give every feed-forward module that computes exactly this its fused forward; returns how many.

    Undo with `unfuse_swiglus`.
    """
    modules = [
        module for module in model.modules() if type(module).__name__ in FEED_FORWARDS and _is_silu(module.act_fn)
    ]
    for module in modules:
        patch(module, _FusedSwiglu, "Fused")
    return len(modules)


def unfuse_swiglus(model: nn.Module) -> None:
    """Give every feed-forward module back its own forward."""
    for module in model.modules():
        unpatch(module, _FusedSwiglu)


def _is_silu(activation: object) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


FEED_FORWARDS = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "SmolLM3", "Olmo", "Olmo2", "Cohere")
)
"""Classes of transformers whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing more."""
