"""Memory of a GPU's attention kernels that is no tensor of the graph, and flex attention on fake tensors.

Shapes: T tokens of the row, S documents, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.attention.varlen  # registers an operator of `_workspaces`
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import BackwardCFunction, FunctionCtx

from llmtune.kernels.attention import AttentionParams, Segments, dropout_by_sdpa

__all__ = ["fake_flex_attention", "flash_backward_bytes", "workspace_bytes"]

SPARE_ROWS = 128
"""Rows that the kernel's sums have for each document beside its tokens: its blocks may write past the end."""


def flash_backward_bytes(tokens: int, documents: int, heads: int, key_heads: int, width: int, entry_bytes: int) -> int:
    """Bytes that torch's flash attention allocates beside inputs and results while its backward pass runs.

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


def workspace_bytes(operator: OpOverload, args: tuple[Any, ...]) -> int:
    """Bytes that an operator holds on a GPU while it runs, beside its arguments and results; 0 for most."""
    workspace = _workspaces().get(operator)
    return 0 if workspace is None else workspace(args)


@cache
def _workspaces() -> dict[OpOverload, Callable[[tuple[Any, ...]], int]]:
    return {
        torch.ops.torch_attn._varlen_attn_backward.default: _varlen_workspace,
        # Fake tensors are of the CPU, so a trace for a GPU meets the CPU's operator where the GPU will run its own.
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _sdpa_workspace,
    }


def _varlen_workspace(args: tuple[Any, ...]) -> int:
    query, key, ends = args[1], args[2], args[6]
    tokens, heads, width = query.shape
    return flash_backward_bytes(tokens, len(ends) - 1, heads, key.shape[1], width, query.element_size())


def _sdpa_workspace(args: tuple[Any, ...]) -> int:
    query, key = args[1], args[2]
    rows, heads, tokens, width = query.shape
    if query.element_size() > 2:
        return 0  # flash attention has no float32
    return flash_backward_bytes(rows * tokens, rows, heads, key.shape[1], width, query.element_size())


class _FakeFlex(torch.autograd.Function):
    """Saves the tensors that compiled flex attention saves: inputs, output and one float32 for each query and head."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        total = query.shape[2]
        output, sums = torch.empty_like(query), query.new_empty(1, query.shape[1], total, dtype=torch.float32)
        # The mask of blocks is made from masks of all pairs of tokens: same document, not later, and both together.
        _pairs = [query.new_empty(total, total, dtype=torch.bool) for _ in range(3)]
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: BackwardCFunction, _grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, _output, sums = ctx.saved_tensors  # type: ignore[misc]  # torch types it as one tensor
        _delta = torch.empty_like(sums)  # alive until the gradients are there, as in the kernel
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@dropout_by_sdpa
def fake_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, _segments: Segments, _rule: AttentionParams
) -> Tensor:
    """Flex attention (arXiv:2412.05496) on fake tensors, [1, H, T, D] -> [1, T, H, D].

    The real one has to be compiled for a device.
    """
    output: Tensor = _FakeFlex.apply(query, key, value)
    return output.transpose(1, 2)
