"""Causal attention by explicit matrix products over tiles, with memory linear in the tokens (arXiv:2205.14135).

On a CPU, plain batched products reach several times the rate of the fused attention kernel. A tile (see
`attention_layout`) is a run of queries and the keys they may see, of one document or of several at once: its scores are
one batch of products, its output another. Query heads that share a key head are stacked into one product, so keys are
never repeated. Queries, outputs and their gradients are laid out tile after tile in one pass over the row, and products
write into that layout: copies tile by tile took a seventh of the time.

Shapes: T tokens of the row, H query heads, G key/value heads (H = G x R), D head width; a tile has C pieces, N queries
and M keys in each.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from llmtune.kernels.attention_layout import MAX_SAVED_TOKENS, TILE_ROWS, TILE_TOKENS, Tile, TileLayout, make_layout
from llmtune.kernels.autograd import Context
from llmtune.kernels.chunks import SelectChunks, every_chunk

__all__ = ["tiled_attention"]


def _probabilities(
    query: Tensor, key: Tensor, tile: Tile, repeats: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities [G*C, R*N, M] of a tile from queries [G*C, R*N, D] and scaled keys [G*C, M, D].

    Also tanh(scores / softcap), which the backward pass needs, where there is a cap.
    """
    scores = torch.bmm(query, key.transpose(1, 2))
    tanh_scores = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        tanh_scores = scores.clone()
        scores.mul_(softcap)
    rows, columns = tile.mask.shape[-2:]
    # The mask has only the columns that hide something, the last ones: the others are not even read.
    scores.view(-1, tile.pieces, repeats, rows, scores.shape[-1])[..., -columns:].add_(tile.mask)
    return torch.softmax(scores, dim=-1, out=scores), tanh_scores


class _AttentionContext(Context):
    layout: TileLayout
    scale: float
    softcap: float | None
    select: SelectChunks


class _TiledAttention(torch.autograd.Function):
    """One flat row of attention.

    Returns [T, H, D] contiguous; takes query [H, T, D] and key, value [G, T, D], in any strides. The gradients are
    those of FlashAttention (arXiv:2205.14135, appendix B.2), with the probabilities saved or computed again.
    """

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TileLayout,
        scale: float,
        softcap: float | None,
        save_probabilities: bool,
        select: SelectChunks,
    ) -> Tensor:
        heads, total, width = query.shape
        rows = query.transpose(0, 1).reshape(-1, width).index_select(0, layout.order)
        # Keys are scaled, not scores: there are fewer of them, and one pass serves every tile.
        key, value = (key * scale).contiguous(), value.contiguous()
        output = torch.empty_like(rows)
        saved = []
        tiles = layout.by_tile(rows, output)
        for tile, (tile_query, tile_output) in tiles if save_probabilities else select(tiles, _scores):
            probabilities, _ = _probabilities(tile_query, _keys(key, tile), tile, layout.repeats, softcap)
            torch.bmm(probabilities, _keys(value, tile), out=tile_output)
            if save_probabilities:
                saved.append(probabilities)
        # The queries in their new order: the given ones would be laid out a second time.
        ctx.save_for_backward(rows, key, value, *saved)
        ctx.layout, ctx.scale, ctx.softcap, ctx.select = layout, scale, softcap, select
        return output.index_select(0, layout.inverse).view(total, heads, width)

    @staticmethod
    def backward(ctx: _AttentionContext, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, key, value, *saved = ctx.saved_tensors
        layout = ctx.layout
        groups, total, width = key.shape
        # As the queries are laid out, so that each tile reads one contiguous range of both.
        grad_rows = grad_output.reshape(-1, width).index_select(0, layout.order)
        # Keys and values gather gradients from several tiles: in float32, and both in one tensor, so that one scatter
        # serves both.
        grad_key_value = torch.zeros(2 * groups, total, width, dtype=torch.float32, device=key.device)
        tiles = layout.by_tile(rows, grad_rows)
        saved_probabilities = iter(saved)
        for tile, (tile_query, tile_grad) in tiles if saved else ctx.select(tiles, _scores):
            keys = _keys(key, tile)
            probabilities, tanh_scores = (
                (next(saved_probabilities), None)
                if saved
                else _probabilities(tile_query, keys, tile, layout.repeats, ctx.softcap)
            )
            grad_probabilities = torch.bmm(tile_grad, _keys(value, tile).transpose(1, 2))
            # This comes first because it reads the probabilities, which have left the cache by now, in the order of
            # memory: it fetches them sooner than a transposed product does.
            grad_scores = torch._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype, grad_input=grad_probabilities
            )
            if tanh_scores is not None:
                # The derivative of c tanh(s / c); s itself was overwritten.
                grad_scores.mul_(1 - tanh_scores.square())
            parts = keys.new_empty(2, *keys.shape)
            torch.bmm(probabilities.transpose(1, 2), tile_grad, out=parts[1])
            torch.bmm(grad_scores.transpose(1, 2), tile_query, out=parts[0])
            for view, part in tile.scatter(
                grad_key_value, parts.view(2 * groups, tile.pieces, -1, width), 1, tile.key_start
            ):
                view += part
            # The gradient of the output has been read for the last time, so the queries' is written over it.
            torch.bmm(grad_scores, keys, out=tile_grad)
        grad_key_value[:groups].mul_(ctx.scale)  # `keys` were scaled, so the queries' gradient is already
        grad_key, grad_value = grad_key_value.to(key.dtype).chunk(2)
        grad_query_HTD = grad_rows.index_select(0, layout.inverse).view(total, -1, width).transpose(0, 1)
        return grad_query_HTD, grad_key, grad_value, None, None, None, None, None


def _scores(tile_with_rows: tuple[Tile, list[Tensor]]) -> int:
    return tile_with_rows[0].scores


def _keys(key: Tensor, tile: Tile) -> Tensor:
    """The keys (or values) of a row [G, T, D] that the tile's queries may see: [G*C, M, D]."""
    # Contiguous, because batched products copy strided operands slowly, and each is used twice.
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

    output = softmax(scale q k^T + mask) v (arXiv:1706.03762, equation 1), tile by tile (arXiv:2205.14135).

    query: [1, H, T, D]; key, value: [1, G, T, D], one dtype. boundaries: cumulative document lengths. scale multiplies
    the scores; window: tokens a query sees, itself included; softcap c replaces a score s by c tanh(s / c). Returns [1,
    T, H, D]. In bf16 scores and probabilities are rounded to bf16 (as in the library's eager attention); the softmax
    itself and the sums over queries are float32.
    """
    assert query.shape[0] == 1, "a flat micro-batch is one row"
    tile_tokens = max(TILE_TOKENS, TILE_ROWS * key.shape[1] // query.shape[1])
    layout = make_layout(boundaries, window, tile_tokens, query.shape[1], key.shape[1], query.dtype, query.device)
    longest = max(stop - start for start, stop in pairwise(boundaries))
    save_probabilities = longest <= MAX_SAVED_TOKENS and softcap is None and torch.is_grad_enabled()
    # The inputs have autocast's type already; nothing inside may change it again.
    with torch.autocast(query.device.type, enabled=False):
        output: Tensor = _TiledAttention.apply(
            query[0], key[0], value[0], layout, scale, softcap, save_probabilities, select
        )
    return output.unsqueeze(0)
