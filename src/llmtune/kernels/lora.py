"""LoRA layers (arXiv:2106.09685) as one autograd function: the frozen product and the low-rank update together.

peft's own layer computes the update beside the frozen product. It casts the input to float32 and saves that copy, the
low-rank product and their sum for the backward pass, and every layer that shares an input adds its gradient to it in a
further pass. Here one function computes all layers that share an input (query, key and value; gate and up). It saves
the low-rank product and the input in the type of the arithmetic, or only how the input is computed again
(`recompute`), and adds the input's gradients inside the products that make them. The master weights A and B stay
float32 in peft's own modules, so files and names do not change.

A layer is patched with a mixin; what the fused function does not compute (dropout, DoRA, several adapters, merged or
disabled ones) goes to peft's own forward, layer by layer.

Shapes: T tokens, K inputs, N outputs, R rank; update = (x (scale A)^T) B^T with A [R, K] and B [N, R].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmtune.kernels.autograd import Context
from llmtune.kernels.recompute import Recomputation, recomputation_of
from llmtune.models.quantization import import_bitsandbytes

__all__ = ["FusedLora", "group_shared_inputs", "is_plain_lora"]

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children that transformers' attention and feed-forward modules call with one input, in this order."""


class _LoraContext(Context):
    recompute_input: Callable[..., Tensor] | None
    width: int
    layers: tuple[_FrozenLinear, ...]
    scales: tuple[float, ...]
    ranks: list[int]
    master_dtype: torch.dtype


