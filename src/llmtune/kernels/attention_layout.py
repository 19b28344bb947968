"""A flat row cut into tiles for attention by explicit products: a few large products instead of many small ones.

A tile is a run of queries and the keys they may see, of one document or of several. The first 128 queries of all
documents that are long enough see equally many keys each, so they are one batched product; then the next 128, and so
on; shorter last runs of equal length share a tile too. Short documents are first packed, first-fit, into pieces of one
length; where a piece reorders or pads them, the tile carries an index.

The queries are laid out tile after tile once for the whole row, so that each tile reads a contiguous range
(`TileLayout`).

Tokens are counted from the row's start. T tokens of the row, H query heads, G key heads (H = G x R); C pieces of a
tile, N queries and M keys in each, L tokens of a piece of short documents, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmtune.data.dataset.packing import plan_packs

__all__ = ["MAX_SAVED_TOKENS", "Rearrangement", "Tile", "TileLayout", "make_layout", "plan_tiles"]

TILE_TOKENS = 128
"""Queries of a tile. Fewer make the calls between products cost more than the products; more compute scores above the
diagonal that the mask hides.
"""

TILE_ROWS = 256
"""Rows of a tile's products, at least: where every query head has its own key head and no rows are stacked, a document
alone takes more queries.
"""

SHORT_TOKENS = 128
"""Documents up to this length share pieces: hidden scores between them cost less than further rounds of calls."""

LEAST_PIECE = 64
"""Tokens of a piece of short documents, at least, for the same reason."""

MAX_SAVED_TOKENS = 1024
"""Rows whose longest document has at most this many tokens save their probabilities for the backward pass (at most this
many numbers a token and head); longer ones compute them again, so that memory grows with the tokens and not with their
square (arXiv:2205.14135, section 3.1)."""

Document = tuple[int, int]
"""First token and the one after the last."""


class Rearrangement(NamedTuple):
    """How the tokens of short documents become pieces of one length, and back.

    Indices are counted from the tile's first token.
    """

    order: Tensor
    """int64 [C x L]: the token at each position of the pieces; padding repeats a token of its piece."""

    inverse: Tensor
    """int64 [tokens]: the position of each token, in the row's order."""


class Tile(NamedTuple):
    """Queries `start` to `stop` of each piece against the keys `key_start` to `stop` of that piece."""

    offsets: tuple[int, ...]
    """Where in the row each piece begins; the piece's tokens are counted from there."""
    start: int
    stop: int
    key_start: int
    mask: Tensor
    """Added to the last columns of the scores, 0 or -inf: [N, columns], or [C, 1, N, columns] where pieces differ."""
    rearrangement: Rearrangement | None = None
    """Set for packed short documents: such a tile has all tokens of its pieces, so `start` and `key_start` are 0."""

    @property
    def pieces(self) -> int:
        """Number of pieces, C."""
        return len(self.offsets)

    @property
    def scores(self) -> int:
        """Scores that this tile computes for each head, C x N x M."""
        return self.queries * (self.stop - self.key_start)

    @property
    def queries(self) -> int:
        """Queries of this tile with padding, C x N."""
        return self.pieces * (self.stop - self.start)

    def gather(self, x: Tensor, dim: int, start: int) -> Tensor:
        """Give tokens `start` to `stop` of each piece from a row along `dim`: [..., T, ...] -> [..., C, tokens, ...].

        gathered[c, n] = x[offsets[c] + start + n]. A view where the pieces are evenly spaced, else a copy.
        """
        if self.rearrangement is not None:
            return (
                self._all_tokens(x, dim)
                .index_select(dim, self.rearrangement.order)
                .unflatten(dim, (self.pieces, self.stop))
            )
        views = self._piece_views(x, dim, start)
        return views[0] if len(views) == 1 else torch.cat(views, dim)

    def scatter(self, row: Tensor, gathered: Tensor, dim: int, start: int) -> list[tuple[Tensor, Tensor]]:
        """Pair views of `row` with their parts of `gathered` [..., C, tokens, ...], for the caller to copy or to add.

        row[offsets[c] + start + n] = gathered[c, n]. The inverse of `gather`; padding is dropped.
        """
        if self.rearrangement is not None:
            tokens = gathered.flatten(dim, dim + 1).index_select(dim, self.rearrangement.inverse)
            return [(self._all_tokens(row, dim), tokens)]
        views = self._piece_views(row, dim, start)
        return list(zip(views, gathered.split([view.shape[dim] for view in views], dim), strict=True))

    def _piece_views(self, row: Tensor, dim: int, start: int) -> list[Tensor]:
        """The pieces from `start` on, as views [..., pieces, tokens, ...].

        All in one view where they are evenly spaced, else one by one.
        """
        tokens = self.stop - start
        steps = {after - before for before, after in pairwise(self.offsets)} or {tokens}
        if len(steps) > 1:
            return [row.narrow(dim, offset + start, tokens).unsqueeze(dim) for offset in self.offsets]
        step = steps.pop()
        # One strided view costs no copy, where `cat` would copy every piece.
        covered = row.narrow(dim, self.offsets[0] + start, step * (self.pieces - 1) + tokens)
        return [covered.unfold(dim, tokens, step).movedim(-1, dim + 1)]

    def _all_tokens(self, row: Tensor, dim: int) -> Tensor:
        assert self.rearrangement is not None
        return row.narrow(dim, self.offsets[0], len(self.rearrangement.inverse))


