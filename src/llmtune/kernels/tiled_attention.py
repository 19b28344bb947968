"""Causal attention by explicit matrix products over tiles, keeping memory linear in the tokens.

On a CPU, plain batched products reach several times the rate of the fused attention kernel. A tile
(`models/attention_tiles.py`) is a run of queries and the keys they may see, of one document or of several at once: its
scores are one batch of products, its output another. Query heads that share a key head are stacked into one product, so
keys are never repeated. Queries, outputs and their gradients are laid out tile after tile in one pass over the row, and
products write where they belong: copies tile by tile took a seventh of the time.

Shapes: T tokens of the row, H query heads, G key/value heads (H = G x R), D head width; a tile has C pieces, N queries
and M keys in each.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmtune.kernels.attention_layout import KEPT_TOKENS, TILE_ROWS, TILE_TOKENS, Layout, Tile, lay_out
from llmtune.kernels.chunks import SelectChunks, every_chunk

__all__ = ["tiled_attention"]


def _probabilities(
    query: Tensor, key: Tensor, tile: Tile, repeats: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities [G*C, R*N, M] of a tile from queries and scaled keys [G*C, M, D].

    Also tanh of the scores under a cap.
    """
    scores = torch.bmm(query, key.transpose(1, 2))
    capped = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        capped = scores.clone()
        scores.mul_(softcap)
    rows, columns = tile.hidden.shape[-2:]
    scores.view(-1, tile.pieces, repeats, rows, scores.shape[-1])[..., -columns:].add_(tile.hidden)
    return torch.softmax(scores, dim=-1, out=scores), capped


class _TiledAttention(torch.autograd.Function):
    """One flat row of attention.

    Returns [T, H, D] contiguous; takes query [H, T, D] and key, value [G, T, D], in any strides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scale: float,
        softcap: float | None,
        keep: bool,
        select: SelectChunks,
    ) -> Tensor:
        heads, total, width = query.shape
        rows = query.transpose(0, 1).reshape(-1, width).index_select(0, layout.order)
        key, value = (key * scale).contiguous(), value.contiguous()
        output = torch.empty_like(rows)
        probabilities = []
        pieces = layout.by_tile(rows, output)
        for tile, (own, own_output) in pieces if keep else select(pieces, _scores):
            weights, _ = _probabilities(own, _keys(key, tile), tile, layout.repeats, softcap)
            torch.bmm(weights, _keys(value, tile), out=own_output)
            if keep:
                probabilities.append(weights)
        ctx.save_for_backward(rows, key, value, *probabilities)
        ctx.layout, ctx.scale, ctx.softcap, ctx.select = layout, scale, softcap, select
        return output.index_select(0, layout.places).view(total, heads, width)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, key, value, *probabilities = ctx.saved_tensors
        layout = ctx.layout
        groups, total, width = key.shape
        grad_rows = grad_output.reshape(-1, width).index_select(0, layout.order)
        grad_both = torch.zeros(2 * groups, total, width, dtype=torch.float32, device=key.device)
        pieces = layout.by_tile(rows, grad_rows)
        saved_probabilities = iter(probabilities)
        for tile, (own, grad) in pieces if probabilities else ctx.select(pieces, _scores):
            keys = _keys(key, tile)
            weights, capped = (
                (next(saved_probabilities), None)
                if probabilities
                else _probabilities(own, keys, tile, layout.repeats, ctx.softcap)
            )
            grad_weights = torch.bmm(grad, _keys(value, tile).transpose(1, 2))
            # the first to read the probabilities, which lie far away by now: a pass in order fetches them sooner than a
            # transposed product
            grad_scores = torch._softmax_backward_data(
                grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
            )
            if capped is not None:
                grad_scores.mul_(1 - capped.square())
            parts = keys.new_empty(2, *keys.shape)
            torch.bmm(weights.transpose(1, 2), grad, out=parts[1])
            torch.bmm(grad_scores.transpose(1, 2), own, out=parts[0])
            for own_sum, gradient in tile.in_row(
                grad_both, parts.view(2 * groups, tile.pieces, -1, width), 1, tile.key_start
            ):
                own_sum += gradient
            torch.bmm(grad_scores, keys, out=grad)  # its rows have served
        grad_both[:groups].mul_(ctx.scale)
        grad_key, grad_value = grad_both.to(key.dtype).chunk(2)
        grad_query_HTD = grad_rows.index_select(0, layout.places).view(total, -1, width).transpose(0, 1)
        return grad_query_HTD, grad_key, grad_value, None, None, None, None, None


def _scores(piece: tuple[Tile, list[Tensor]]) -> int:
    return piece[0].scores


def _keys(key: Tensor, tile: Tile) -> Tensor:
    """The keys (or values) of a row [G, T, D] that the tile's queries may see: [G*C, M, D].

    In the order of memory, because a product copies others slowly.
    """
    return tile.gather(key, 1, tile.key_start).flatten(0, 1).contiguous()


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    select: SelectChunks = every_chunk,
) -> Tensor:
    """Causal attention of each document of one flat row over itself.

    query: [1, H, T, D]; key, value: [1, G, T, D], one dtype. boundaries: cumulative document lengths. scale multiplies
    the scores; window: tokens a query sees, itself included; softcap c replaces a score s by c tanh(s / c). Returns [1,
    T, H, D]. In bf16 scores and probabilities are rounded to bf16 (as in the library's eager attention); the softmax
    itself and the sums over queries are float32.
    """
    assert query.shape[0] == 1, "a flat micro-batch is one row"
    tile = max(TILE_TOKENS, TILE_ROWS * key.shape[1] // query.shape[1])
    layout = lay_out(boundaries, window, tile, query.shape[1], key.shape[1], query.dtype, query.device)
    longest = max(stop - start for start, stop in pairwise(boundaries))
    keep = longest <= KEPT_TOKENS and softcap is None and torch.is_grad_enabled()
    with torch.autocast(query.device.type, enabled=False):
        return _TiledAttention.apply(query[0], key[0], value[0], layout, scale, softcap, keep, select).unsqueeze(0)
