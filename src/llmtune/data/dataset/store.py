"""Examples and row fates as flat arrays, in memory or memory-mapped: what is cached, and what training reads.

Shapes: T tokens of one example, N examples, R rows. One file of 32-bit words holds every example as its ids followed by
its runs of equal weight (start, length, bits of the float32 weight), so that masks cost a few words an example instead
of one a token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.data.example import Example, example_digest, set_digest
from llmtune.data.reading.readers import Numbering, source_of
from llmtune.data.rendering.row_warnings import RowWarning
from llmtune.data.rows.row_result import Reason, RowResult

__all__ = ["FATES", "JoinedExamples", "MappedExamples", "RowStore", "StoreBuilder"]

FATES = ("used", "cut", "dropped", "duplicate", "held_out", "bad")

ROW = np.dtype(
    [
        ("file", "<i4"),
        ("number", "<i8"),
        ("fate", "<i4"),
        ("reason", "<i4"),
        ("notes", "<i4"),
        ("tokens", "<i4"),
        ("tokens_lost", "<i4"),
        ("examples", "<i4"),
        ("row_digest", "<u8", 2),
        ("full_digest", "<u8", 2),
    ]
)
EXAMPLE = np.dtype(
    [
        ("row", "<i8"),
        ("words_end", "<i8"),
        ("tokens", "<i4"),
        ("runs", "<i4"),
        ("loss_weight", "<f8"),
        ("digest", "<u8", 2),
    ]
)
_ROW_BYTES = struct.Struct("<iqiiiiii16s16s")
_EXAMPLE_BYTES = struct.Struct("<qqiid16s")
assert (_ROW_BYTES.size, _EXAMPLE_BYTES.size) == (ROW.itemsize, EXAMPLE.itemsize)


class StoreBuilder:
    """Collects outcomes; the words of their examples are handed back at once, to be written or kept."""

    def __init__(self) -> None:
        self._rows = bytearray()
        self._examples = bytearray()
        self._row_count = 0
        self._words = 0
        self._reasons: dict[Reason, int] = {}
        self._notes: dict[tuple[RowWarning, ...], int] = {(): 0}

    def add(self, outcome: RowResult) -> bytes:
        """Take in one row and return the words of its examples."""
        reason = -1 if outcome.reason is None else self._reasons.setdefault(outcome.reason, len(self._reasons))
        notes = self._notes.setdefault(outcome.notes, len(self._notes))
        numbers = (outcome.file_index, outcome.number, FATES.index(outcome.fate), reason, notes)
        amounts = (outcome.tokens, outcome.tokens_lost, len(outcome.pieces))
        self._rows += _ROW_BYTES.pack(*numbers, *amounts, outcome.row_digest, outcome.full_digest)
        words = bytearray()
        for ids, weights in outcome.pieces:
            runs = _runs(weights)
            words += ids.astype("<i4", copy=False).tobytes() + runs.tobytes()
            self._words += len(ids) + runs.size
            loss_weight = float(weights.sum(dtype=np.float64))
            digest = example_digest(ids, weights)
            self._examples += _EXAMPLE_BYTES.pack(
                self._row_count, self._words, len(ids), len(runs), loss_weight, digest
            )
        self._row_count += 1
        return bytes(words)

    def tables(self) -> dict[str, bytes]:
        """The finished tables as bytes, by name."""
        return {"rows": bytes(self._rows), "examples": bytes(self._examples)}

    def about(self) -> dict[str, Any]:
        """Reasons and notes, which the tables name by number; JSON-able."""
        return {
            "reasons": [list(reason) for reason in self._reasons],
            "notes": [[list(note) for note in notes] for notes in self._notes],
        }


def _runs(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Runs of equal non-zero weight, int32 [runs, 3]: start, length, bits of the weight."""
    borders = np.flatnonzero(np.diff(weights, prepend=np.float32(0)) != 0)
    if len(weights) and weights[0] != 0 and (not len(borders) or borders[0] != 0):
        borders = np.concatenate([[0], borders])
    ends = np.append(borders[1:], len(weights))
    starts, lengths = borders, ends - borders
    trained = weights[starts] != 0
    values = weights[starts].astype("<f4").view("<i4")
    return np.stack([starts[trained], lengths[trained], values[trained]], axis=1).astype("<i4")


