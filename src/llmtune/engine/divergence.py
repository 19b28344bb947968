"""Values that are not finite, the rows they came from, and the errors they end in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from llmtune.engine.devices import Devices
from llmtune.engine.sharding import local_part
from llmtune.errors import DivergedError

__all__ = ["describe_rows", "half_updated", "non_finite_parameters", "rows_of_non_finite_losses", "too_many_skipped"]

ROWS_NAMED = 8
"""Rows that a message names before it only counts."""


def rows_of_non_finite_losses(losses: Sequence[torch.Tensor], sources: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Give the rows of the micro-batches whose loss is not finite, in order.

    `losses`: one tensor of shape [] for each micro-batch; `sources`: the rows of each. Waits for the device.
    """
    return tuple(
        name for loss, names in zip(losses, sources, strict=True) if not math.isfinite(float(loss)) for name in names
    )


def describe_rows(rows: Sequence[str]) -> str:
    """Name rows for a message.

    >>> describe_rows(["a.jsonl:3", "a.jsonl:9"])
    'a.jsonl:3, a.jsonl:9'
    """
    named = ", ".join(rows[:ROWS_NAMED])
    return f"{named} and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else named


def too_many_skipped(reason: str, rows: Sequence[str], step: int, skipped: int, *, budget: int) -> DivergedError:
    """Make the error for a training whose budget of skipped windows is spent; `step` counts the updates applied."""
    counts = f"{skipped} windows skipped, {budget} allowed"
    return DivergedError(
        f"{reason} in the window after step {step}: {counts}; rows {describe_rows(rows)}",
        where=f"step {step + 1}",
        fix="look at these rows, lower `training.learning_rate` or lengthen the warm-up; "
        "the weights were not touched by these windows",
    )


def half_updated(reason: str, rows: Sequence[str], *, step: int) -> DivergedError:
    """Make the error for a window that moved some weights before its gradient was seen not to be finite.

    `step` counts whole updates.
    """
    when = f"in the window after step {step}, whose loss is finite"
    return DivergedError(
        f"{reason} {when}: weights have moved by then; rows {describe_rows(rows)}",
        where=f"step {step + 1}",
        fix="look at these rows or lower `training.learning_rate`; "
        "with `training.step_in_backward: false` such a window is skipped",
    )


def non_finite_parameters(parameters: Mapping[str, torch.Tensor], devices: Devices | None = None) -> list[str]:
    """Give the names of parameters, of any shape, that hold a value that is not finite.

    devices: the processes that hold parts of them, each of which must call it and gets the same answer.
    """
    if not parameters:
        return []
    # One tensor of all answers: on a CUDA device each question by itself would wait for the stream.
    bad = torch.stack([(~torch.isfinite(local_part(value))).any() for value in parameters.values()]).double()
    counts = (bad if devices is None else devices.sum_tensor(bad)).tolist()
    return [name for name, count in zip(parameters, counts, strict=True) if count]
