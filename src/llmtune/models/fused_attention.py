"""Causal attention by explicit matrix products over tiles, keeping memory linear in the tokens.

On a CPU, plain batched products reach several times the rate of the fused attention kernel. A tile (`models/attention_tiles.py`) is a run
of queries and the keys they may see, of one document or of several at once: its scores are one batch of products, its output another.
Query heads that share a key head are stacked into one product, so keys are never repeated.

Shapes: T tokens of the row, H query heads, G key/value heads (H = G x R), D head width; a tile has C pieces, N queries and M keys in each.
"""

from __future__ import annotations

from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from llmtune.models.attention_tiles import KEPT_TOKENS, TILE_ROWS, TILE_TOKENS, Tile, plan_tiles
from llmtune.models.pieces import telling_pieces

__all__ = ["tiled_attention"]


def _probabilities(query: Tensor, key: Tensor, tile: Tile, repeats: int, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Probabilities [G*C, R*N, M] of a tile from scaled queries and keys [G*C, M, D]; also tanh of the scores under a cap."""
    scores = torch.bmm(query, key.transpose(1, 2))
    capped = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        capped = scores.clone()
        scores.mul_(softcap)
    rows, columns = tile.hidden.shape[-2:]
    scores.view(-1, tile.pieces, repeats, rows, scores.shape[-1])[..., -columns:].add_(tile.hidden)
    return torch.softmax(scores, dim=-1), capped


class _TiledAttention(torch.autograd.Function):
    """One flat row of attention. Returns [T, H, D] contiguous; takes query [H, T, D] and key, value [G, T, D], in any strides."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: tuple[Tile, ...], scale: float, softcap: float | None, keep: bool
    ) -> Tensor:
        heads, total, width = query.shape
        groups = key.shape[0]
        repeats = heads // groups
        query_GRTD = query.unflatten(0, (groups, -1))
        output = query.new_empty(total, groups, repeats, width)
        kept = []
        for tile in tiles if keep else telling_pieces(tiles, query, attrgetter("scores")):
            scaled = _queries(query_GRTD, tile, scale)
            weights, _ = _probabilities(scaled, _keys(key, tile), tile, repeats, softcap)
            _write(torch.bmm(weights, _keys(value, tile)), tile, output, None)
            if keep:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.tiles, ctx.scale, ctx.softcap = tiles, scale, softcap
        return output.view(total, heads, width)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *kept = ctx.saved_tensors
        heads, total, width = query.shape
        groups = key.shape[0]
        repeats = heads // groups
        grad_query = query.new_empty(total, groups, repeats, width)
        grad_key = torch.zeros(groups, total, width, dtype=torch.float32, device=key.device)
        grad_value = torch.zeros_like(grad_key)
        grad_output_GRTD = grad_output.transpose(0, 1).unflatten(0, (groups, -1))
        query_GRTD = query.unflatten(0, (groups, -1))
        held = iter(kept)
        for tile in ctx.tiles if kept else telling_pieces(ctx.tiles, query, attrgetter("scores")):
            keys = _keys(key, tile)
            scaled = _queries(query_GRTD, tile, ctx.scale)
            grad_rows = _queries(grad_output_GRTD, tile, None)
            weights, capped = (next(held), None) if kept else _probabilities(scaled, keys, tile, repeats, ctx.softcap)
            _add(torch.bmm(weights.transpose(1, 2), grad_rows), tile, grad_value)
            grad_weights = torch.bmm(grad_rows, _keys(value, tile).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if capped is not None:
                grad_scores = grad_scores * (1 - capped.square())
            _add(torch.bmm(grad_scores.transpose(1, 2), scaled), tile, grad_key)
            _write(torch.bmm(grad_scores, keys), tile, grad_query, ctx.scale)
        grad_query_HTD = grad_query.view(total, heads, width).transpose(0, 1)
        return grad_query_HTD, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def _pieces(x: Tensor, tile: Tile, dim: int, start: int) -> Tensor:
    """Tokens `start` to the tile's last of each of its pieces, from a row along `dim`: a view [..., C, tokens, ...]."""
    if tile.pieces == 1:
        return x.narrow(dim, tile.first + start, tile.stop - start).unsqueeze(dim)
    own = x.narrow(dim, tile.first, tile.tokens).unflatten(dim, (tile.pieces, tile.length))
    return own.narrow(dim + 1, start, tile.stop - start)


def _gathered(x: Tensor, tile: Tile, dim: int, start: int) -> Tensor:
    """The same from a row [..., T, D], also where the pieces are rearranged: [..., C, tokens, D]."""
    if tile.rearranged is None:
        return _pieces(x, tile, dim, start)
    own = x.narrow(dim, tile.first, tile.tokens).index_select(dim, tile.rearranged.tokens)
    return own.unflatten(dim, (tile.pieces, tile.length))


def _keys(key: Tensor, tile: Tile) -> Tensor:
    """The keys (or values) of a row [G, T, D] that the tile's queries may see, [G*C, M, D]."""
    if tile.pieces == 1:  # the same with two calls fewer: this is asked four times a tile and layer
        return key.narrow(1, tile.first + tile.key_start, tile.stop - tile.key_start)
    return _gathered(key, tile, 1, tile.key_start).flatten(0, 1)


def _queries(query: Tensor, tile: Tile, scale: float | None) -> Tensor:
    """Lay the queries of a tile, of a row [G, R, T, D], out as [G*C, R*N, D], times `scale`, in one pass over them."""
    part = _gathered(query, tile, 2, tile.start).transpose(1, 2)
    laid_out = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    if scale is None:
        laid_out.copy_(part)
    else:
        torch.mul(part, scale, out=laid_out)
    return laid_out.view(part.shape[0] * part.shape[1], -1, part.shape[-1])


def _write(rows: Tensor, tile: Tile, output: Tensor, scale: float | None) -> None:
    """Put rows [G*C, R*N, D] where the tile's queries stand in `output` [T, G, R, D], times `scale`."""
    groups, repeats, width = output.shape[1:]
    rows = rows.view(groups, tile.pieces, repeats, -1, width).permute(1, 3, 0, 2, 4)
    if tile.rearranged is None:
        own = _pieces(output, tile, 0, tile.start)
    else:
        own = output.narrow(0, tile.first, tile.tokens)
        rows = rows.flatten(0, 1).index_select(0, tile.rearranged.places)
    if scale is None:
        own.copy_(rows)
    else:
        torch.mul(rows, scale, out=own)


def _add(rows: Tensor, tile: Tile, total: Tensor) -> None:
    """Add rows [G*C, M, D] to the tile's keys in `total` [G, T, D]."""
    rows = rows.view(total.shape[0], tile.pieces, -1, total.shape[-1])
    if tile.rearranged is None:
        own = _pieces(total, tile, 1, tile.key_start)
    else:
        own = total.narrow(1, tile.first, tile.tokens)
        rows = rows.flatten(1, 2).index_select(1, tile.rearranged.places)
    own += rows


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each document of one flat row over itself.

    query: [1, H, T, D]; key, value: [1, G, T, D], one dtype. boundaries: cumulative document lengths. scale multiplies the scores;
    window: tokens a query sees, itself included; softcap c replaces a score s by c tanh(s / c). Returns [1, T, H, D]. In bf16 scores and
    probabilities are rounded to bf16 (as in the library's eager attention); the softmax itself and the sums over queries are float32.
    """
    assert query.shape[0] == 1, "a flat micro-batch is one row"
    tile = max(TILE_TOKENS, TILE_ROWS * key.shape[1] // query.shape[1])
    tiles = plan_tiles(boundaries, window, tile, query.dtype, query.device)
    longest = max(stop - start for start, stop in pairwise(boundaries))
    keep = longest <= KEPT_TOKENS and softcap is None and torch.is_grad_enabled()
    with torch.autocast(query.device.type, enabled=False):
        return _TiledAttention.apply(query[0], key[0], value[0], tiles, scale, softcap, keep).unsqueeze(0)
