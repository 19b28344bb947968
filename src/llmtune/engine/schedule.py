"""Learning-rate schedules as closed forms of the step, so that a resumed run cannot drift.

A shape maps (updates already made, total, warm-up) to a fraction of the peak after the warm-up. In the warm-up all rise
linearly from 0. All equal `transformers.get_scheduler` of the same name (`wsd`: `warmup_stable_decay`), step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from llmtune.errors import ConfigError

__all__ = ["SCHEDULES", "WSD_DECAY_SHARE", "ScheduleName", "learning_rate_at", "warmup_length"]

ScheduleName = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "wsd"]

WSD_DECAY_SHARE = Fraction(1, 5)
"""Last part of a `wsd` training in which the rate falls (arXiv:2405.18392 finds a fifth enough)."""

POLYNOMIAL_END = 1e-7
"""Learning rate at the end of `polynomial` when none is asked for: the default of `transformers.get_scheduler`."""


def learning_rate_at(
    name: ScheduleName, *, peak: float, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.0
) -> Callable[[int], float]:
    """Give the function from "updates already made" to the learning rate of the next update.

    `warmup_steps`: updates over which the rate rises linearly from 0 (the first update has rate 0, as in
    `transformers`); `constant` has none. `min_lr_ratio`: rate at the end as a fraction of `peak`, for `linear`,
    `cosine`, `polynomial` and `wsd`; past the end the rate stays there. Raises ConfigError for a warm-up longer than
    the training and for an unknown name.

    >>> rate = learning_rate_at("linear", peak=1.0, total_steps=6, warmup_steps=2)
    >>> [rate(step) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if name not in SCHEDULES:
        raise ConfigError(
            f"unknown schedule `{name}`", where="training.lr_schedule", fix=f"one of {', '.join(SCHEDULES)}"
        )
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"warm-up of {warmup_steps} steps in a training of {total_steps}",
            where="training.warmup_steps",
            fix=f"at most {total_steps}, or train longer",
        )
    if name == "constant":
        warmup_steps = 0
    shape = SCHEDULES[name]
    floor = min_lr_ratio
    if name == "polynomial" and not floor and peak > POLYNOMIAL_END:
        floor = POLYNOMIAL_END / peak

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step / warmup_steps)
        fall = shape(min(step, total_steps), total_steps, warmup_steps)
        return peak * (fall * (1.0 - floor) + floor)

    return rate


def warmup_length(total_steps: int, warmup_steps: int | None, warmup_ratio: float | None) -> int:
    """Give the warm-up in steps: `warmup_steps`, or the ratio of all steps rounded up, or 0.

    The ratio counts as the decimal that was written: 0.07 of 100 steps are 7, where floating point makes
    7.000000000000001 and so 8. Raises ConfigError when both are given, or for a ratio outside [0, 1].

    >>> warmup_length(100, None, 0.07), warmup_length(10, None, 0.01), warmup_length(10, 3, None)
    (7, 1, 3)
    >>> warmup_length(10, None, None)
    0
    """
    if warmup_steps is not None and warmup_ratio is not None:
        raise ConfigError(
            f"both warmup_steps ({warmup_steps}) and warmup_ratio ({warmup_ratio}) are given",
            where="training",
            fix="keep one of them",
        )
    if warmup_ratio is None:
        return warmup_steps or 0
    if not 0 <= warmup_ratio <= 1:
        raise ConfigError(
            f"warmup_ratio is {warmup_ratio}", where="training.warmup_ratio", fix="a fraction of all steps, from 0 to 1"
        )
    return math.ceil(Fraction(str(warmup_ratio)) * total_steps)


def _constant(_step: int, _total: int, _warmup: int) -> float:
    return 1.0


def _linear(step: int, total: int, warmup: int) -> float:
    return (total - step) / max(1, total - warmup)


def _cosine(step: int, total: int, warmup: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _stable_then_cosine(step: int, total: int, warmup: int) -> float:
    decay = min(math.ceil(WSD_DECAY_SHARE * total), total - warmup)
    begin = total - decay
    if step == total:
        return 0.0
    return 1.0 if step < begin else 0.5 * (1.0 + math.cos(math.pi * (step - begin) / max(1, decay)))


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "polynomial": _linear,
    "wsd": _stable_then_cosine,
}
