"""Tokenized rows made in parts, each by a job of its own, and joined into the set that a training finds.

Blocks of rows are dealt to the parts in turn, so no job needs to know how many rows there are. Every job reads all
records, which is cheap, and tokenizes its own. Joining adds the results of all parts in the order of the rows, as one
job would have: the joined set is the same byte for byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmtune import durable
from llmtune.data.dataset.cache import build_set, open_set, set_folder
from llmtune.data.dataset.row_result import RowResult
from llmtune.data.dataset.store import RowStore
from llmtune.data.reading.data_file import DataFile

__all__ = ["Part", "build_part"]

T = TypeVar("T")

BLOCK_ROWS = 256
"""Rows of a block. Another number would join parts of before in a wrong order; the code's digest parts them."""


@dataclass(frozen=True)
class Part:
    """One of `count` equal shares of the rows."""

    number: int
    """From 1."""
    count: int

    def of(self, records: Iterable[T]) -> Iterator[T]:
        """Give the records of this part among all of them.

        >>> part = Part(2, 2)
        >>> list(part.of(range(600)))[0], len(list(part.of(range(600))))
        (256, 256)
        """
        return (record for row, record in enumerate(records) if row // BLOCK_ROWS % self.count == self.number - 1)


def build_part(
    folder: Path, key: str, files: Sequence[DataFile], results: Callable[[], Iterable[RowResult]], part: Part
) -> list[int]:
    """Build a part of the set of `key` below `folder` from `results()`, and join all parts where none is missing.

    Returns the numbers of those that are. A part that is there, or the whole set, is not built again. Raises
    MachineError where the folder cannot be used.
    """
    whole, parts = set_folder(folder, key), folder / "parts" / key[:40]
    if open_set(whole, files) is not None:
        return []
    own = parts / _name(part)
    if open_set(own, files) is None:
        durable.make_folder(parts)
        build_set(own, key, results())
    with durable.waiting_lock(folder / f".tokenizing-{key[0]}"):  # the last two parts may end together
        if open_set(whole, files) is not None:
            return []
        found = {
            number: open_set(parts / _name(Part(number, part.count)), files) for number in range(1, part.count + 1)
        }
        missing = [number for number, store in found.items() if store is None]
        if not missing:
            durable.make_folder(whole.parent)
            build_set(whole, key, _in_turn([store for store in found.values() if store is not None]))
            del found  # their locks keep the folders
            durable.remove_tree(parts)
        return missing


def _name(part: Part) -> str:
    return f"{part.number}-of-{part.count}"


def _in_turn(parts: Sequence[RowStore]) -> Iterator[RowResult]:
    """Yield the results of all parts in the order of the rows."""
    for results in itertools.cycle([part.results() for part in parts]):
        block = list(itertools.islice(results, BLOCK_ROWS))
        yield from block
        if len(block) < BLOCK_ROWS:  # the last one, or the end after a full one
            return
