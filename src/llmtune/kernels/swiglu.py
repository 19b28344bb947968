"""The product of a SwiGLU feed-forward layer (arXiv:2002.05202), silu(gate) * up, as one autograd function.

It saves gate and up only. The library's two operations also save silu(gate), a third tensor of that width in each
layer. Here it is computed again in the backward pass, from the gate that is read there anyway, and the products are
written over temporary tensors; a fused LoRA layer after it need not save the product either (`recompute`). The numbers
are the library's, bit by bit.

Shapes: [..., I], I the width of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import llmtune.kernels.liger  # noqa: F401 - defines the operators
from llmtune.kernels.autograd import Context
from llmtune.kernels.recompute import mark_recomputable

__all__ = ["FusedSwiglu", "KernelSwiglu", "is_swiglu"]


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

    _ways: tuple[type[torch.autograd.Function], Callable[[Tensor, Tensor], Tensor]] = _Swiglu, _product

    def forward(self, x: Tensor) -> Tensor:
        """Compute the module's output, [..., E] -> [..., E].

        y = down(silu(gate(x)) * up(x)) (arXiv:2002.05202)
        """
        gate, up = self.gate_proj(x).contiguous(), self.up_proj(x).contiguous()
        function, again = self._ways
        output: Tensor = self.down_proj(mark_recomputable(function.apply(gate, up), again, gate, up))
        return output


# ---- on CUDA, where Liger is installed ----


def _product_by_kernel(gate: Tensor, up: Tensor) -> Tensor:
    output: Tensor = torch.ops.llmtune.swiglu(gate, up)
    return output


class _KernelContext(Context):
    is_used: bool


class _KernelSwiglu(torch.autograd.Function):
    """The same in one kernel each way; backward writes the gradients over gate and up.

    Nobody reads gate and up after it: the frozen layers that made them do not keep their outputs, and the layer that
    takes the product has computed it again (`recompute`) before its gradient comes here.
    """

    @staticmethod
    def forward(ctx: _KernelContext, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.is_used = False
        return _product_by_kernel(gate, up)

    @staticmethod
    def backward(ctx: _KernelContext, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if ctx.is_used:  # torch does not see the kernel write, and would hand out gradients as gate and up
            raise RuntimeError("a second backward pass through SwiGLU, whose inputs the first one overwrote")
        ctx.is_used = True
        gate, up = ctx.saved_tensors
        torch.ops.llmtune.swiglu_backward_(grad.contiguous(), gate, up)
        return gate, up


class KernelSwiglu(FusedSwiglu):
    """Mixin for a model's feed-forward module on a CUDA device: Liger's kernels, which pass over memory once."""

    _ways = _KernelSwiglu, _product_by_kernel


def is_swiglu(module: nn.Module) -> bool:
    """Whether the module computes down_proj(silu(gate_proj(x)) * up_proj(x)) and nothing more."""
    return type(module).__name__ in FEED_FORWARDS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


FEED_FORWARDS = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "SmolLM3", "Olmo", "Olmo2", "Cohere")
)
"""Classes of transformers whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing more."""
