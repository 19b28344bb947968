"""Examples and the status of rows as flat arrays, in memory or memory-mapped: the cache, and the input of training.

Shapes: T tokens of one example, N examples, R rows. One file of 32-bit words holds every example as its ids followed by
its runs of equal weight (start, length, bits of the float32 weight), so that masks cost a few words an example instead
of one a token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from llmtune.config.schema import SourceConfig
from llmtune.config.sources import source_names
from llmtune.data.dataset.row_result import STATUSES, Reason, RowResult
from llmtune.data.example import SIDES, Example, Side, example_digest, set_digest
from llmtune.data.reading.readers import Numbering, source_name
from llmtune.data.rendering.row_warnings import RowWarning

__all__ = ["JoinedExamples", "MappedExamples", "RowStore", "StoreBuilder", "Texts"]


ROW = np.dtype(
    [
        ("file", "<i4"),
        ("number", "<i8"),
        ("status", "<i4"),
        ("reason", "<i4"),
        ("warnings", "<i4"),
        ("tokens", "<i4"),
        ("tokens_lost", "<i4"),
        ("examples", "<i4"),
        ("answers", "<i4"),
        ("trained_answers", "<i4"),
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
        ("side", "<i4"),
        ("label", "<i4"),
        ("margin", "<f8"),
        ("loss_weight", "<f8"),
        ("digest", "<u8", 2),
    ]
)
# The same layouts for `struct`, which packs single rows many times faster than NumPy.
_ROW_BYTES = struct.Struct("<iqiiiiiiii16s16s")
_EXAMPLE_BYTES = struct.Struct("<qqiiiidd16s")
assert (_ROW_BYTES.size, _EXAMPLE_BYTES.size) == (ROW.itemsize, EXAMPLE.itemsize)


WRONG_SIDES = (SIDES.index("rejected"), SIDES.index("undesirable"))


class Texts(TypedDict):
    """The texts that the tables refer to by number; JSON-able. `Reason` and `RowWarning` are lists of their fields."""

    reasons: list[list[str | bool | None]]
    notes: list[list[list[str]]]
    classes: list[str]


class StoreBuilder:
    """Collects the results of rows; the words of their examples are returned at once, to be written or kept."""

    def __init__(self) -> None:
        self._rows = bytearray()
        self._examples = bytearray()
        self._row_count = 0
        self._words = 0
        self._reasons: dict[Reason, int] = {}
        self._warnings: dict[tuple[RowWarning, ...], int] = {(): 0}
        self._labels: dict[str, int] = {}

    def add(self, result: RowResult) -> bytes:
        """Add one row and return the words of its examples."""
        reason = -1 if result.reason is None else self._reasons.setdefault(result.reason, len(self._reasons))
        warnings = self._warnings.setdefault(result.warnings, len(self._warnings))
        numbers = (result.file_index, result.number, STATUSES.index(result.status), reason, warnings)
        amounts = (result.tokens, result.tokens_lost, len(result.pieces), result.answers, result.trained_answers)
        self._rows += _ROW_BYTES.pack(*numbers, *amounts, result.row_digest, result.full_digest)
        words = bytearray()
        label = -1
        if result.label is not None and result.pieces:
            label = self._labels.setdefault(result.label, len(self._labels))
        for index, (ids, weights) in enumerate(result.pieces):
            side = result.sides[index] if result.sides else None
            runs = _runs(weights)
            words += ids.astype("<i4", copy=False).tobytes() + runs.tobytes()
            self._words += len(ids) + runs.size
            loss_weight = float(weights.sum(dtype=np.float64))
            digest = example_digest(ids, weights, side, label=result.label, margin=result.margin)
            side_number = -1 if side is None else SIDES.index(side)
            place = (self._row_count, self._words, len(ids), len(runs))
            self._examples += _EXAMPLE_BYTES.pack(*place, side_number, label, result.margin, loss_weight, digest)
        self._row_count += 1
        return bytes(words)

    def tables(self) -> dict[str, bytes]:
        """The finished tables as bytes, by name."""
        return {"rows": bytes(self._rows), "examples": bytes(self._examples)}

    def texts(self) -> Texts:
        """Reasons and warnings, which the tables refer to by number."""
        return {
            "reasons": [list(reason) for reason in self._reasons],
            "notes": [[list(warning) for warning in warnings] for warnings in self._warnings],
            "classes": list(self._labels),
        }


def _runs(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Runs of equal non-zero weight of weights float32 [T], int32 [runs, 3]: start, length, bits of the weight."""
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
    """Every row of one side (train or eval) with its status, and every example, by the current names of the files."""

    labels: tuple[str, ...]
    numberings: tuple[Numbering, ...]
    sources: tuple[int, ...]
    """The place of each file's source in the config, from 0."""
    source_configs: Mapping[int, SourceConfig]
    """The sources by their place."""
    rows: npt.NDArray[np.void]
    """`ROW` table [R]."""
    examples: npt.NDArray[np.void]
    """`EXAMPLE` table [N]."""
    words: npt.NDArray[np.int32]
    reasons: tuple[Reason, ...]
    warnings: tuple[tuple[RowWarning, ...], ...]
    classes: tuple[str, ...] = ()
    """Labels of the rows, to which the table of examples refers by number."""
    folder: Path | None = None
    """The cache folder; None: in memory."""
    lock: object = None
    """A lock that keeps other processes from deleting the cached files as long as this store lives."""

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, row: int) -> str:
        """`file:line` or `file[index]` of a row; the file alone where reading it failed before any row."""
        file, number = int(self.rows["file"][row]), int(self.rows["number"][row])
        return self.labels[file] if number < 0 else source_name(self.labels[file], self.numberings[file], number)

    @property
    def source_names(self) -> dict[int, str]:
        """A name for each source, by its place in the config."""
        return dict(zip(self.source_configs, source_names(list(self.source_configs.values())), strict=True))

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
            self.source_of_example(index),
            np.array(self.words[start : start + tokens], dtype=np.int32),
            weights,
            self.side(index),
            self.label(index),
            float(entry["margin"]),
        )

    def results(self) -> Iterator[RowResult]:
        """Every row as it was added to the store's builder, in order."""
        ends = np.searchsorted(self.examples["row"], np.arange(len(self)), side="right").tolist()
        for row, (begin, end) in zip(self.rows, pairwise([0, *ends]), strict=True):
            examples = [self.example(index) for index in range(begin, end)]
            yield RowResult(
                file_index=int(row["file"]),
                number=int(row["number"]),
                status=STATUSES[int(row["status"])],
                reason=None if row["reason"] < 0 else self.reasons[int(row["reason"])],
                warnings=self.warnings[int(row["warnings"])],
                tokens=int(row["tokens"]),
                tokens_lost=int(row["tokens_lost"]),
                pieces=tuple((example.input_ids, example.weights) for example in examples),
                row_digest=row["row_digest"].tobytes(),
                full_digest=row["full_digest"].tobytes(),
                answers=int(row["answers"]),
                trained_answers=int(row["trained_answers"]),
                sides=tuple(example.side for example in examples if example.side is not None),
                label=examples[0].label if examples else None,
                margin=examples[0].margin if examples else 0.0,
            )

    def side(self, index: int) -> Side | None:
        """The side of one example."""
        number = int(self.examples["side"][index])
        return None if number < 0 else SIDES[number]

    def label(self, index: int) -> str | None:
        """The label of one example."""
        number = int(self.examples["label"][index])
        return None if number < 0 else self.classes[number]

    def source_of_example(self, index: int) -> str:
        """The source of an example's row; pieces of a split row add `#1`, `#2` and so on, sides of a pair a name."""
        row = int(self.examples["row"][index])
        source = self.source(row)
        if int(self.rows["examples"][row]) == 1:
            return source
        side = self.side(index)
        if side is not None:
            return f"{source}#{side}"
        first = int(np.searchsorted(self.examples["row"], row))
        return f"{source}#{index - first + 1}"


