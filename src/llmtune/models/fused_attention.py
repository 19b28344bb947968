"""Causal attention by explicit matrix products over tiles, keeping memory linear in the tokens.

On a CPU, plain batched products reach several times the rate of the fused attention kernel. A tile is a run of queries (part of one
document, or several short documents together) and the keys they may see; its scores are one product, its output another. Query heads that
share a key head are stacked into one product, so keys are never repeated.

Shapes: T tokens of the row, H query heads, G key/value heads (H = G x R), D head width; a tile has N queries and M keys.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtune.models.pieces import telling_pieces

__all__ = ["Tile", "plan_tiles", "tiled_attention"]

TILE_TOKENS = 128
"""Queries of a tile, at least: fewer waste time between products, more waste products above the diagonal."""

TILE_ROWS = 256
"""Rows of a tile's products, at least: query heads that have a key head each stack no rows, and take more queries instead."""

JOINED_TOKENS = 128
"""Short documents share a tile up to this many tokens: what they compute for nothing costs less than another round of calls."""


KEPT_TOKENS = 1024
"""Rows whose documents are all this short keep their probabilities for the backward pass (at most this many numbers a token and head);
longer ones compute them again, so that memory grows with the tokens and not with their square."""


class Tile(NamedTuple):
    """Queries `start` to `stop` against keys `key_start` to `stop`; `hidden` is added to the last columns of their scores (0 or -inf)."""

    start: int
    stop: int
    key_start: int
    hidden: Tensor


@lru_cache(maxsize=8)
def plan_tiles(boundaries: tuple[int, ...], window: int | None, tile: int, dtype: torch.dtype, device: torch.device) -> tuple[Tile, ...]:
    """Cut one flat row into tiles. The same row asks once for every layer, so the last few answers are kept.

    boundaries: cumulative document lengths, first 0. window: a query sees at most this many tokens, itself included. `hidden` has N rows
    and as many columns as need hiding, counted from the right: the diagonal block, or all M keys under a window.
    """
    tiles: list[Tile] = []
    joined: list[int] = []
    for start, stop in pairwise(boundaries):
        if joined and stop - joined[0] > JOINED_TOKENS:
            tiles.append(_joined_tile(joined, window, dtype, device))
            joined = []
        if stop - start <= JOINED_TOKENS:
            joined = [*joined, stop] if joined else [start, stop]
            continue
        if joined:
            tiles.append(_joined_tile(joined, window, dtype, device))
            joined = []
        for first in range(start, stop, tile):
            last = min(first + tile, stop)
            key_start = start if window is None else max(start, first - window + 1)
            tiles.append(Tile(first, last, key_start, _hidden((first, last), first, key_start, window, dtype, device)))
    if joined:
        tiles.append(_joined_tile(joined, window, dtype, device))
    return tuple(tiles)


def _scores(tile: Tile) -> int:
    """Scores of a tile, for each head."""
    return (tile.stop - tile.start) * (tile.stop - tile.key_start)


def _joined_tile(marks: list[int], window: int | None, dtype: torch.dtype, device: torch.device) -> Tile:
    return Tile(marks[0], marks[-1], marks[0], _hidden(tuple(marks), marks[0], marks[0], window, dtype, device))


def _hidden(marks: tuple[int, ...], first: int, key_start: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 0 where a query may look and -inf elsewhere, for the queries marks[0] to marks[-1] (documents begin at each mark)."""
    column_start = first if window is None or key_start == first else key_start
    query_N = torch.arange(marks[0], marks[-1], device=device)
    key_M = torch.arange(column_start, marks[-1], device=device)
    document = torch.tensor(marks[1:], device=device)
    same = torch.bucketize(query_N, document, right=True)[:, None] == torch.bucketize(key_M, document, right=True)[None, :]
    distance = query_N[:, None] - key_M[None, :]
    seen = same & (distance >= 0)
    if window is not None:
        seen &= distance < window
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _probabilities(query: Tensor, key: Tensor, tile: Tile, repeats: int, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Probabilities [G, R*N, M] of a tile from scaled queries [G, R*N, D] and keys [G, M, D]; also tanh of the scores under a cap."""
    scores = torch.bmm(query, key.transpose(1, 2))
    capped = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        capped = scores.clone()
        scores.mul_(softcap)
    rows, columns = tile.hidden.shape
    scores.view(scores.shape[0], repeats, rows, -1)[..., -columns:].add_(tile.hidden)
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
        output = query.new_empty(total, groups, repeats, width)
        kept = []
        for tile in tiles if keep else telling_pieces(tiles, query, _scores):
            rows, keys = slice(tile.start, tile.stop), slice(tile.key_start, tile.stop)
            scaled = _tile_queries(query, rows, groups, scale)
            weights, _ = _probabilities(scaled, key[:, keys], tile, repeats, softcap)
            result = torch.bmm(weights, value[:, keys])
            output[rows] = result.view(groups, repeats, -1, width).permute(2, 0, 1, 3)
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
        grad_output_HTD = grad_output.transpose(0, 1)
        held = iter(kept)
        for tile in ctx.tiles if kept else telling_pieces(ctx.tiles, query, _scores):
            rows, keys = slice(tile.start, tile.stop), slice(tile.key_start, tile.stop)
            scaled = _tile_queries(query, rows, groups, ctx.scale)
            grad_rows = _tile_queries(grad_output_HTD, rows, groups, None)
            weights, capped = (next(held), None) if kept else _probabilities(scaled, key[:, keys], tile, repeats, ctx.softcap)
            grad_value[:, keys] += torch.bmm(weights.transpose(1, 2), grad_rows)
            grad_weights = torch.bmm(grad_rows, value[:, keys].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if capped is not None:
                grad_scores = grad_scores * (1 - capped.square())
            grad_key[:, keys] += torch.bmm(grad_scores.transpose(1, 2), scaled)
            grad_tile = torch.bmm(grad_scores, key[:, keys]).view(groups, repeats, -1, width)
            torch.mul(grad_tile.permute(2, 0, 1, 3), ctx.scale, out=grad_query[rows])
        grad_query_HTD = grad_query.view(total, heads, width).transpose(0, 1)
        return grad_query_HTD, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def _tile_queries(query: Tensor, rows: slice, groups: int, scale: float | None) -> Tensor:
    """Lay the queries of a tile out as [G, R*N, D], times `scale`, in one pass over them."""
    part = query[:, rows].unflatten(0, (groups, -1))
    laid_out = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    if scale is None:
        laid_out.copy_(part)
    else:
        torch.mul(part, scale, out=laid_out)
    return laid_out.view(groups, -1, query.shape[-1])


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
