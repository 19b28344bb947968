"""A flat row in tiles for attention by explicit products: a few large products instead of many small ones.

A tile is a run of queries and the keys they may see, of one document or of several: the first 128 queries of all that
have so many see as many keys each and are one product, then the next 128, and so on; ends go together where they are
alike. A run of short documents is packed into pieces of one length first, as containers are; where that takes another
order or leaves gaps, the tile carries the tokens' places.

Queries are laid out tile after tile, once for the whole row, so that each tile finds its own side by side (`Layout`).

Tokens are counted from the row's start. T tokens of the row, H query heads, G key heads (H = G x R); C pieces of a
tile, N queries and M keys in each.
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

__all__ = ["KEPT_TOKENS", "Layout", "Rearranged", "Tile", "lay_out", "plan_tiles"]

TILE_TOKENS = 128
"""Queries of a tile: fewer waste time between products, more waste products above the diagonal."""

TILE_ROWS = 256
"""Rows of a tile's products, at least: where query heads have a key head each and stack no rows, a document alone takes
more queries.
"""

SHORT_TOKENS = 128
"""Documents up to this length share pieces: what is computed for nothing costs less than another round of calls."""

LEAST_PIECE = 64
"""Tokens that a piece of short documents holds at least, for the same reason."""

KEPT_TOKENS = 1024
"""Rows whose documents are all this short keep their probabilities for the backward pass (at most this many numbers a
token and head); longer ones compute them again, so that memory grows with the tokens and not with their square."""

Document = tuple[int, int]
"""First token and the one after the last."""


class Rearranged(NamedTuple):
    """Pieces made of tokens that do not stand side by side, or fill them only in part.

    Numbers are counted from the tile's first token.
    """

    tokens: Tensor
    """[C x L]: the token at each place of pieces of L; a gap repeats one that is there."""

    places: Tensor
    """The place of each token, in the row's order."""


class Tile(NamedTuple):
    """Queries `start` to `stop` of each piece against the keys `key_start` to `stop` of that piece.

    firsts: where in the row each piece begins; its tokens are counted from there. hidden (0 or -inf) is added to the
    last columns of the scores: [N, columns], or [C, 1, N, columns] where pieces differ. A tile that is rearranged has
    whole pieces, and `firsts` say how many.
    """

    firsts: tuple[int, ...]
    start: int
    stop: int
    key_start: int
    hidden: Tensor
    rearranged: Rearranged | None = None

    @property
    def pieces(self) -> int:
        """How many pieces it has, C."""
        return len(self.firsts)

    @property
    def scores(self) -> int:
        """Scores that this tile computes for each head."""
        return self.queries * (self.stop - self.key_start)

    @property
    def queries(self) -> int:
        """Queries of this tile, gaps among them."""
        return self.pieces * (self.stop - self.start)

    def gather(self, x: Tensor, dim: int, start: int) -> Tensor:
        """Tokens `start` to this tile's last of each of its pieces, from a row along `dim`: [..., C, tokens, ...].

        A view where it can be.
        """
        if self.rearranged is not None:
            return (
                self._whole(x, dim).index_select(dim, self.rearranged.tokens).unflatten(dim, (self.pieces, self.stop))
            )
        parts = self._parts(x, dim, start)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def in_row(self, row: Tensor, gathered: Tensor, dim: int, start: int) -> list[tuple[Tensor, Tensor]]:
        """Views of `row` that cover what `gather` would give, each with its part of `found` [..., C, tokens, ...]."""
        if self.rearranged is not None:
            return [(self._whole(row, dim), gathered.flatten(dim, dim + 1).index_select(dim, self.rearranged.places))]
        parts = self._parts(row, dim, start)
        return list(zip(parts, gathered.split([part.shape[dim] for part in parts], dim), strict=True))

    def _parts(self, row: Tensor, dim: int, start: int) -> list[Tensor]:
        """The pieces from `start` on, as views [..., pieces, tokens, ...].

        All in one view where they are evenly far apart, else one by one.
        """
        tokens = self.stop - start
        steps = {after - before for before, after in pairwise(self.firsts)} or {tokens}
        if len(steps) > 1:
            return [row.narrow(dim, first + start, tokens).unsqueeze(dim) for first in self.firsts]
        step = steps.pop()
        own = row.narrow(dim, self.firsts[0] + start, step * (self.pieces - 1) + tokens)
        return [own.unfold(dim, tokens, step).movedim(-1, dim + 1)]

    def _whole(self, row: Tensor, dim: int) -> Tensor:
        assert self.rearranged is not None
        return row.narrow(dim, self.firsts[0], len(self.rearranged.places))


class Layout(NamedTuple):
    """The tiles of a flat row, and the order in which its queries (one a token and head) are laid out for them."""

    tiles: tuple[Tile, ...]

    groups: int
    """Key heads, G."""

    repeats: int
    """Query heads of each of them, R."""

    order: Tensor
    """Tile after tile, [G, C, R, N] each: which of the row's queries [T x H] stands at each place. int32."""

    places: Tensor
    """[T x H]: the place of each of the row's queries in that order. int32."""

    def by_tile(self, *rows: Tensor) -> list[tuple[Tile, list[Tensor]]]:
        """Each tile with its part of each of `rows` [places, D], laid out in this order: views [G*C, R*N, D]."""
        sizes = [self.groups * self.repeats * tile.queries for tile in self.tiles]
        return [
            (tile, [part.view(self.groups * tile.pieces, -1, part.shape[-1]) for part in parts])
            for tile, *parts in zip(self.tiles, *(row.split(sizes) for row in rows), strict=True)
        ]