@dataclass(frozen=True)
class RowStore:
    """Every row of one side (train or eval) with its fate, and every example, under the names its files have today."""

    labels: tuple[str, ...]
    numberings: tuple[Numbering, ...]
    source_paths: tuple[str, ...]
    """What the config calls the source each file belongs to."""
    rows: np.ndarray[Any, Any]
    """`ROW` table [R]."""
    examples: np.ndarray[Any, Any]
    """`EXAMPLE` table [N]."""
    words: npt.NDArray[np.int32]
    reasons: tuple[Reason, ...]
    notes: tuple[tuple[RowWarning, ...], ...]
    folder: Path | None = None
    """Where it is cached; None: in memory."""
    hold: object = None
    """Keeps the cached files from being deleted as long as this store lives."""

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, row: int) -> str:
        """`file:line` or `file[index]` of a row; the file alone where reading it failed before any row."""
        file, number = int(self.rows["file"][row]), int(self.rows["number"][row])
        return self.labels[file] if number < 0 else source_of(self.labels[file], self.numberings[file], number)

    def example(self, index: int) -> Example:
        """One example with its weights unpacked."""
        entry = self.examples[index]
        tokens, runs, end = int(entry["tokens"]), int(entry["runs"]), int(entry["words_end"])
        start = end - tokens - 3 * runs
        weights = np.zeros(tokens, dtype=np.float32)
        packed = np.asarray(self.words[start + tokens : end]).reshape(runs, 3)
        for (first, length, _), weight in zip(packed.tolist(), packed[:, 2].copy().view("<f4"), strict=True):
            weights[first : first + length] = weight
        return Example(
            self.source_of_example(index), np.array(self.words[start : start + tokens], dtype=np.int32), weights
        )

    def source_of_example(self, index: int) -> str:
        """The source of an example's row; pieces of a split row add `#1`, `#2` and so on."""
        row = int(self.examples["row"][index])
        source = self.source(row)
        if int(self.rows["examples"][row]) == 1:
            return source
        first = int(np.searchsorted(self.examples["row"], row))
        return f"{source}#{index - first + 1}"


class MappedExamples:
    """An `ExampleSet` over a store: some of its examples, in an order. Nothing is read before it is asked for."""

    def __init__(self, store: RowStore, selection: npt.NDArray[np.int64]) -> None:
        self.store = store
        self.selection = selection

    @classmethod
    def of_rows(cls, store: RowStore, rows: npt.NDArray[np.int64]) -> MappedExamples:
        """The examples of these rows, in the order of the store."""
        wanted = np.zeros(len(store), dtype=bool)
        wanted[rows] = True
        return cls(store, np.flatnonzero(wanted[store.examples["row"]]))

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, index: int) -> Example:
        return self.store.example(int(self.selection[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 [N]."""
        return self.store.examples["tokens"][self.selection].astype(np.int64)

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Sum of weights of each example, float64 [N]."""
        return self.store.examples["loss_weight"][self.selection].astype(np.float64)

    @property
    def digest(self) -> str:
        """sha256 over all ids and weights in order."""
        return set_digest(self.digests())

    def digests(self) -> Iterator[bytes]:
        """`example_digest` of every example, in order."""
        digests = self.store.examples["digest"]
        return (digests[one].tobytes() for one in self.selection)


@dataclass(frozen=True)
class JoinedExamples:
    """Several example sets, one after another, as one."""

    parts: Sequence[MappedExamples]
    _ends: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum([len(part) for part in self.parts]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - int(self._ends[part]) + len(self.parts[part])]

    def __iter__(self) -> Iterator[Example]:
        return (example for part in self.parts for example in part)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 [N]."""
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Sum of weights of each example, float64 [N]."""
        return np.concatenate([part.loss_weights for part in self.parts])

    @property
    def digest(self) -> str:
        """sha256 over all ids and weights in order."""
        return set_digest(one for part in self.parts for one in part.digests())
