"""Loops over the chunks of a row: which chunks run, and the sum of their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

__all__ = ["SelectChunks", "accumulate_float32", "every_chunk"]

Chunk = TypeVar("Chunk")


class SelectChunks(Protocol):
    """Chooses the chunks of a loop that run; training runs `every_chunk`, a memory plan a few that stand for all."""

    def __call__(self, chunks: Sequence[Chunk], size: Callable[[Chunk], int] | None = None) -> Sequence[Chunk]:
        """Return the chunks to run, in order. size: numbers a chunk makes, for chunks of very different sizes."""
        ...


def every_chunk(chunks: Sequence[Chunk], size: Callable[[Chunk], int] | None = None) -> Sequence[Chunk]:  # noqa: ARG001
    """Select all chunks.

    >>> every_chunk(range(8))
    range(0, 8)
    """
    return chunks


def accumulate_float32(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Add one chunk's result to the sum of earlier ones, of the same shape, in float32; None while there is none.

    total <- total + part: sums of many 16-bit parts would lose the small ones (arXiv:1710.03740).
    """
    if part is None:
        return total
    # In place: a second float32 sum would double what a trained head's gradient takes.
    return part.float() if total is None else total.add_(part)
