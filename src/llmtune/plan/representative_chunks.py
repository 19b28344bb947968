"""A few chunks of a long row that hold as much memory as all of them: what a plan runs of the engine's loops.

Chunks that follow one another differ by a token or two, and each frees what it held before the next one. So a row of
342,000 tokens is planned by as many operators as one of 8,000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["representative_chunks"]

Chunk = TypeVar("Chunk")

FIRST, LAST = 2, 3
"""Chunks that run at both ends. The first has nothing before it, the second has. At the end stands the shorter one, or
the longest run of longer ones (up to three) of an even cut, whose chunks differ by one token."""


def representative_chunks(chunks: Sequence[Chunk], size: Callable[[Chunk], int] | None = None) -> Sequence[Chunk]:
    """Select the first two chunks and the last three.

    size: numbers a chunk makes, where chunks differ more than that: those around the two neighbours with the largest
    sum are selected too, because a chunk's tensors are still alive when the next one's are made.

    >>> representative_chunks(range(8))
    [0, 1, 5, 6, 7]
    """
    count = len(chunks)
    if count <= FIRST + LAST:
        return chunks
    numbers = {*range(FIRST), *range(count - LAST, count)}
    if size is not None:
        sizes = [size(chunk) for chunk in chunks]
        largest = max(range(1, count), key=lambda number: sizes[number - 1] + sizes[number])
        numbers |= {largest - 1, largest, min(largest + 1, count - 1)}
    return [chunks[number] for number in sorted(numbers)]
