"""LoRA layers (arXiv:2106.09685) as one step of the graph: the frozen product and the low-rank update together.

Only what the backward pass needs is kept.

peft's own layer computes the update beside the frozen product: it casts the input to float32, keeps that copy, the
low-rank product and their sum for the backward pass, and every layer that shares an input adds its own gradient to it.
Here one function serves all layers that share an input (query, key and value; gate and up): it keeps the low-rank
product and the input in the type of the arithmetic, or only how the input is made (`recipe`), and adds the input's
gradients inside the products that make them. Masters A and B stay float32 in peft's own modules, so files and names do
not change.

A layer is taken over by giving its instance a subclass of peft's class; whatever the fused function does not know
(dropout, DoRA, several adapters, merged or disabled ones) is left to peft's forward, layer by layer.

Shapes: T tokens, K inputs, N outputs, R rank; update = (x (scale A)^T) B^T with A [R, K] and B [N, R].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmtune.kernels.recompute import Recipe, recipe_of
from llmtune.models.quantization import import_bitsandbytes

__all__ = ["FusedLora", "group_shared_inputs", "is_plain_lora"]

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children that transformers' attention and feed-forward modules call with one input, in this order."""


class _LoraGroup(torch.autograd.Function):
    """Outputs of frozen layers with LoRA for one input [T, K], made by `recipe` if it has one.

    A and B of each layer follow in pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: Recipe | None,
        layers: tuple[_Frozen, ...],
        scales: tuple[float, ...],
        *masters: Tensor,
    ) -> tuple[Tensor, ...]:
        ranks = [a.shape[0] for a in masters[0::2]]
        down = torch.cat([a * scale for a, scale in zip(masters[0::2], scales, strict=True)]).to(x.dtype)
        ups = [b.to(x.dtype) for b in masters[1::2]]
        # Columns of a matrix would be copied by each product.
        lows = [low.contiguous() for low in (x @ down.t()).split(ranks, dim=1)]
        outputs = [layer.output(x).addmm_(low, up.t()) for layer, low, up in zip(layers, lows, ups, strict=True)]
        ctx.save_for_backward(down, *ups, *lows, *((x,) if recipe is None else recipe.sources))
        ctx.make, ctx.width = None if recipe is None else recipe.make, x.shape[1]
        ctx.layers, ctx.scales, ctx.ranks, ctx.master_dtype = layers, scales, ranks, masters[0].dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        down, *rest = ctx.saved_tensors
        count = len(ctx.layers)
        ups, lows, sources = rest[:count], rest[count : 2 * count], rest[2 * count :]
        x = sources[0] if ctx.make is None else ctx.make(*sources).reshape(-1, ctx.width).to(down.dtype)
        # (grad^T low), made as the transpose of (low^T grad): the narrow operand is the one to be transposed
        grad_up = [
            (low.t() @ grad).t().to(ctx.master_dtype, memory_format=torch.contiguous_format)
            for low, grad in zip(lows, grads, strict=True)
        ]
        grad_low = torch.cat([grad @ up for grad, up in zip(grads, ups, strict=True)], dim=1)
        grad_parts = (grad_low.t() @ x).to(ctx.master_dtype).split(ctx.ranks)
        grad_down = [part.mul_(scale) for part, scale in zip(grad_parts, ctx.scales, strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ down
            for layer, grad in zip(ctx.layers, grads, strict=True):
                grad_x = layer.add_input_gradient(grad_x, grad)
        pairs = [gradient for pair in zip(grad_down, grad_up, strict=True) for gradient in pair]
        return (grad_x, None, None, None, *pairs)


class _Frozen:
    """A frozen layer with weight [N, K] and bias [N], multiplied in the type of its input.

    A weight held in 4 bit is dequantized for each product.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def weight(self) -> Tensor:
        """Return the weight [N, K]."""
        return FROZEN_WEIGHTS[type(self.layer).__name__](self.layer).detach()

    def output(self, x: Tensor) -> Tensor:
        """Return x W^T + bias, [T, N]."""
        bias = self.layer.bias
        return functional.linear(
            x,
            self.weight().to(x.dtype),
            None if bias is None else bias.detach().to(x.dtype),  # type: ignore[operator, union-attr]
        )

    def add_input_gradient(self, onto: Tensor, grad: Tensor) -> Tensor:
        """Return `onto` + grad W, [T, K]; `onto` may have been overwritten."""
        return onto.addmm_(grad, self.weight().to(grad.dtype))