class TileLayout(NamedTuple):
    """The tiles of a flat row, and the order in which its queries (one a token and head) are laid out for them."""

    tiles: tuple[Tile, ...]

    groups: int
    """Key heads, G."""

    repeats: int
    """Query heads of each of them, R."""

    order: Tensor
    """int32, tile after tile, [G, C, R, N] each: which of the row's queries [T x H] is at each position."""

    inverse: Tensor
    """int32 [T x H]: the position of each of the row's queries in that order."""

    def by_tile(self, *rows: Tensor) -> list[tuple[Tile, list[Tensor]]]:
        """Give each tile with its part of each of `rows`, [positions, D] in this order, as views [G*C, R*N, D].

        Tiles of queries are those of FlashAttention (arXiv:2307.08691, section 3).
        """
        sizes = [self.groups * self.repeats * tile.queries for tile in self.tiles]
        return [
            (tile, [part.view(self.groups * tile.pieces, -1, part.shape[-1]) for part in parts])
            for tile, *parts in zip(self.tiles, *(row.split(sizes) for row in rows), strict=True)
        ]


@lru_cache(maxsize=8)  # every layer uses the same row: it is laid out once a micro-batch
def make_layout(
    boundaries: tuple[int, ...],
    window: int | None,
    tile_tokens: int,
    heads: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> TileLayout:
    """Cut one flat row into tiles (see `plan_tiles`) and lay its queries, [T, H], out for them.

    heads, groups: query and key heads, H and G. dtype: that of the scores.
    """
    tiles, repeats = plan_tiles(boundaries, window, tile_tokens, dtype, device), heads // groups
    query_TGR = torch.arange(boundaries[-1] * heads, dtype=torch.int32, device=device).view(-1, groups, repeats)
    inverse_TGR = torch.empty_like(query_TGR)
    orders = []
    count = 0
    for tile in tiles:
        # [C, N, G, R] -> [G, C, R, N]: the R query heads of a key head are stacked into the rows of one product.
        orders.append(tile.gather(query_TGR, 0, tile.start).permute(2, 0, 3, 1).flatten())
        position = torch.arange(count, count + len(orders[-1]), dtype=torch.int32, device=device)
        position_GCRN = position.view(groups, tile.pieces, repeats, -1)
        for view, part in tile.scatter(inverse_TGR, position_GCRN.permute(1, 3, 0, 2), 0, tile.start):
            view.copy_(part)
        count += len(position)
    return TileLayout(tiles, groups, repeats, torch.cat(orders), inverse_TGR.flatten())


def plan_tiles(
    boundaries: tuple[int, ...], window: int | None, tile_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tile, ...]:
    """Cut one flat row of T tokens into tiles.

    boundaries: cumulative document lengths, first 0, last T. window: a query sees at most this many tokens, itself
    included. tile_tokens: queries of a tile of a document that is a tile alone.
    """
    documents = list(pairwise(boundaries))
    tiles = [
        _short_tile(list(run), window, dtype, device) for is_short, run in groupby(documents, key=_is_short) if is_short
    ]
    saved_documents = [
        document for document in documents if not _is_short(document) and _length(document) <= MAX_SAVED_TOKENS
    ]
    # A long document has large products by itself; joined with others, more of its many scores would exist at a time.
    alone = [[document] for document in documents if _length(document) > MAX_SAVED_TOKENS]
    for group in [saved_documents, *alone]:
        rows = tile_tokens if len(group) == 1 else min(tile_tokens, TILE_TOKENS)
        # Queries at the same distance from their document's start see equally many keys, so they share a product.
        offsets_of: dict[tuple[int, int], list[int]] = {}
        for offset, end in group:
            for start in range(0, end - offset, rows):
                offsets_of.setdefault((start, min(start + rows, end - offset)), []).append(offset)
        for (start, stop), offsets in offsets_of.items():
            key_start = 0 if window is None else max(0, start - window + 1)
            mask = _additive_mask((start, stop), key_start, window, dtype, device)
            tiles.append(Tile(tuple(offsets), start, stop, key_start, mask))
    return tuple(tiles)


def _is_short(document: Document) -> bool:
    return _length(document) <= SHORT_TOKENS


def _length(document: Document) -> int:
    return document[1] - document[0]


def _short_tile(documents: Sequence[Document], window: int | None, dtype: torch.dtype, device: torch.device) -> Tile:
    """Pack a run of short documents into pieces of one length, which are one tile."""
    offset, tokens = documents[0][0], documents[-1][1] - documents[0][0]
    pieces = _pack(documents)
    length = max(sum(map(_length, piece)) for piece in pieces)
    index: list[int] = []
    position_of: dict[int, int] = {}
    for piece in pieces:
        piece_tokens = [token - offset for document in piece for token in range(*document)]
        position_of |= {token: len(index) + number for number, token in enumerate(piece_tokens)}
        # Padding needs a valid index, so it repeats the piece's first token; the mask hides it from all others.
        index += piece_tokens + piece_tokens[:1] * (length - len(piece_tokens))
    mask = torch.stack([_mask_of_piece(piece, length, window, dtype, device) for piece in pieces]).unsqueeze(1)
    rearrangement = None
    if index != list(range(tokens)):
        inverse = [position_of[token] for token in range(tokens)]
        rearrangement = Rearrangement(
            *(torch.tensor(indices, dtype=torch.int64, device=device) for indices in (index, inverse))
        )
    return Tile(tuple(offset + length * number for number in range(len(pieces))), 0, length, 0, mask, rearrangement)


def _pack(documents: Sequence[Document]) -> list[list[Document]]:
    """Put documents into pieces first-fit; documents of a piece, and pieces, keep the row's order."""
    lengths = np.array(list(map(_length, documents)), dtype=np.int64)
    packs = plan_packs(lengths, max(LEAST_PIECE, int(lengths.max())), "first_fit", None)
    return [[documents[index] for index in pack] for pack in packs]


def _mask_of_piece(
    documents: Sequence[Document], length: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Make the additive mask of a piece of several documents, [L, L]."""
    mask = torch.full((length, length), float("-inf"), dtype=dtype, device=device)
    boundaries = tuple(accumulate(map(_length, documents), initial=0))
    tokens = boundaries[-1]
    mask[:tokens, :tokens] = _additive_mask(boundaries, 0, window, dtype, device)
    mask.diagonal()[tokens:] = 0  # padding sees itself: a row of -inf alone would make the softmax NaN
    return mask


def _additive_mask(
    boundaries: tuple[int, ...], key_start: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return 0 where a query may see a key and -inf elsewhere, for the queries boundaries[0] to boundaries[-1].

    A document begins at each boundary but the last. The mask has as many columns as need hiding, counted from the
    right: the diagonal block, or all M keys under a window.
    """
    column_start = boundaries[0] if window is None else key_start
    query_N = torch.arange(boundaries[0], boundaries[-1], device=device)
    key_M = torch.arange(column_start, boundaries[-1], device=device)
    ends = torch.tensor(boundaries[1:], device=device)
    is_same_document = (
        torch.bucketize(query_N, ends, right=True)[:, None] == torch.bucketize(key_M, ends, right=True)[None, :]
    )
    distance = query_N[:, None] - key_M[None, :]
    visible = is_same_document & (distance >= 0)
    if window is not None:
        visible &= distance < window
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
