"""Which of two values of a metric is the better one."""

from __future__ import annotations

__all__ = ["HIGHER_IS_BETTER", "is_better"]

HIGHER_IS_BETTER = ("_exact_answers", "_score", "_accuracy", "_margin", "_reward")
"""Endings of the metrics of which the highest value is the best; of every other it is the lowest."""


def is_better(metric: str, value: float, than: float, *, by: float = 0.0) -> bool:
    """Whether `value` of a metric beats another one by more than `by`.

    >>> is_better("eval_mean_nll", 2.0, 2.1), is_better("eval_exact_answers", 3, 3), is_better("eval_score", 0.9, 0.5)
    (True, False, True)
    """
    gain = value - than if metric.endswith(HIGHER_IS_BETTER) else than - value
    return gain > by
