"""What attention kernels of a GPU hold that no tensor of the graph shows, and a stand-in for the one that cannot run on
stand-ins.

Shapes: T tokens of the row, S documents, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmtune.kernels.attention import Rule, Segments, dropout_by_sdpa

__all__ = ["flash_backward_bytes", "flex_stand_in", "workspace_bytes"]

SPARE_ROWS = 128
"""Rows beside its tokens that the kernel's sums leave for each document."""


def flash_backward_bytes(tokens: int, documents: int, heads: int, key_heads: int, width: int, entry_bytes: int) -> int:
    """Bytes that torch's flash attention takes beside inputs and results while its backward pass runs.

    A float32 sum of the queries' gradient [T + 128 S, H, D rounded up] and one number a query [H, T + 128 S]; where
    query heads share key heads, also the gradients of keys and values for each query head, [T, H, D] each, before they
    are added up. Source: `mha_varlen_bwd` in torch's `flash_api.cpp` (FlashAttention-2, arXiv:2307.08691).

    >>> flash_backward_bytes(1000, 1, 4, 4, 64, 2) == 1128 * 4 * 64 * 4 + 4 * 1128 * 4
    True
    """
    rows = tokens + SPARE_ROWS * documents
    multiple = 32 if width <= 128 else 64
    sums = 4 * rows * heads * (-(-width // multiple) * multiple) + 4 * heads * rows
    expanded = 2 * tokens * heads * width * entry_bytes if key_heads != heads else 0
    return sums + expanded


def workspace_bytes(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator holds on a GPU while it runs, beside its arguments and results.

    0 for those without a rule.
    """
    rule = _rules().get(operator)
    return 0 if rule is None else rule(args)


@cache
def _rules() -> dict[Any, Callable[[tuple[Any, ...]], int]]:
    import torch.nn.attention.varlen  # brings in its operators

    return {
        torch.ops.torch_attn._varlen_attn_backward.default: _of_varlen,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _of_sdpa,
    }


def _of_varlen(args: tuple[Any, ...]) -> int:
    query, key, marks = args[1], args[2], args[6]
    tokens, heads, width = query.shape
    return flash_backward_bytes(tokens, len(marks) - 1, heads, key.shape[1], width, query.element_size())


def _of_sdpa(args: tuple[Any, ...]) -> int:
    query, key = args[1], args[2]
    rows, heads, tokens, width = query.shape
    if query.element_size() > 2:
        return 0  # flash attention has no float32
    return flash_backward_bytes(rows * tokens, rows, heads, key.shape[1], width, query.element_size())


class _Flex(torch.autograd.Function):
    """Keeps what compiled flex attention keeps: its inputs as they are, its output and one float32 a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        total = query.shape[2]
        output, sums = torch.empty_like(query), query.new_empty(1, query.shape[1], total, dtype=torch.float32)
        # the mask of blocks is made from a mask of all pairs: same document, not later, and both
        _pairs = [query.new_empty(total, total, dtype=torch.bool) for _ in range(3)]
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, _output, sums = ctx.saved_tensors
        _delta = torch.empty_like(sums)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@dropout_by_sdpa
def flex_stand_in(query: Tensor, key: Tensor, value: Tensor, _segments: Segments, _rule: Rule) -> Tensor:
    """Flex attention on stand-ins, [1, T, H, D]; the real one has to be compiled for a device."""
    output: Tensor = _Flex.apply(query, key, value)
    return output.transpose(1, 2)
