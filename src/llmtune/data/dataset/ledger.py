"""The status of every row: input = used + cut + dropped + duplicate + held out + bad, with reasons (promise Q4).

Each row has exactly one status. Where several would fit, the first of these counts: bad, dropped, duplicate, held out,
cut, used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict, cast

import numpy as np
import numpy.typing as npt

from llmtune.data.dataset.row_result import STATUSES, Reason, Status
from llmtune.data.dataset.store import RowStore
from llmtune.data.example import SIDES
from llmtune.data.rendering.row_warnings import UNSTABLE_WAYS_OUT, RowWarning
from llmtune.data.rows.field_names import UNUSED_SHOWN

__all__ = ["REASONS_SHOWN", "Balance", "Ledger", "LedgerEntry", "LedgerPart", "PartSummary"]

REASONS_SHOWN = 20
"""Different reasons listed in a summary; the rest are counted together."""

UNUSED = "unused-field"
"""Code of the warning about a field that nothing reads."""
_OTHER_REASONS = "other reasons"
_INDEX = re.compile(r"\[\d+\]")


class LedgerEntry(TypedDict):
    """One line of ledger.jsonl."""

    part: str
    source: str
    fate: Status
    reason: NotRequired[str]
    field: NotRequired[str]
    fix: NotRequired[str]
    other: NotRequired[str]
    """The row that this one repeats."""
    tokens: int
    tokens_lost: int
    notes: NotRequired[list[str]]


class Balance(TypedDict):
    """Rows by status, and all rows (`input`), which are counted by themselves."""

    input: int
    used: int
    cut: int
    dropped: int
    duplicate: int
    held_out: int
    bad: int


class PartSummary(Balance):
    """The balance of one side with reasons and warnings by count, and its tokens."""

    examples: int
    tokens: int
    loss_tokens: float
    tokens_cut: int
    reasons: dict[str, dict[str, int]]
    notes: dict[str, int]
    answers: int
    """Messages of the assistant in the rows that are kept."""
    trained_answers: int
    pairs: NotRequired[int]
    """Pairs of a chosen and a rejected answer, where the rows are such pairs."""


@dataclass
class LedgerPart:
    """The rows of one side (train or eval).

    `statuses`, int8 [R], starts with the status of each row by itself and changes when rows are compared or held out.
    """

    name: str
    store: RowStore
    statuses: npt.NDArray[np.int8] = field(init=False)
    reasons: dict[int, Reason] = field(default_factory=dict)
    """Reasons that come from other rows, by row."""
    others: dict[int, str] = field(default_factory=dict)
    """The name of the other row of a duplicate or overlap, by row."""
    warnings: dict[int, RowWarning] = field(default_factory=dict)
    """Warnings that come from other rows, by row."""

    def __post_init__(self) -> None:
        self.statuses = self.store.rows["status"].astype(np.int8)

    def rows_with_status(self, *statuses: Status) -> npt.NDArray[np.int64]:
        """Numbers of the rows with one of these statuses, ascending, int64 [rows]."""
        return np.flatnonzero(np.isin(self.statuses, [STATUSES.index(status) for status in statuses]))

    def set_status(self, row: int, status: Status, reason: Reason | None, other: str | None = None) -> None:
        """Give a row its final status."""
        self.statuses[row] = STATUSES.index(status)
        if reason is not None:
            self.reasons[row] = reason
        if other is not None:
            self.others[row] = other

    def reason(self, row: int) -> Reason | None:
        """The reason why the row is cut or not used."""
        if row in self.reasons:
            return self.reasons[row]
        number = int(self.store.rows["reason"][row])
        return self.store.reasons[number] if number >= 0 else None

    def warnings_of(self, row: int) -> tuple[RowWarning, ...]:
        """The warnings about a row, whatever its status."""
        warnings = self.store.warnings[int(self.store.rows["warnings"][row])]
        return (*warnings, self.warnings[row]) if row in self.warnings else warnings

    def entry(self, row: int) -> LedgerEntry:
        """One row as an object of ledger.jsonl."""
        status, reason = STATUSES[self.statuses[row]], self.reason(row)
        tokens, lost = int(self.store.rows["tokens"][row]), int(self.store.rows["tokens_lost"][row])
        reason_fields = {} if reason is None else {"reason": reason.problem, "field": reason.field, "fix": reason.fix}
        optional = {**reason_fields, "other": self.others.get(row)}
        entry = {
            "part": self.name,
            "source": self.store.source(row),
            "fate": status,
            **{key: value for key, value in optional.items() if value is not None},
            "tokens": tokens,
            "tokens_lost": tokens if status in ("dropped", "duplicate") else lost,
        }
        warnings = [warning.text for warning in self.warnings_of(row)]
        return cast("LedgerEntry", {**entry, "notes": warnings} if warnings else entry)

    def affected(self) -> Iterator[int]:
        """Numbers of the rows that are not simply used or that have warnings, ascending.

        Unused fields alone are named by file (`notes`), not by row: nearly every row of a table has some.
        """
        with_warnings = [
            index
            for index, warnings in enumerate(self.store.warnings)
            if any(warning.code != UNUSED for warning in warnings)
        ]
        noted = np.isin(self.store.rows["warnings"], with_warnings)
        noted[list(self.warnings)] = True
        yield from (int(row) for row in np.flatnonzero(noted | (self.statuses != STATUSES.index("used"))))

    def rows_with_warning(self, code: str) -> npt.NDArray[np.int64]:
        """Numbers of the rows with a warning of this code from the row itself, ascending, int64 [rows]."""
        combinations = [
            index
            for index, warnings in enumerate(self.store.warnings)
            if any(warning.code == code for warning in warnings)
        ]
        return np.flatnonzero(np.isin(self.store.rows["warnings"], combinations))

    def unused_fields(self) -> Iterator[str]:
        """A line for each file whose rows or messages have fields that nothing reads, with counts and an example."""
        rows = self.rows_with_warning(UNUSED)
        for file, label in enumerate(self.store.labels):
            counts: Counter[str] = Counter()
            first: dict[str, int] = {}
            for row in rows[self.store.rows["file"][rows] == file].tolist():
                for warning in self.store.warnings[int(self.store.rows["warnings"][row])]:
                    if warning.code == UNUSED:
                        field = warning.text.removesuffix(" is not used")
                        counts[field] += 1
                        first.setdefault(field, row)
            if counts:
                # Switches first: they mean to change the training.
                ordered = sorted(counts, key=lambda field: (not field.startswith("switch "), -counts[field]))
                shown = ", ".join(
                    f"{field} ({counts[field]:,} row{'s' if counts[field] > 1 else ''}, "
                    f"first {self.store.source(first[field]).rpartition('/')[2]})"
                    for field in ordered[:UNUSED_SHOWN]
                )
                rest = f" and {len(ordered) - UNUSED_SHOWN} more" if len(ordered) > UNUSED_SHOWN else ""
                yield f"{label}: fields not used: {shown}{rest}"

    def rows_named(self, name: str) -> list[int]:
        """Numbers of the rows `file:line` or `file[index]`, where `file` may be the end of a longer path."""
        rows: list[int] = []
        for index, (label, numbering) in enumerate(zip(self.store.labels, self.store.numberings, strict=True)):
            file, _, number = name.removesuffix("]").rpartition(":" if numbering == "line" else "[")
            if number.isdecimal() and file and (label == file or label.endswith(f"/{file}")):
                matches = (self.store.rows["file"] == index) & (self.store.rows["number"] == int(number))
                rows += np.flatnonzero(matches).tolist()
        return rows

    def balance(self) -> Balance:
        """Count the rows by status."""
        counts = np.bincount(self.statuses, minlength=len(STATUSES)).tolist()
        return cast("Balance", {"input": len(self.store), **dict(zip(STATUSES, counts, strict=True))})

    def summary(self) -> PartSummary:
        """The balance with reasons, warnings and tokens; JSON-able and short."""
        reasons: dict[str, Counter[str]] = {}
        warnings: Counter[str] = Counter()
        tokens_cut = 0
        for row in self.affected():
            reason, status = self.reason(row), STATUSES[self.statuses[row]]
            warnings.update({warning.code for warning in self.warnings_of(row)} - {UNUSED})
            if reason is not None and status != "used":
                counter = reasons.setdefault(status, Counter())
                # Without their indices the fields of different rows count as one reason.
                field = f"{_INDEX.sub('[]', reason.field)}: " if reason.field else ""
                text = field + reason.problem
                counter[text if text in counter or len(counter) < REASONS_SHOWN else _OTHER_REASONS] += 1
            if status == "cut":
                tokens_cut += int(self.store.rows["tokens_lost"][row])
        unused_rows = self.rows_with_warning(UNUSED)
        if len(unused_rows):
            warnings[UNUSED] = len(unused_rows)
        is_kept = np.isin(self.store.examples["row"], self.rows_with_status("used", "cut"))
        examples = self.store.examples[is_kept]
        kept_rows = self.store.rows[self.rows_with_status("used", "cut")]
        pairs = int((examples["side"] == SIDES.index("chosen")).sum())
        summary: PartSummary = {
            **self.balance(),  # type: ignore[typeddict-item]  # it has no `pairs`
            "examples": len(examples),
            "tokens": int(examples["tokens"].sum(dtype=np.int64)),
            "loss_tokens": float(examples["loss_weight"].sum()),
            "tokens_cut": tokens_cut,
            "reasons": {status: dict(counter.most_common()) for status, counter in reasons.items()},
            "notes": dict(warnings.most_common()),
            "answers": int(kept_rows["answers"].sum(dtype=np.int64)),
            "trained_answers": int(kept_rows["trained_answers"].sum(dtype=np.int64)),
        }
        if pairs:
            summary["pairs"] = pairs
        return summary


WAYS_OUT = {
    "unstable": UNSTABLE_WAYS_OUT,
    "reasoning-dropped": "for earlier answers make an example of each (`data.one_example_per_turn=true`), or train the "
    "last answers only (`data.train_on=last_assistant_message`); for all give a template that writes it "
    "(`model.chat_template=FILE`)",
    "system-unused": "give the rows as messages, or take `data.system` out",
    "tools-dropped": "give a template that writes tools: `model.chat_template=FILE`",
    "no-end-of-turn": "give a template that closes answers with a control token: `model.chat_template=FILE`",
    "missing-value": "take out the rows that have no value, and write the file again",
    "argument-unread": "correct the name in `chat_template_kwargs`, or take it out",
    "control-string": "set `data.parse_control_tokens=true` where they are meant as control tokens",
    "weight-ignored": "set `data.train_on=customized`, by which each message has its own weight",
}
"""The way out of each warning that changes what is trained."""


def training_warnings(part: LedgerPart) -> Iterator[str]:
    """A line for each kind of warning of one side that changes what is trained: rows, an example, the way out."""
    for code, way_out in WAYS_OUT.items():
        rows = part.rows_with_warning(code)
        if len(rows):
            first = int(rows[0])
            text = next(warning.text for warning in part.warnings_of(first) if warning.code == code)
            count = f"{len(rows):,} {part.name} row{'s' if len(rows) > 1 else ''}"
            yield f"{code}: {count}, such as {part.store.source(first)}: {text}; fix: {way_out}"


class Ledger:
    """The status of every row of a run, for both sides."""

    def __init__(self, parts: Sequence[LedgerPart]) -> None:
        self.parts = tuple(parts)

    @property
    def entries(self) -> Iterator[LedgerEntry]:
        """Objects for ledger.jsonl, in order: every row that is not simply used, or that has warnings."""
        return (part.entry(row) for part in self.parts for row in part.affected())

    def training_warnings(self) -> list[str]:
        """A line for each kind of warning that changes what is trained: rows, an example, the way out."""
        return [line for part in self.parts for line in training_warnings(part)]

    def unused_fields(self) -> list[str]:
        """A line for each file with fields that nothing reads."""
        return [line for part in self.parts for line in part.unused_fields()]

    def summary(self) -> dict[str, PartSummary]:
        """The summary of each part by its name."""
        return {part.name: part.summary() for part in self.parts}