class _LoraGroup(torch.autograd.Function):
    """y_i = x W_i^T + b_i + (x (s_i A_i)^T) B_i^T for the layers i that share the input x [T, K].

    `masters` are A_1, B_1, A_2, B_2 and so on. With u = x (s A)^T and the gradient g of y: d B = g^T u,
    d A = s (g B)^T x, d x = g W + (g B) s A.
    """

    @staticmethod
    def forward(
        ctx: _LoraContext,
        x: Tensor,
        recomputation: Recomputation | None,
        layers: tuple[_FrozenLinear, ...],
        scales: tuple[float, ...],
        *masters: Tensor,
    ) -> tuple[Tensor, ...]:
        ranks = [a.shape[0] for a in masters[0::2]]
        # One product with all A below each other reads x once. The scale is put on A, the smallest operand.
        down = _scaled(masters[0::2], scales).to(x.dtype)
        ups = [b.to(x.dtype) for b in masters[1::2]]
        # Contiguous, because each product would copy a strided range of columns.
        lows = [low.contiguous() for low in (x @ down.t()).split(ranks, dim=1)]
        # The update is added inside its product: no tensor [T, N] is made for it.
        outputs = [layer.output(x).addmm_(low, up.t()) for layer, low, up in zip(layers, lows, ups, strict=True)]
        ctx.save_for_backward(down, *ups, *lows, *((x,) if recomputation is None else recomputation.inputs))
        ctx.recompute_input = None if recomputation is None else recomputation.function
        ctx.width, ctx.layers, ctx.scales, ctx.ranks = x.shape[1], layers, scales, ranks
        ctx.master_dtype = masters[0].dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: _LoraContext, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        down, *rest = ctx.saved_tensors
        count = len(ctx.layers)
        ups, lows, inputs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        if ctx.recompute_input is None:
            (x,) = inputs
        else:
            x = ctx.recompute_input(*inputs).reshape(-1, ctx.width).to(down.dtype)
        # g^T u as the transpose of u^T g: a product copies a transposed operand, and u is the narrow one.
        grad_up = [
            (low.t() @ grad).t().to(ctx.master_dtype, memory_format=torch.contiguous_format)
            for low, grad in zip(lows, grads, strict=True)
        ]
        grad_low = _joined([grad @ up for grad, up in zip(grads, ups, strict=True)], dim=1)
        # The scale was put on A in the forward pass, so it is a factor of the gradient too.
        grad_down = _scale_parts((grad_low.t() @ x).to(ctx.master_dtype), ctx.ranks, ctx.scales)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ down
            for layer, grad in zip(ctx.layers, grads, strict=True):
                grad_x = layer.add_input_gradient(grad_x, grad)
        pairs = [gradient for pair in zip(grad_down, grad_up, strict=True) for gradient in pair]
        return (grad_x, None, None, None, *pairs)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _scaled(matrices: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """The matrices times their scales, below each other: small tensors, of which a GPU feels each launch."""
    if len(set(scales)) == 1:
        return _joined(matrices, 0) * scales[0]
    return torch.cat([matrix * scale for matrix, scale in zip(matrices, scales, strict=True)])


def _scale_parts(joined: Tensor, ranks: list[int], scales: Sequence[float]) -> Sequence[Tensor]:
    """The reverse for their gradients; `joined` is overwritten."""
    if len(set(scales)) == 1:
        return joined.mul_(scales[0]).split(ranks)
    return [part.mul_(scale) for part, scale in zip(joined.split(ranks), scales, strict=True)]


class _FrozenLinear:
    """A frozen layer with weight [N, K] and bias [N], multiplied in the type of its input.

    A 4-bit weight is dequantized for each product, because saved for the backward pass it would take the memory that
    quantization saves.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def weight(self) -> Tensor:
        """Return the weight [N, K]."""
        # Detached: 4-bit weights are dequantized by operations that autograd would record.
        return FROZEN_WEIGHTS[type(self.layer).__name__](self.layer).detach()

    def output(self, x: Tensor) -> Tensor:
        """Return x W^T + b, [T, K] -> [T, N]."""
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return functional.linear(x, self.weight().to(x.dtype), None if bias is None else bias.detach().to(x.dtype))

    def add_input_gradient(self, grad_x: Tensor, grad: Tensor) -> Tensor:
        """Return grad_x + grad W, [T, K] from grad [T, N]; `grad_x` is overwritten."""
        return grad_x.addmm_(grad, self.weight().to(grad.dtype))


class _SharedInput:
    """Layers that their module calls one after the other with the same input.

    The first call computes the outputs of all of them; the other calls return theirs.
    """

    def __init__(self, members: Sequence[FusedLora]) -> None:
        self.members = tuple(members)
        self._input: Tensor | None = None
        self._pending: dict[int, Tensor] = {}

    def output(self, member: FusedLora, x: Tensor) -> Tensor:
        """Return the member's output for `x`, [..., K] -> [..., N]."""
        if self._input is x and id(member) in self._pending:
            output = self._pending.pop(id(member))
            if not self._pending:
                self._input = None  # or the input would live until the next micro-batch
            return output
        # Another input, or the same member again: outputs that nobody fetched are of an earlier forward pass.
        self._input, self._pending = None, {}
        members = self.members if all(layer.is_fusable() for layer in self.members) else (member,)
        for layer, output in zip(members, _run(members, x), strict=True):
            self._pending[id(layer)] = output
        output = self._pending.pop(id(member))
        if self._pending:
            self._input = x
        return output


def _arithmetic(member: FusedLora, x: Tensor) -> torch.dtype:
    """The type in which a layer is multiplied: autocast's, a quantized layer's own, or that of its input."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    # bitsandbytes' 4-bit layers name the type of their products
    return getattr(member.get_base_layer(), "compute_dtype", None) or x.dtype


def _run(members: Sequence[FusedLora], x: Tensor) -> list[Tensor]:
    device_type = x.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = _arithmetic(members[0], x)
    layers = tuple(member.frozen() for member in members)
    names = [member.active_adapters[0] for member in members]
    masters = [
        matrix
        for member, name in zip(members, names, strict=True)
        for matrix in (member.lora_A[name].weight, member.lora_B[name].weight)
    ]
    scales = tuple(float(member.scaling[name]) for member, name in zip(members, names, strict=True))
    with torch.autocast(device_type, enabled=False):  # all operands have the type already
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        outputs = _LoraGroup.apply(rows, recomputation_of(x), layers, scales, *masters)
    return [output.view(*x.shape[:-1], -1).to(dtype if is_autocast else x.dtype) for output in outputs]


class FusedLora:
    """Mixin for peft's LoRA layer: the fused forward where that is the same arithmetic, else peft's own."""

    group: _SharedInput
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    training: bool
    lora_A: nn.ModuleDict  # noqa: N815 - peft's names
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    lora_variant: dict[str, object]
    lora_bias: dict[str, bool]
    scaling: dict[str, float]
    get_base_layer: Callable[[], nn.Module]

    def is_fusable(self) -> bool:
        """Whether this layer now is a frozen weight plus exactly one plain LoRA without dropout."""
        # Asked at each call, because users of peft disable, merge and switch adapters between calls.
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
        )

    def frozen(self) -> _FrozenLinear:
        """Return the layer that the adapter is added to."""
        return _FrozenLinear(self.get_base_layer())

    def without_adapter(self, x: Tensor) -> Tensor:
        """The output of the frozen layer alone, [..., K] -> [..., N], bit for bit what an update of 0 would give.

        y = W x + b, in LoRA's y = W x + b + (alpha / r) B A x (arXiv:2106.09685, equation 3).
        """
        device_type, dtype = x.device.type, _arithmetic(self, x)
        with torch.autocast(device_type, enabled=False):
            output = self.frozen().output(x.reshape(-1, x.shape[-1]).to(dtype))
        return output.view(*x.shape[:-1], -1).to(dtype if torch.is_autocast_enabled(device_type) else x.dtype)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Compute the layer's output, [..., K] -> [..., N].

        y = x W^T + b + s (x A^T) B^T (arXiv:2106.09685)
        """
        if self.disable_adapters and not (args or kwargs or self.merged or torch.is_grad_enabled()):
            return self.without_adapter(x)
        if args or kwargs or not self.is_fusable():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        return self.group.output(self, x)


def group_shared_inputs(parent: nn.Module) -> None:
    """Group the fused LoRA children of a module that it calls with one input; every other child is a group alone."""
    children = {name: child for name, child in parent.named_children() if isinstance(child, FusedLora)}
    for child in children.values():
        child.group = _SharedInput([child])
    for names in SHARED_INPUTS:
        group = _SharedInput([children[name] for name in names if name in children])
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
    without_dropout = all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())  # type: ignore[operator, union-attr]
    return type(base).__name__ in FROZEN_WEIGHTS and not trained and plain and without_dropout


def _dequantized(layer: nn.Module) -> Tensor:
    weight: Tensor = import_bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.quant_state)  # type: ignore[union-attr]
    return weight


FROZEN_WEIGHTS: dict[str, Callable[[nn.Module], Tensor]] = {
    "Linear": lambda layer: layer.weight,  # type: ignore[dict-item, return-value]
    "Conv1D": lambda layer: layer.weight.t(),  # type: ignore[operator]
    "Linear4bit": _dequantized,
}
"""Layers whose frozen weight can be read as [N, K]. Reading 4-bit weights costs 2 % of the product."""