class MappedExamples:
    """An `ExampleSet` over a store: a selection int64 [N] of its examples, read only when indexed."""

    def __init__(self, store: RowStore, selection: npt.NDArray[np.int64]) -> None:
        self.store = store
        self.selection = selection

    @classmethod
    def of_rows(cls, store: RowStore, rows: npt.NDArray[np.int64]) -> MappedExamples:
        """The examples of these rows, int64 [rows], in the order of the store."""
        selected = np.zeros(len(store), dtype=bool)
        selected[rows] = True
        return cls(store, np.flatnonzero(selected[store.examples["row"]]))

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, index: int) -> Example:
        return self.store.example(int(self.selection[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def row_count(self) -> int:
        """How many rows the examples are of: a row has several where answers are compared, or each turn is one."""
        return len(np.unique(self.store.examples["row"][self.selection]))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 [N]."""
        return self.store.examples["tokens"][self.selection].astype(np.int64)

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Sum of weights of each example, float64 [N]: loss_weight_n = sum_t weight_nt."""
        return self.store.examples["loss_weight"][self.selection].astype(np.float64)

    @property
    def sides(self) -> npt.NDArray[np.int8]:
        """The side of each example by its index in `SIDES`, -1 for none; int8 [N]."""
        return self.store.examples["side"][self.selection].astype(np.int8)

    @property
    def labels(self) -> list[str | None]:
        """The label of each example, in order."""
        return [self.store.label(int(index)) for index in self.selection]

    @property
    def margins(self) -> npt.NDArray[np.float64]:
        """The margin of each example, float64 [N]."""
        return self.store.examples["margin"][self.selection].astype(np.float64)

    @property
    def digest(self) -> str:
        """sha256 over all that trains, in order."""
        return set_digest(self.digests())

    @property
    def sources(self) -> npt.NDArray[np.int64]:
        """Place in the config of the source of each example, int64 [N]."""
        file_of_example = self.store.rows["file"][self.store.examples["row"][self.selection]]
        return np.asarray(self.store.sources, dtype=np.int64)[file_of_example]

    def by_source(self) -> dict[str, MappedExamples]:
        """The examples of each source by its name, in the order of the config; nothing where all are of one source."""
        return self.named_sources() if len(np.unique(self.sources)) > 1 else {}

    def named_sources(self) -> dict[str, MappedExamples]:
        """The examples of each source by its name, in the order of the config."""
        sources, names = self.sources, self.store.source_names
        return {
            names[int(place)]: MappedExamples(self.store, self.selection[sources == place])
            for place in np.unique(sources)
        }

    def right_answers(self) -> MappedExamples:
        """The examples without a side, the chosen and the desirable ones."""
        return MappedExamples(self.store, self.selection[~np.isin(self.sides, WRONG_SIDES)])

    def digests(self) -> Iterator[bytes]:
        """`example_digest` of every example, in order."""
        digests = self.store.examples["digest"]
        return (digests[index].tobytes() for index in self.selection)


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

    def by_source(self) -> dict[str, MappedExamples | JoinedExamples]:
        """The examples of each source by its name, in the order of the parts."""
        found: dict[str, list[MappedExamples]] = {}
        for part in self.parts:
            for name, examples in part.named_sources().items():
                found.setdefault(name, []).append(examples)
        return {name: JoinedExamples(sets) if len(sets) > 1 else sets[0] for name, sets in found.items()}

    def right_answers(self) -> JoinedExamples:
        """The examples without a side, the chosen and the desirable ones."""
        return JoinedExamples([part.right_answers() for part in self.parts])

    @property
    def row_count(self) -> int:
        """How many rows the examples are of."""
        return sum(part.row_count for part in self.parts)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 [N]."""
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Sum of weights of each example, float64 [N]: loss_weight_n = sum_t weight_nt."""
        return np.concatenate([part.loss_weights for part in self.parts])

    @property
    def sides(self) -> npt.NDArray[np.int8]:
        """The side of each example by its index in `SIDES`, -1 for none; int8 [N]."""
        return np.concatenate([part.sides for part in self.parts])

    @property
    def labels(self) -> list[str | None]:
        """The label of each example, in order."""
        return [label for part in self.parts for label in part.labels]

    @property
    def margins(self) -> npt.NDArray[np.float64]:
        """The margin of each example, float64 [N]."""
        return np.concatenate([part.margins for part in self.parts])

    @property
    def digest(self) -> str:
        """sha256 over all that trains, in order."""
        return set_digest(digest for part in self.parts for digest in part.digests())
