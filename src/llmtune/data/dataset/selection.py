"""What depends on other rows: duplicates, overlap between the sides, the held-out choice, and what must be refused.

Rows are compared by digests of their tokens before any cut, so that nothing hides behind a cut or a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.common.decisions import Decision
from llmtune.data.dataset.ledger import LedgerPart
from llmtune.data.dataset.store import FATES, RowStore
from llmtune.data.reading.data_files import DataFile
from llmtune.data.rendering.row_warnings import RowWarning
from llmtune.data.rows.row_result import Reason, RowRules, too_long_reason
from llmtune.errors import Problem

__all__ = [
    "PROBLEMS_NAMED",
    "hold_out",
    "judge_duplicates",
    "judge_overlap",
    "nothing_left",
    "row_problems",
    "unread_sources",
]

PROBLEMS_NAMED = 100
"""Rows named in one error; the rest are counted."""

Rows = npt.NDArray[np.int64]

_KEPT = ("used", "cut")
_DUPLICATE = "its tokens and weights repeat an earlier row"
_OVERLAP = "it also stands in the held-out rows"


def row_problems(part: LedgerPart, rules: RowRules, on_bad_row: str) -> list[Problem]:
    """Rows that stop the run: bad ones unless they are skipped, over-long ones where that is an error, and files that
    break off.
    """
    refused = {
        index
        for index, reason in enumerate(part.store.reasons)
        if rules.overlong == "error" and reason == too_long_reason(rules)
    }
    bad = FATES.index("bad")
    reasons = part.store.rows["reason"]
    breaks = {index for index, reason in enumerate(part.store.reasons) if reason.whole_file}
    stops = np.isin(reasons, list(refused | breaks))
    if on_bad_row == "error":
        stops |= part.fates == bad
    rows = np.flatnonzero(stops)
    return _named([_row_problem(part, int(row)) for row in rows[:PROBLEMS_NAMED]], len(rows))


def _row_problem(part: LedgerPart, row: int) -> Problem:
    reason = part.reason(row)
    assert reason is not None
    what = f"{reason.field}: {reason.what}" if reason.field else reason.what
    tokens = int(part.store.rows["tokens"][row])
    return Problem(f"{tokens:,} tokens, {what}" if tokens else what, part.store.source(row), reason.fix)


def _named(problems: list[Problem], total: int) -> list[Problem]:
    if total > len(problems):
        problems.append(
            Problem(f"and {total - len(problems):,} more rows", None, "`llmtune data report` counts them all by reason")
        )
    return problems


def judge_duplicates(part: LedgerPart, on_duplicate: str) -> None:
    """Find rows that repeat an earlier one: drop them, or keep and note them."""
    rows = part.rows_that_are(*_KEPT)
    digests = part.store.rows["full_digest"][rows]
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: within equal ones the earliest comes first
    ordered = digests[order]
    same = np.zeros(len(rows), dtype=bool)
    same[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
    for place in np.flatnonzero(same):
        row, earlier = int(rows[order[place]]), part.store.source(int(rows[order[first[place]]]))
        if on_duplicate == "drop":
            part.set_fate(row, "duplicate", Reason(_DUPLICATE), earlier)
        else:
            part.notes[row] = RowWarning("duplicate", f"{_DUPLICATE}, {earlier}")


def judge_overlap(part: LedgerPart, other: RowStore, other_rows: Rows, on_overlap: str) -> list[Problem]:
    """Find rows of `part` whose tokens are those of one of `other_rows`: drop them, note them, or return them as
    problems.
    """
    rows = part.rows_that_are(*_KEPT)
    digests, other_digests = part.store.rows["row_digest"][rows], other.rows["row_digest"][other_rows]
    candidates = np.flatnonzero(np.isin(digests[:, 0], other_digests[:, 0]))
    if not len(candidates):
        return []
    places: dict[Any, int] = {
        digest.tobytes(): int(row) for digest, row in zip(other_digests[::-1], other_rows[::-1], strict=True)
    }
    problems: list[Problem] = []
    total = 0
    for candidate in candidates:
        row, twin = int(rows[candidate]), places.get(digests[candidate].tobytes())
        if twin is None:
            continue
        where = other.source(twin)
        total += 1
        if on_overlap == "drop":
            part.set_fate(row, "dropped", Reason(_OVERLAP), where)
        elif on_overlap == "keep":
            part.notes[row] = RowWarning("overlap", f"{_OVERLAP}, {where}")
        elif total <= PROBLEMS_NAMED:
            fix = f"delete one of the two ({where}), or set `data.on_overlap` to drop or keep"
            problems.append(Problem(_OVERLAP, part.store.source(row), fix))
    return _named(problems, total) if on_overlap == "error" else []


def hold_out(part: LedgerPart, test_size: float, shuffle_seed: int | None) -> tuple[Rows, list[Problem]]:
    """Take rows out of the training rows for evaluation: a fraction (rounded, at least one) or a number.

    Chosen by `shuffle_seed`.

    The choice depends on the seed and the number of rows alone; without a seed the last rows are taken. A row's pieces
    stay together.
    """
    rows = part.rows_that_are(*_KEPT)
    count = int(test_size) if test_size >= 1 else max(1, int(test_size * len(rows) + 0.5))
    if count >= len(rows):
        what = f"{count} held-out rows leave nothing of {len(rows)} usable rows to train on"
        return rows[:0], [Problem(what, "data.test_size", "make it smaller")]
    order = (
        np.arange(len(rows))[::-1]
        if shuffle_seed is None
        else np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(len(rows))
    )
    taken = np.sort(rows[order[:count]])
    part.fates[taken] = FATES.index("held_out")
    return taken, []


def unread_sources(part: LedgerPart, files: Sequence[DataFile], max_samples: int | None) -> list[Decision]:
    """Name the sources that `data.max_samples` was reached before."""
    if max_samples is None or len(part.store) < max_samples:
        return []
    read = {files[int(index)].source_index for index in np.unique(part.store.rows["file"])}
    unread = [file.source.path for file in files if file.source_index not in read]
    names = ", ".join(dict.fromkeys(unread))
    return (
        [Decision("data.max_samples", max_samples, f"reached before these sources, of which nothing is used: {names}")]
        if unread
        else []
    )


def nothing_left(part: LedgerPart, purpose: str) -> Problem:
    """The problem of a side without a single example."""
    balance = part.balance()
    sums = " + ".join(f"{balance[fate]} {fate.replace('_', ' ')}" for fate in FATES)
    reason = next((part.reason(row) for row in part.affected()), None)
    fix = f"look at `llmtune data report`; the first row: {reason.what}" if reason else "name a file that holds rows"
    return Problem(f"no row is left to {purpose}: {balance['input']} input rows = {sums}", f"data.{part.name}", fix)
