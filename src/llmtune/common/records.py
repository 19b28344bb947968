"""Values in the records of a run: nested ones by dotted names, and which of two of a metric is the better."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["HIGHER_IS_BETTER", "flat_items", "is_better"]


def flat_items(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Return the innermost values with dotted names.

    >>> flat_items({"a": {"b": 1}, "c": 2})
    [('a.b', 1), ('c', 2)]
    """
    items: list[tuple[str, object]] = []
    for key, value in values.items():
        items += flat_items(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return items


HIGHER_IS_BETTER = ("_exact_answers", "_score", "_accuracy", "_margin", "_reward", "_macro_f1")
"""Endings of the metrics of which the highest value is the best; of every other it is the lowest."""


def is_better(metric: str, value: float, than: float, *, by: float = 0.0) -> bool:
    """Whether `value` of a metric beats another one by more than `by`.

    >>> is_better("eval_mean_nll", 2.0, 2.1), is_better("eval_exact_answers", 3, 3), is_better("eval_score", 0.9, 0.5)
    (True, False, True)
    """
    gain = value - than if metric.endswith(HIGHER_IS_BETTER) else than - value
    return gain > by
