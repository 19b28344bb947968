"""The `split` of a source: a name, a slice of its rows, or several of them joined by `+`, as `datasets` writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from llmtune.data.reading.data_file import DataFile

__all__ = ["SplitPart", "parse_split", "slice_files"]

_PART = re.compile(r"\s*([\w.-]*)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")


class SplitPart(NamedTuple):
    """One part of a `split`: the name of a split (empty: the default one) and the bounds of its rows as written."""

    name: str
    first: str | None
    last: str | None

    @property
    def is_whole(self) -> bool:
        """Whether every row of the split is taken."""
        return self.first is None and self.last is None

    def bounds(self, total: int) -> tuple[int, int]:
        """The rows [begin, end) of `total` that are taken; per cent are rounded to the closest row, as in `datasets`.

        >>> SplitPart("train", None, "10%").bounds(15), SplitPart("train", "-3", None).bounds(15)
        ((0, 2), (12, 15))
        """
        begin, end = _row(self.first, 0, total), _row(self.last, total, total)
        return begin, max(begin, end)


def _row(bound: str | None, default: int, total: int) -> int:
    if bound is None:
        return default
    row = round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
    return min(max(total + row, 0) if row < 0 else row, total)


def parse_split(split: str) -> list[SplitPart] | None:
    """The parts of a `split`, or None where it is none.

    >>> parse_split("train[:1%]+test")
    [SplitPart(name='train', first=None, last='1%'), SplitPart(name='test', first=None, last=None)]
    >>> parse_split("train[1]"), parse_split("")
    (None, None)
    """
    matches = [_PART.fullmatch(part) for part in split.split("+")]
    if any(match is None or not match.group().strip() for match in matches):
        return None
    return [SplitPart(*match.groups()) for match in matches if match is not None]


def slice_files(files: Sequence[DataFile], part: SplitPart) -> list[DataFile]:
    """The files with the rows that a part takes of all their rows together; a file without one is left out."""
    if part.is_whole:
        return list(files)
    counts = [file.count() for file in files]
    begin, end = part.bounds(sum(counts))
    sliced, before = [], 0
    for file, count in zip(files, counts, strict=True):
        first, last = max(begin - before, 0), min(end - before, count)
        if first < last:
            sliced.append(replace(file, rows=(first, last)))
        before += count
    return sliced
