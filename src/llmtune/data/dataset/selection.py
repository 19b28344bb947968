"""Compare rows with each other: duplicates, overlap between the sides, the held-out choice; and what stops the run.

Rows are compared by digests of their tokens before any cut, so that neither a cut nor a weight hides a repetition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmtune.common.decisions import Decision
from llmtune.data.dataset.ledger import LedgerPart
from llmtune.data.dataset.row_result import STATUSES, Reason, RowRules, too_long_problem
from llmtune.data.dataset.store import RowStore
from llmtune.data.reading.data_file import DataFile
from llmtune.data.rendering.row_warnings import RowWarning
from llmtune.errors import Problem

__all__ = [
    "PROBLEMS_SHOWN",
    "hold_out",
    "mark_duplicates",
    "mark_overlap",
    "no_rows_problem",
    "row_problems",
    "unread_sources",
]

PROBLEMS_SHOWN = 100
"""Rows listed in one error; the rest are counted."""

Rows = npt.NDArray[np.int64]

_DUPLICATE = "its tokens and weights repeat an earlier row"
_OVERLAP = "it also stands in the held-out rows"
_OTHER_ROWS = "give `data.eval` other rows, or leave it out and set `data.test_size`"


def row_problems(part: LedgerPart, rules: RowRules, on_bad_row: str) -> list[Problem]:
    """Rows that stop the run: bad and over-long ones, unless the config accepts them, and files that break off."""
    reasons = part.store.reasons
    stopping = {index for index, reason in enumerate(reasons) if reason.whole_file}
    if rules.overlong == "error":
        too_long = too_long_problem(rules)
        stopping |= {index for index, reason in enumerate(reasons) if reason.problem == too_long}
    stops = np.isin(part.store.rows["reason"], list(stopping))
    if on_bad_row == "error":
        stops |= part.statuses == STATUSES.index("bad")
    rows = np.flatnonzero(stops)
    return _counted([_row_problem(part, int(row)) for row in rows[:PROBLEMS_SHOWN]], len(rows))


def _row_problem(part: LedgerPart, row: int) -> Problem:
    reason = part.reason(row)
    assert reason is not None
    problem = f"{reason.field}: {reason.problem}" if reason.field else reason.problem
    tokens = int(part.store.rows["tokens"][row])
    return Problem(f"{tokens:,} tokens, {problem}" if tokens else problem, part.store.source(row), reason.fix)


def _counted(problems: list[Problem], total: int) -> list[Problem]:
    """Add the number of problems that are not listed."""
    if total > len(problems):
        fix = "`llmtune data report` counts them all by reason"
        problems.append(Problem(f"and {total - len(problems):,} more rows", None, fix))
    return problems


def mark_duplicates(part: LedgerPart, on_duplicate: str) -> None:
    """Drop rows that repeat an earlier one, or warn about them where `on_duplicate` is not `drop`."""
    rows = part.rows_with_status("used", "cut")
    digests = part.store.rows["full_digest"][rows]
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the earliest of equal rows comes first
    ordered = digests[order]
    repeats = np.zeros(len(rows), dtype=bool)
    repeats[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(rows))))
    for index in np.flatnonzero(repeats):
        row, earlier = int(rows[order[index]]), part.store.source(int(rows[order[first[index]]]))
        if on_duplicate == "drop":
            part.set_status(row, "duplicate", Reason(_DUPLICATE), earlier)
        else:
            part.warnings[row] = RowWarning("duplicate", f"{_DUPLICATE}, {earlier}")


def mark_overlap(part: LedgerPart, other: RowStore, other_rows: Rows, on_overlap: str) -> list[Problem]:
    """Drop rows of `part` with the same tokens as one of `other_rows`, or warn, or return problems, by `on_overlap`."""
    rows = part.rows_with_status("used", "cut")
    digests, other_digests = part.store.rows["row_digest"][rows], other.rows["row_digest"][other_rows]
    candidates = np.flatnonzero(np.isin(digests[:, 0], other_digests[:, 0]))  # half the digest finds nearly all
    if not len(candidates):
        return []
    # Reversed, so that the first of equal rows is the one named.
    row_of_digest: dict[bytes, int] = {
        digest.tobytes(): int(row) for digest, row in zip(other_digests[::-1], other_rows[::-1], strict=True)
    }
    problems: list[Problem] = []
    total = 0
    for candidate in candidates:
        row, other_row = int(rows[candidate]), row_of_digest.get(digests[candidate].tobytes())
        if other_row is None:
            continue
        name = other.source(other_row)
        total += 1
        if on_overlap == "drop":
            part.set_status(row, "dropped", Reason(_OVERLAP, None, _OTHER_ROWS), name)
        elif on_overlap == "keep":
            part.warnings[row] = RowWarning("overlap", f"{_OVERLAP}, {name}")
        elif total <= PROBLEMS_SHOWN:
            fix = f"delete one of the two ({name}), or set `data.on_overlap` to drop or keep"
            problems.append(Problem(_OVERLAP, part.store.source(row), fix))
    return _counted(problems, total) if on_overlap == "error" else []


def hold_out(part: LedgerPart, test_size: float, shuffle_seed: int | None) -> tuple[Rows, list[Problem]]:
    """Move rows from training to evaluation: a fraction of them (rounded, at least one) or a number.

    The choice depends on the seed and the number of rows alone; without a seed the last rows are taken. A row's pieces
    stay together.
    """
    rows = part.rows_with_status("used", "cut")
    # Rounded half up, as people do; `round` would take 2 of 2.5.
    count = int(test_size) if test_size >= 1 else max(1, int(test_size * len(rows) + 0.5))
    if count >= len(rows):
        problem = f"{count} held-out rows leave nothing of {len(rows)} usable rows to train on"
        return rows[:0], [Problem(problem, "data.test_size", "make it smaller")]
    if shuffle_seed is None:
        order = np.arange(len(rows))[::-1]
    else:
        order = np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(len(rows))
    # In the order of the files again, so that held-out rows do not depend on how they were drawn.
    held_out = np.sort(rows[order[:count]])
    part.statuses[held_out] = STATUSES.index("held_out")
    return held_out, []


def unread_sources(part: LedgerPart, files: Sequence[DataFile], max_samples: int | None) -> list[Decision]:
    """A decision that names the sources after the one in which `data.max_samples` was reached."""
    if max_samples is None or len(part.store) < max_samples:
        return []
    read = {files[int(index)].source_index for index in np.unique(part.store.rows["file"])}
    unread = [file.source.path for file in files if file.source_index not in read]
    if not unread:
        return []
    reason = f"reached before these sources, of which nothing is used: {', '.join(dict.fromkeys(unread))}"
    return [Decision("data.max_samples", max_samples, reason)]


def no_rows_problem(part: LedgerPart, purpose: str) -> Problem:
    """The problem of a side without a single example."""
    balance = part.balance()
    sums = " + ".join(f"{balance[status]} {status.replace('_', ' ')}" for status in STATUSES)
    reason = next((part.reason(row) for row in part.affected()), None)
    way_out = f" ({reason.fix})" if reason and reason.fix else ""
    fix = (
        f"look at `llmtune data report`; the first row: {reason.problem}{way_out}"
        if reason
        else "name a file that holds rows"
    )
    return Problem(f"no row is left to {purpose}: {balance['input']} input rows = {sums}", f"data.{part.name}", fix)
