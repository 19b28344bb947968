"""`llmtune compare --held-out`: row by row, which of two models fits held-out rows better."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from llmtune.cli.evaluate import held_out_rows, measure_rows
from llmtune.cli.generate import open_inference_model
from llmtune.common.text import printable
from llmtune.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["WinTable", "compare_rows", "count_wins"]

EQUAL_NATS = 1e-4
"""Rows whose losses differ by less are a draw: so much may be the rounding of float32."""


class WinTable(NamedTuple):
    """How many rows each of two models fits better, and by how much, nats per trained token."""

    rows: int
    first_better: int
    second_better: int
    equal: int
    first_mean: float
    """Mean over rows, each row once."""
    second_mean: float


def count_wins(first_R: npt.NDArray[np.float64], second_R: npt.NDArray[np.float64]) -> WinTable:
    """Return the wins over the rows that have a loss in both, nats, shape [rows] each; the smaller loss wins.

    gain = first - second; the first is better where gain < -EQUAL_NATS, the second where gain > EQUAL_NATS.

    >>> import numpy as np
    >>> count_wins(np.array([1.0, 2.0, 3.0, np.nan]), np.array([2.0, 1.0, 3.0, 1.0]))
    WinTable(rows=3, first_better=1, second_better=1, equal=1, first_mean=2.0, second_mean=2.0)
    """
    pairs = [(a, b) for a, b in zip(first_R.tolist(), second_R.tolist(), strict=True) if not math.isnan(a + b)]
    gains = [a - b for a, b in pairs]
    return WinTable(
        rows=len(pairs),
        first_better=sum(gain < -EQUAL_NATS for gain in gains),
        second_better=sum(gain > EQUAL_NATS for gain in gains),
        equal=sum(abs(gain) <= EQUAL_NATS for gain in gains),
        first_mean=sum(a for a, _ in pairs) / max(len(pairs), 1),
        second_mean=sum(b for _, b in pairs) / max(len(pairs), 1),
    )


def compare_rows(
    run: str,
    other: str | None,
    data: list[str] | None,
    *,
    checkpoint: str | None,
    template_args: str | None,
    as_json: bool,
    no_cuda: bool,
) -> None:
    """Measure each held-out row with both models (base and tuned without `other`), and print who fits how many better.

    Raises UsageError or DataError where no rows can be measured, ModelError for a model that cannot be loaded.
    """
    load = partial(open_inference_model, template_args=template_args, no_cuda=no_cuda, may_score=True)
    loaded = load(run, checkpoint=checkpoint)
    rows, settings = held_out_rows(loaded, data, None)
    scores = bool(loaded.labels)
    first = measure_rows(loaded, loaded.model, settings, rows)
    if other is None:
        names = ("tuned", "base")
        with loaded.as_before_tuning() as model:
            second = measure_rows(loaded, model, settings, rows)
    else:
        names = (run, other) if run != other else ("first", "second")
        config = loaded.config
        del loaded  # the two need not fit into memory together
        # The same rows, whatever the second one was trained on; by its own tokenizer and template.
        second_model = replace(load(other), config=config)
        rows, settings = held_out_rows(second_model, data, None)
        second = measure_rows(second_model, second_model.model, settings, rows)
    if len(first) != len(second):
        raise DataError(
            f"{names[0]} can be measured on {len(first):,} rows and {names[1]} on {len(second):,}",
            "--held-out",
            "compare models of one tokenizer, or name rows with --data that both can take",
        )
    unit = "nats per trained token" if not scores else "nats per pair or row"
    table = count_wins(first, second)
    if as_json:
        print(json.dumps({"first": names[0], "second": names[1], **table._asdict()}, ensure_ascii=False))
        return
    _print(names, table, unit)


def _print(names: tuple[str, str], table: WinTable, unit: str) -> None:
    columns = max(map(len, names)) + 2
    lines = [f"{table.rows:,} held-out rows, {unit}, each row once"]
    values = ((table.first_mean, table.first_better), (table.second_mean, table.second_better))
    for name, (mean, wins) in zip(names, values, strict=True):
        share = wins / max(table.rows, 1)
        bar = "█" * round(20 * share) if sys.stdout.isatty() else ""
        lines.append(f"{printable(name):<{columns}} loss {mean:.4f}   better on {wins:,} ({share:.0%}) {bar}".rstrip())
    lines.append(f"{'equal':<{columns}} {table.equal:,}")
    print("\n".join(lines))
