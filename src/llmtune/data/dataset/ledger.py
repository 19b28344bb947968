"""What became of every row (Q4): input = used + cut + dropped + duplicate + held out + bad, by number, with reasons.

Each row has exactly one fate. Where several would fit, the first of these counts: bad, dropped, duplicate, held out,
cut, used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.data.dataset.store import FATES, RowStore
from llmtune.data.rendering.row_warnings import RowWarning
from llmtune.data.rows.row_result import Reason

__all__ = ["REASONS_SHOWN", "Ledger", "LedgerPart"]

REASONS_SHOWN = 20
"""Different reasons listed in a summary; the rest are counted together."""

_OTHER_REASONS = "other reasons"
_INDEX = re.compile(r"\[\d+\]")


@dataclass
class LedgerPart:
    """The rows of one side.

    `fates` starts as what each row is on its own and changes when rows are compared or held out.
    """

    name: str
    store: RowStore
    fates: npt.NDArray[np.int8] = field(init=False)
    reasons: dict[int, Reason] = field(default_factory=dict)
    """Reasons that come from other rows."""
    others: dict[int, str] = field(default_factory=dict)
    """The other row, where there is one."""
    notes: dict[int, RowWarning] = field(default_factory=dict)
    """Notes that come from other rows."""

    def __post_init__(self) -> None:
        self.fates = self.store.rows["fate"].astype(np.int8)

    def rows_that_are(self, *fates: str) -> npt.NDArray[np.int64]:
        """Numbers of the rows with one of these fates, ascending."""
        return np.flatnonzero(np.isin(self.fates, [FATES.index(fate) for fate in fates]))

    def set_fate(self, row: int, fate: str, reason: Reason | None, other: str | None = None) -> None:
        """Give a row its final fate."""
        self.fates[row] = FATES.index(fate)
        if reason is not None:
            self.reasons[row] = reason
        if other is not None:
            self.others[row] = other

    def reason(self, row: int) -> Reason | None:
        """Why the row is not used whole."""
        if row in self.reasons:
            return self.reasons[row]
        number = int(self.store.rows["reason"][row])
        return self.store.reasons[number] if number >= 0 else None

    def notes_of(self, row: int) -> tuple[RowWarning, ...]:
        """What has to be said about a row whatever its fate."""
        own = self.store.notes[int(self.store.rows["notes"][row])]
        return (*own, self.notes[row]) if row in self.notes else own

    def entry(self, row: int) -> dict[str, Any]:
        """One row as an object of ledger.jsonl."""
        fate, reason = FATES[self.fates[row]], self.reason(row)
        entry: dict[str, Any] = {"part": self.name, "source": self.store.source(row), "fate": fate}
        if reason is not None:
            entry["reason"] = reason.what
            entry.update(
                {key: value for key, value in (("field", reason.field), ("fix", reason.fix)) if value is not None}
            )
        if row in self.others:
            entry["other"] = self.others[row]
        tokens, lost = int(self.store.rows["tokens"][row]), int(self.store.rows["tokens_lost"][row])
        if fate in ("dropped", "duplicate"):
            lost = tokens
        entry.update({"tokens": tokens, "tokens_lost": lost})
        if self.notes_of(row):
            entry["notes"] = [note.text for note in self.notes_of(row)]
        return entry

    def affected(self) -> Iterator[int]:
        """Rows that are not simply used, ascending."""
        noted = np.isin(self.store.rows["notes"], [index for index, notes in enumerate(self.store.notes) if notes])
        noted[list(self.notes)] = True
        yield from (int(row) for row in np.flatnonzero(noted | (self.fates != FATES.index("used"))))

    def rows_at(self, place: str) -> list[int]:
        """Numbers of the rows at `file:line` or `file[index]`, where `file` may be the end of a longer path."""
        rows: list[int] = []
        for index, (label, numbering) in enumerate(zip(self.store.labels, self.store.numberings, strict=True)):
            name, _, number = place.removesuffix("]").rpartition(":" if numbering == "line" else "[")
            if number.isdecimal() and name and (label == name or label.endswith(f"/{name}")):
                rows += np.flatnonzero(
                    (self.store.rows["file"] == index) & (self.store.rows["number"] == int(number))
                ).tolist()
        return rows

    def balance(self) -> dict[str, int]:
        """Rows by fate, and `input`, which is counted by itself."""
        counts = np.bincount(self.fates, minlength=len(FATES))
        return {"input": len(self.store), **{fate: int(count) for fate, count in zip(FATES, counts, strict=True)}}

    def summary(self) -> dict[str, Any]:
        """The balance with reasons, notes and tokens; JSON-able and short."""
        reasons: dict[str, Counter[str]] = {}
        notes: Counter[str] = Counter()
        lost = 0
        for row in self.affected():
            reason, fate = self.reason(row), FATES[self.fates[row]]
            notes.update({note.code for note in self.notes_of(row)})
            if reason is not None and fate != "used":
                counter = reasons.setdefault(fate, Counter())
                what = f"{_INDEX.sub('[]', reason.field)}: {reason.what}" if reason.field else reason.what
                counter[what if what in counter or len(counter) < REASONS_SHOWN else _OTHER_REASONS] += 1
            if fate == "cut":
                lost += int(self.store.rows["tokens_lost"][row])
        kept = np.isin(self.store.examples["row"], self.rows_that_are("used", "cut"))
        examples = self.store.examples[kept]
        return {
            **self.balance(),
            "examples": len(examples),
            "tokens": int(examples["tokens"].sum(dtype=np.int64)),
            "loss_tokens": float(examples["loss_weight"].sum()),
            "tokens_cut": lost,
            "reasons": {fate: dict(counter.most_common()) for fate, counter in reasons.items()},
            "notes": dict(notes.most_common()),
        }


class Ledger:
    """The fate of every row of a run, for both sides."""

    def __init__(self, parts: Sequence[LedgerPart]) -> None:
        self.parts = tuple(parts)

    @property
    def entries(self) -> Iterator[dict[str, Any]]:
        """Objects for ledger.jsonl: every row that was not simply used, in order.

        A row that is not here was used whole.
        """
        return (part.entry(row) for part in self.parts for row in part.affected())

    def summary(self) -> dict[str, Any]:
        """For each part the balance (`input` and the fates), reasons, notes and tokens."""
        return {part.name: part.summary() for part in self.parts}
