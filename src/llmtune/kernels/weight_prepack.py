"""Frozen weights laid out once as a CPU's matrix kernels read them.

Given a plain matrix, torch's library of CPU kernels (oneDNN) rearranges it into blocks of pairs inside every product,
forward and backward, for each micro-batch anew. A frozen weight never changes, so here it is laid out once for the
product with inputs and once for that with gradients; one held in 4 bit is dequantized once, not at each use. That takes
two copies in bf16 beside the weight itself. The kernels stay the same ones, so no bit of a result changes, which is
proven on each shape before anything is kept.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "COPIES",
    "DTYPE",
    "Plain",
    "Prepacked",
    "Source",
    "can_prepack",
    "drop_prepacked",
    "prepack",
    "prepacked_of",
]

DTYPE = torch.bfloat16
"""The arithmetic in which the plain and the prepacked product are the same kernels; float32 goes by another library."""

COPIES = 2
"""Layouts of a weight that are kept, in `DTYPE`."""

LIKELY_TOKENS = 2048
"""Rows of the products to come: a hint for the layout, which takes any number of them."""

PROBE_TOKENS = (1, 37, 256)
"""Rows of the products by which a layout is proven."""

OwnPages = Callable[[], AbstractContextManager[object]]
"""Makes the context in which tensors that stay for the whole run get pages of their own."""


def can_prepack() -> bool:
    """Whether this CPU multiplies bf16 natively and this torch has the operators.

    Its compiler packs frozen weights by the same ones.
    """
    operators = torch.ops.mkldnn
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    present = torch.backends.mkldnn.is_available() and all(hasattr(operators, name) for name in names)
    return present and bool(operators._is_mkldnn_bf16_supported())


class Plain:
    """The products of a frozen weight [N, K] as it is held.

    read: gives it in the type of the products, once for each of them.
    """

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def linear(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """Return x W^T + bias, [T, N]."""
        return functional.linear(x_TK, self._read(), bias_N)

    def input_gradient(self, grad_TN: Tensor, onto_TK: Tensor | None = None) -> Tensor:
        """Return grad W, [T, K]; added to `onto_TK`, which may be overwritten, where that is given."""
        weight_NK = self._read()
        return grad_TN @ weight_NK if onto_TK is None else onto_TK.addmm_(grad_TN, weight_NK)


class Prepacked:
    """The same products from both layouts of a weight [N, K]. own_pages: where what stays is made (see `prepack`)."""

    def __init__(self, weight_NK: Tensor, own_pages: OwnPages = nullcontext) -> None:
        rounded_NK = weight_NK.detach().to(DTYPE)
        self._for_inputs = _laid_out(rounded_NK.contiguous(), own_pages)
        self._for_gradients = _laid_out(rounded_NK.t().contiguous(), own_pages)

    def __deepcopy__(self, _memo: Any) -> Prepacked:
        return self  # it never changes, and torch cannot copy tensors of this layout

    def linear(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """Return x W^T + bias, [T, N]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._for_inputs, bias_N, "none", [], "")
        return output

    def input_gradient(self, grad_TN: Tensor, onto_TK: Tensor | None = None) -> Tensor:
        """Return grad W, [T, K]; added to `onto_TK`, which stays as it is, where that is given."""
        multiply = torch.ops.mkldnn._linear_pointwise
        grad: Tensor
        if onto_TK is None:
            grad = multiply(grad_TN, self._for_gradients, None, "none", [], "")
        else:
            grad = multiply.binary(grad_TN, onto_TK, self._for_gradients, None, "add")
        return grad


def _laid_out(matrix: Tensor, own_pages: OwnPages) -> Tensor:
    layout: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, LIKELY_TOKENS)
    with own_pages():
        return (
            layout.clone()
        )  # copied in order, each fresh page is touched by one thread only, a quarter sooner than laid out into it


@dataclass(frozen=True)
class Source:
    """A frozen layer and how its weight [N, K] is read; its bias [N], if it has one, is `layer.bias`."""

    layer: nn.Module
    read: Callable[[], Tensor]


def prepack(sources: Sequence[Source], own_pages: OwnPages) -> str | None:
    """Keep each layer's weight in both layouts beside it.

    Where a product would differ by one bit nothing is kept, and it says which.

    own_pages: only the layouts are made in it; what is made on the way goes again, and its memory serves the next.
    """
    proven: set[tuple[torch.Size, bool]] = set()
    kept = []
    with torch.no_grad():
        for source in sources:
            weight_NK = source.read().to(DTYPE)
            bias_N = None if source.layer.bias is None else source.layer.bias.to(DTYPE)  # type: ignore[operator, union-attr]
            packed = Prepacked(weight_NK, own_pages)
            kind = (weight_NK.shape, bias_N is not None)
            if kind not in proven and not _is_proven(packed, weight_NK, bias_N):  # type: ignore[arg-type]
                return f"a product with a weight of {tuple(weight_NK.shape)} differs from the plain one"
            proven.add(kind)
            kept.append(packed)
    for source, packed in zip(sources, kept, strict=True):
        source.layer.__dict__["_prepacked"] = packed
    return None


def drop_prepacked(model: nn.Module) -> None:
    """Let go of every layout that `prepack` kept in `model`."""
    for module in model.modules():
        module.__dict__.pop("_prepacked", None)


def prepacked_of(layer: nn.Module, dtype: torch.dtype) -> Prepacked | None:
    """The layouts kept beside this layer, if there are any and the arithmetic is theirs."""
    return layer.__dict__.get("_prepacked") if dtype == DTYPE else None


def _is_proven(packed: Prepacked, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    """Compare all three products with the plain ones, bit by bit."""
    plain = Plain(lambda: weight_NK)
    outputs, inputs = weight_NK.shape
    for tokens in PROBE_TOKENS:
        x_TK, grad_TN = _waves(tokens, inputs), _waves(tokens, outputs)
        pairs = [
            (packed.linear(x_TK, bias_N), plain.linear(x_TK, bias_N)),
            (packed.input_gradient(grad_TN), plain.input_gradient(grad_TN)),
            (packed.input_gradient(grad_TN, x_TK), plain.input_gradient(grad_TN, x_TK.clone())),
        ]
        if not all(torch.equal(found, expected) for found, expected in pairs):
            return False
    return True


def _waves(rows: int, columns: int) -> Tensor:
    return (torch.arange(float(rows)).mul_(columns).unsqueeze(1) + torch.arange(float(columns))).sin_().to(DTYPE)
