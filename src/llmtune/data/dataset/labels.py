"""The labels of classified rows: found in the training rows, in a fixed order; and the margins of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmtune.common.decisions import Decision
from llmtune.config.schema import Config
from llmtune.data.dataset.make_dataset import PreparedData
from llmtune.data.example import SIDES
from llmtune.errors import DataError

__all__ = ["check_labels", "label_names", "labels_of_rows"]

SHOWN = 20
"""Labels that one line names."""


def labels_of_rows(config: Config, data: PreparedData) -> tuple[tuple[str, ...], list[Decision]]:
    """Return the labels of the head that these rows train (none where they train none), and what is said about them.

    Raises DataError where rows have one label only, and for a held-out row whose label no training row has.
    """
    method = config.objective.method
    if method == "classification":
        names = label_names(data.train.labels)
        if len(names) < 2:
            problem = f"all training rows have the label `{names[0] if names else ''}`: there is nothing to tell apart"
            raise DataError(problem, "data.train", "add rows with another label")
        if data.eval is not None:
            check_labels(data.eval.labels, names, [data.eval[index].source for index in range(len(data.eval))])
        return names, [_balance(data.train.labels, names)]
    if method == "kto" and len(kinds := set(data.train.sides.tolist())) == 1:
        kind = SIDES[kinds.pop()]
        return (), [Decision("label", f"all {kind}", "kto learns from the difference of two kinds: add the other one")]
    if method != "reward" and data.train.margins.any():
        count = int((data.train.margins != 0).sum()) // 2
        return (), [Decision("margin", "not used", f"{count} pairs have one, and only `reward` subtracts it")]
    return ((method,) if method == "reward" else ()), []


def label_names(labels: Sequence[str | None]) -> tuple[str, ...]:
    """The different labels: whole numbers by their value, else in alphabetical order.

    >>> label_names(["10", "9", "10"]), label_names(["true", "false"])
    (('9', '10'), ('false', 'true'))
    """
    names = {label for label in labels if label is not None}
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_labels(labels: Sequence[str | None], names: Sequence[str], sources: Sequence[str]) -> None:
    """Raise DataError for the first row, by its source, whose label is none of `names`."""
    for label, source in zip(labels, sources, strict=True):
        if label not in names:
            known = ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
            fix = f"label it with one of {known}; or add such rows to the training rows"
            raise DataError(f"no training row has the label `{label}`", source, fix)


def _balance(labels: Sequence[str | None], names: Sequence[str]) -> Decision:
    counts = Counter(labels)
    parts = [f"{name} {counts[name] / len(labels):.1%}" for name in names[:SHOWN]]
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    largest, count = counts.most_common(1)[0]
    reason = f"an answer of `{largest}` to everything has an accuracy of {count / len(labels):.1%}"
    return Decision("labels", ", ".join(parts) + rest, reason)