class _Group:
    """Layers that are called one after the other with the same input.

    The first call computes all of them; the others return their output.
    """

    def __init__(self, members: Sequence[FusedLora]) -> None:
        self.members = tuple(members)
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, member: FusedLora, x: Tensor) -> Tensor:
        """Return the member's output for `x`."""
        if self._input is x and id(member) in self._waiting:
            output = self._waiting.pop(id(member))
            if not self._waiting:
                self._input = None
            return output
        self._input, self._waiting = None, {}
        together = self.members if all(layer.is_simple() for layer in self.members) else (member,)
        for layer, output in zip(together, _run(together, x), strict=True):
            self._waiting[id(layer)] = output
        output = self._waiting.pop(id(member))
        if self._waiting:
            self._input = x
        return output


def _run(members: Sequence[FusedLora], x: Tensor) -> list[Tensor]:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = (
        torch.get_autocast_dtype(kind)
        if autocast
        else getattr(members[0].get_base_layer(), "compute_dtype", None) or x.dtype
    )
    layers = tuple(member.frozen() for member in members)
    names = [member.active_adapters[0] for member in members]
    masters = [
        matrix
        for member, name in zip(members, names, strict=True)
        for matrix in (member.lora_A[name].weight, member.lora_B[name].weight)
    ]
    scales = tuple(float(member.scaling[name]) for member, name in zip(members, names, strict=True))
    with torch.autocast(kind, enabled=False):
        outputs = _LoraGroup.apply(x.reshape(-1, x.shape[-1]).to(dtype), recipe_of(x), layers, scales, *masters)
    return [output.view(*x.shape[:-1], -1).to(dtype if autocast else x.dtype) for output in outputs]


class FusedLora:
    """What is put before peft's LoRA layer: the fused forward where that is the same arithmetic, else peft's own."""

    group: _Group
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    training: bool
    lora_A: nn.ModuleDict  # noqa: N815 - peft's names
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    lora_variant: dict[str, Any]
    lora_bias: dict[str, bool]
    scaling: dict[str, float]
    get_base_layer: Callable[[], nn.Module]

    def is_simple(self) -> bool:
        """Whether this layer now is frozen weight plus exactly one plain LoRA without dropout."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
        )

    def frozen(self) -> _Frozen:
        """Return the layer underneath."""
        return _Frozen(self.get_base_layer())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer's output, [..., K] -> [..., N]."""
        if args or kwargs or not self.is_simple():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        return self.group.output(self, x)


def group_shared_inputs(parent: nn.Module) -> None:
    """Join the fused LoRA children of a module that it calls with one input; every other one is a group by itself."""
    children = {name: child for name, child in parent.named_children() if isinstance(child, FusedLora)}
    for child in children.values():
        child.group = _Group([child])
    for names in SHARED_INPUTS:
        group = _Group([children[name] for name in names if name in children])
        for member in group.members:
            member.group = group


def is_plain_lora(module: nn.Module) -> bool:
    """Whether the module is a frozen layer with plain LoRA: no DoRA, dropout or trained base."""
    if type(module).__name__ not in ("Linear", "Linear4bit") or not type(module).__module__.startswith(
        "peft.tuners.lora"
    ):
        return False
    base = module.get_base_layer()  # type: ignore[operator]
    trained = any(parameter.requires_grad for parameter in base.parameters())
    plain = all(name not in module.lora_variant for name in module.lora_A)  # type: ignore[operator, union-attr]
    still = all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())  # type: ignore[operator, union-attr]
    return type(base).__name__ in FROZEN_WEIGHTS and not trained and plain and still


def _dequantized(layer: Any) -> Tensor:
    weight: Tensor = import_bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


FROZEN_WEIGHTS: dict[str, Callable[[Any], Tensor]] = {
    "Linear": lambda layer: layer.weight,
    "Conv1D": lambda layer: layer.weight.t(),
    "Linear4bit": _dequantized,
}
"""Layers whose frozen weight can be read as [N, K]. Reading 4-bit weights costs 2 % of the product."""
