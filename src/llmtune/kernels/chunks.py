"""What of a loop over alike pieces a tensor without numbers has to go through.

A plan runs the engine on stand-ins, which have shape and type and no numbers, to count what is alive. Tiles, chunks and
runs of queries that follow one another then differ in nothing but a little in size: what a few of them hold is what all
of them hold, and a row of 342,000 tokens is planned as soon as one of 8,000. Real tensors go through every piece;
nothing can switch that off. What the pieces of such a loop add up is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["added", "telling_pieces"]

Piece = TypeVar("Piece")

FIRST, LAST = 2, 3
"""Pieces of a stand-in that are gone through: the first, before which nothing was made, and the one that follows it;
and three at the end, where a shorter one may stand. Pieces of an even cut differ by one token, and the longest run of
longer ones (up to three) stands there."""


def telling_pieces(pieces: Sequence[Piece], x: Tensor, size: Callable[[Piece], int] | None = None) -> Sequence[Piece]:
    """All pieces in order, for a real tensor `x`.

    For a stand-in only the first two and the last three, which hold as much as any other.

    size: what a piece holds, where they differ more than that: those about the place where two that follow each other
    hold most stay too.

    >>> import torch
    >>> telling_pieces(range(8), torch.zeros(1))
    range(0, 8)
    """
    count = len(pieces)
    if count <= FIRST + LAST or not isinstance(x, FakeTensor):
        return pieces
    told = {*range(FIRST), *range(count - LAST, count)}
    if size is not None:
        sizes = [size(piece) for piece in pieces]
        most = max(range(1, count), key=lambda number: sizes[number - 1] + sizes[number])
        told |= {most - 1, most, min(most + 1, count - 1)}
    return [pieces[number] for number in sorted(told)]


def added(total: Tensor | None, one: Tensor | None) -> Tensor | None:
    """Add what one piece gives to what the earlier ones gave, in float32; None where no piece has given anything."""
    if one is None:
        return total
    return one.float() if total is None else total.add_(one)