@lru_cache(maxsize=8)
def lay_out(
    boundaries: tuple[int, ...],
    window: int | None,
    tile: int,
    heads: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Layout:
    """Cut one flat row into tiles (see `plan_tiles`) and lay its queries out.

    The same row asks once a layer, so a few answers are kept.
    """
    tiles, repeats = plan_tiles(boundaries, window, tile, dtype, device), heads // groups
    query_TGR = torch.arange(boundaries[-1] * heads, dtype=torch.int32, device=device).view(-1, groups, repeats)
    place_TGR = torch.empty_like(query_TGR)
    order = []
    count = 0
    for part in tiles:
        order.append(part.gather(query_TGR, 0, part.start).permute(2, 0, 3, 1).flatten())
        numbers = torch.arange(count, count + len(order[-1]), dtype=torch.int32, device=device)
        place_GCRN = numbers.view(groups, part.pieces, repeats, -1)
        for own, gathered in part.in_row(place_TGR, place_GCRN.permute(1, 3, 0, 2), 0, part.start):
            own.copy_(gathered)
        count += len(numbers)
    return Layout(tiles, groups, repeats, torch.cat(order), place_TGR.flatten())


def plan_tiles(
    boundaries: tuple[int, ...], window: int | None, tile: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tile, ...]:
    """Cut one flat row into tiles.

    boundaries: cumulative document lengths, first 0. window: a query sees at most this many tokens, itself included.
    tile: queries of a tile of a document that stands alone.
    """
    documents = list(pairwise(boundaries))
    tiles = [
        _short_tile(list(run), window, dtype, device) for is_short, run in groupby(documents, key=_is_short) if is_short
    ]
    kept_documents = [
        document for document in documents if not _is_short(document) and document[1] - document[0] <= KEPT_TOKENS
    ]
    # A few large products are enough, and their scores are many.
    alone = [[document] for document in documents if document[1] - document[0] > KEPT_TOKENS]
    for group in [kept_documents, *alone]:
        rows = tile if len(group) == 1 else min(tile, TILE_TOKENS)
        firsts_of: dict[Document, list[int]] = {}
        for first, end in group:
            for start in range(0, end - first, rows):
                firsts_of.setdefault((start, min(start + rows, end - first)), []).append(first)
        for (start, stop), firsts in firsts_of.items():
            key_start = 0 if window is None else max(0, start - window + 1)
            tiles.append(
                Tile(tuple(firsts), start, stop, key_start, _hidden((start, stop), key_start, window, dtype, device))
            )
    return tuple(tiles)


def _is_short(document: Document) -> bool:
    return document[1] - document[0] <= SHORT_TOKENS


def _short_tile(documents: Sequence[Document], window: int | None, dtype: torch.dtype, device: torch.device) -> Tile:
    """Pack a run of short documents into pieces of one length, which are one tile."""
    first, tokens = documents[0][0], documents[-1][1] - documents[0][0]
    pieces = _packed(documents)
    length = max(_length(piece) for piece in pieces)
    order: list[int] = []
    place_of: dict[int, int] = {}
    for piece in pieces:
        own = [token - first for document in piece for token in range(*document)]
        place_of |= {token: len(order) + number for number, token in enumerate(own)}
        order += own + own[:1] * (length - len(own))
    hidden = torch.stack([_hidden_in_piece(piece, length, window, dtype, device) for piece in pieces]).unsqueeze(1)
    rearranged = None
    if order != list(range(tokens)):
        places = [place_of[token] for token in range(tokens)]
        rearranged = Rearranged(
            *(torch.tensor(indices, dtype=torch.int64, device=device) for indices in (order, places))
        )
    return Tile(tuple(first + length * number for number in range(len(pieces))), 0, length, 0, hidden, rearranged)


def _packed(documents: Sequence[Document]) -> list[list[Document]]:
    """Put documents into pieces first-fit; documents of a piece, and pieces, keep the row's order."""
    lengths = np.array([stop - start for start, stop in documents], dtype=np.int64)
    packs = plan_packs(lengths, max(LEAST_PIECE, int(lengths.max())), "first_fit", None)
    return [[documents[index] for index in pack] for pack in packs]


def _length(documents: Sequence[Document]) -> int:
    return sum(stop - start for start, stop in documents)


def _hidden_in_piece(
    documents: Sequence[Document], length: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is hidden in a piece of several documents, [L, L].

    A gap sees itself alone: what it gives and gets is dropped with it.
    """
    own = _length(documents)
    hidden = torch.full((length, length), float("-inf"), dtype=dtype, device=device)
    marks = tuple(accumulate((stop - start for start, stop in documents), initial=0))
    hidden[:own, :own] = _hidden(marks, 0, window, dtype, device)
    hidden.diagonal()[own:] = 0
    return hidden


def _hidden(
    marks: tuple[int, ...], key_start: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return 0 where a query may look and -inf elsewhere, for the queries marks[0] to marks[-1].

    Documents begin at each mark.
    It has as many columns as need hiding, counted from the right: the diagonal block, or all M keys under a window.
    """
    column_start = marks[0] if window is None else key_start
    query_N = torch.arange(marks[0], marks[-1], device=device)
    key_M = torch.arange(column_start, marks[-1], device=device)
    document = torch.tensor(marks[1:], device=device)
    same = (
        torch.bucketize(query_N, document, right=True)[:, None] == torch.bucketize(key_M, document, right=True)[None, :]
    )
    distance = query_N[:, None] - key_M[None, :]
    seen = same & (distance >= 0)
    if window is not None:
        seen &= distance < window
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
