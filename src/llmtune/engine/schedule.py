"""Learning-rate schedules as closed forms of the step, so that a resumed run cannot drift.

A shape maps (updates already made, total, warm-up, cycles) to a fraction of the peak after the warm-up. In the warm-up
all rise linearly from 0. All equal `transformers.get_scheduler` of the same name, step by step (`wsd` is its
`warmup_stable_decay`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from llmtune.config.schema import TrainingConfig
from llmtune.errors import ConfigError

__all__ = [
    "NEGLIGIBLE_RATE",
    "SCHEDULES",
    "SMALLEST_RATE",
    "WSD_DECAY_SHARE",
    "Interval",
    "ScheduleName",
    "interval",
    "is_due",
    "learning_rate_at",
    "schedule_of",
    "warmup_length",
]

ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "polynomial", "wsd"
]

WSD_DECAY_SHARE = Fraction(1, 5)
"""Last part of a `wsd` training in which the rate falls (arXiv:2405.18392 finds a fifth enough)."""

SMALLEST_RATE = 2.0**-126
"""The smallest number with all the digits of float32: weights have that type, and below it devices compute with 0."""

NEGLIGIBLE_RATE = 1e-9
"""An update is about as large as the rate, and float32 keeps 24 bits: at this rate a weight of 0.017, a usual size in a
pretrained model, stays as it is."""

POLYNOMIAL_END = 1e-7
"""Learning rate at the end of `polynomial` when none is asked for: the default of `transformers.get_scheduler`."""


def learning_rate_at(
    name: ScheduleName,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    num_cycles: int = 1,
) -> Callable[[int], float]:
    """Give the function from "updates already made" to the learning rate of the next update.

    `warmup_steps`: updates over which the rate rises linearly from 0 (the first update has rate 0, as in
    `transformers`); `constant` has none. `min_lr_ratio`: rate at the end as a fraction of `peak`, for all but the
    constant schedules; past the end the rate stays there. `num_cycles`: falls from the peak to that end of
    `cosine_with_restarts`. Raises ConfigError for a warm-up longer than the training and for an unknown name.

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
            fix=f"at most {total_steps if total_steps > 1 else 0}, or train longer",
        )
    if name == "constant":
        warmup_steps = 0
    shape = SCHEDULES[name]
    floor = min_lr_ratio
    if name == "polynomial" and not floor and peak > POLYNOMIAL_END:
        # A floor of 0 would still differ from transformers, whose polynomial ends at that rate and not at 0.
        floor = POLYNOMIAL_END / peak

    def rate(step: int) -> float:
        if step < warmup_steps:
            # The first update has rate 0: it only fills the optimizer's moments, as with transformers.
            return peak * (step / warmup_steps)
        fall = shape(min(step, total_steps), total_steps, warmup_steps, num_cycles)
        # From the peak to the floor instead of to 0; the shape in between is the same.
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


def schedule_of(training: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """Give the learning rate of each update of a run of `total_steps`, from a config whose rate is resolved.

    Raises ConfigError where every one of them is 0, also to float32, or the warm-up is longer than the run.
    """
    assert training.learning_rate is not None, "a config is resolved before a run is planned"
    warmup_steps = warmup_length(total_steps, training.warmup_steps, training.warmup_ratio)
    rate = learning_rate_at(
        training.lr_schedule,
        peak=training.learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        min_lr_ratio=training.min_lr_ratio,
        num_cycles=training.num_cycles,
    )
    if not any(rate(step) >= SMALLEST_RATE for step in range(total_steps)):  # the first that is enough ends the search
        if training.learning_rate < SMALLEST_RATE:
            raise ConfigError(
                f"nothing would be trained: a learning rate of {training.learning_rate:g} is 0 for float32 weights",
                where="training.learning_rate",
                fix="leave it out for the usual one, or give one such as 2e-5",
            )
        key = "warmup_ratio" if training.warmup_ratio is not None else "warmup_steps"
        raise ConfigError(
            f"nothing would be trained: the learning rate of every step is 0, because the warm-up of {warmup_steps} "
            f"begins at 0 and the run has {total_steps}",
            where=f"training.{key}",
            fix=f"set `training.{key}=0`, or train longer (training.epochs, a smaller training.batch_size)",
        )
    return rate


Interval = int | Fraction
"""Steps from one evaluation or save to the next; a fraction where they follow parts of epochs."""


def interval(
    every_steps: float | None, every_epochs: float | None, *, total_steps: int, steps_per_epoch: int
) -> Interval | None:
    """Give the steps between two evaluations or saves, at least 1; None where neither is given.

    `every_steps`: a number of steps, or below 1 a fraction of all steps, rounded up (as in `transformers`).
    `every_epochs`: epochs, a fraction allowed: the boundaries of epochs are kept also where it does not divide them.

    >>> interval(0.1, None, total_steps=25, steps_per_epoch=5), interval(None, 0.5, total_steps=25, steps_per_epoch=5)
    (3, Fraction(5, 2))
    """
    if every_steps is not None:
        return math.ceil(Fraction(str(every_steps)) * total_steps) if every_steps < 1 else int(every_steps)
    if every_epochs is not None:
        return max(Fraction(1), Fraction(str(every_epochs)) * steps_per_epoch)
    return None


def is_due(step: int, every: Interval) -> bool:
    """Whether an interval ends with update number `step`.

    >>> [step for step in range(1, 11) if is_due(step, Fraction(5, 2))]
    [3, 5, 8, 10]
    """
    # With fractions of epochs a multiple falls between two steps, and the later one is due.
    return step // every > (step - 1) // every


def _constant(_step: int, _total: int, _warmup: int, _cycles: int) -> float:
    return 1.0


def _linear(step: int, total: int, warmup: int, _cycles: int) -> float:
    return (total - step) / max(1, total - warmup)


def _cosine(step: int, total: int, warmup: int, _cycles: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _cosine_with_restarts(step: int, total: int, warmup: int, cycles: int) -> float:
    """Loshchilov and Hutter 2017 (arXiv:1608.03983), cycles of equal length."""
    if step >= total:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * (cycles * (step - warmup) / max(1, total - warmup) % 1.0)))


def _stable_then_cosine(step: int, total: int, warmup: int, _cycles: int) -> float:
    # A long warm-up leaves less than a fifth for the decay, which then begins at once.
    decay = min(math.ceil(WSD_DECAY_SHARE * total), total - warmup)
    begin = total - decay
    if step == total:
        return 0.0
    return 1.0 if step < begin else 0.5 * (1.0 + math.cos(math.pi * (step - begin) / max(1, decay)))


SCHEDULES: dict[str, Callable[[int, int, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "polynomial": _linear,
    "wsd": _stable_then_cosine,
}
