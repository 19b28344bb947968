"""N7: every schedule equals its closed form and `transformers.get_scheduler` at every step."""

import math
import re
from dataclasses import replace

import pytest
import torch

from llmtune.config.schema import TrainingConfig
from llmtune.engine import schedule
from llmtune.engine.schedule import SCHEDULES, interval, is_due, learning_rate_at, schedule_of, warmup_length
from llmtune.errors import ConfigError

PEAK = 3e-4
LENGTHS = [(1, 0), (1, 1), (2, 1), (10, 0), (10, 3), (10, 10), (101, 7)]
THEIR_NAMES = {"wsd": "warmup_stable_decay"}


def their_rates(name, total, warmup, **options):
    """Learning rates of the first `total` updates by transformers."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if name == "wsd":
        options |= {"num_decay_steps": min(math.ceil(total / 5), total - warmup)}
    scheduler = get_scheduler(
        THEIR_NAMES.get(name, name),
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=options,
    )
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(total - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def our_rates(name, total, warmup, min_lr_ratio=0.0, module=schedule):
    rate = module.learning_rate_at(name, peak=PEAK, total_steps=total, warmup_steps=warmup, min_lr_ratio=min_lr_ratio)
    return [rate(step) for step in range(total)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
def test_every_schedule_is_that_of_transformers_at_every_step(name, total, warmup):
    """N7, with no warm-up, nothing but warm-up, and one step in all."""
    assert our_rates(name, total, warmup) == pytest.approx(their_rates(name, total, warmup), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("cycles", [1, 2, 5])
@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
def test_restarts_are_those_of_transformers_at_every_step(total, warmup, cycles):
    """N7."""
    rate = learning_rate_at(
        "cosine_with_restarts", peak=PEAK, total_steps=total, warmup_steps=warmup, num_cycles=cycles
    )
    theirs = their_rates("cosine_with_restarts", total, warmup, num_cycles=cycles)
    assert [rate(step) for step in range(total)] == pytest.approx(theirs, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
def test_cosine_with_a_floor_is_that_of_transformers(total, warmup):
    """N7: `cosine_with_min_lr` rises from 0 and ends at the floor."""
    theirs = their_rates("cosine_with_min_lr", total, warmup, min_lr_rate=0.1)
    assert our_rates("cosine", total, warmup, 0.1) == pytest.approx(theirs, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
def test_polynomial_and_wsd_with_a_floor_are_those_of_transformers_after_the_warmup(total, warmup):
    """N7. In its warm-up transformers' wsd starts at the floor; all of ours start at 0."""
    polynomial = their_rates("polynomial", total, warmup, lr_end=0.1 * PEAK)
    assert our_rates("polynomial", total, warmup, 0.1) == pytest.approx(polynomial, rel=1e-12, abs=1e-18)
    wsd = their_rates("wsd", total, warmup, min_lr_ratio=0.1)
    assert our_rates("wsd", total, warmup, 0.1)[warmup:] == pytest.approx(wsd[warmup:], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0, 0.5, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]),
        ("constant", [1] * 10),
        ("constant_with_warmup", [0, 0.5] + [1] * 8),
        ("polynomial", [0, 0.5, *(1 - k / 8 * (1 - 1e-7 / PEAK) for k in range(8))]),
        ("wsd", [0, 0.5] + [1] * 7 + [0.5]),
    ],
)
def test_closed_forms(name, expected):
    """N7, in fractions of the peak: ten steps, two of them warm-up."""
    assert our_rates(name, 10, 2) == pytest.approx([PEAK * one for one in expected])


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "wsd"])
def test_the_rate_ends_at_the_floor_and_stays_there(name):
    rate = learning_rate_at(name, peak=1.0, total_steps=10, warmup_steps=2, min_lr_ratio=0.25)
    assert (rate(10), rate(11), rate(99)) == (0.25, 0.25, 0.25)
    assert min(rate(step) for step in range(2, 10)) >= 0.25


def test_a_rate_depends_on_its_step_only():
    """N7 across resume: asked in any order, from a function built anew."""
    steps = [7, 0, 9, 3]
    assert [our_rates("cosine", 10, 2)[step] for step in steps] == [
        learning_rate_at("cosine", peak=PEAK, total_steps=10, warmup_steps=2)(step) for step in steps
    ]


def test_a_warmup_off_by_one_is_caught(mutant):
    """N7's test fails when the first update is not the one at rate 0."""
    broken = mutant(schedule, "peak * (step / warmup_steps)", "peak * ((step + 1) / warmup_steps)")
    assert our_rates("linear", 10, 3, module=broken) != pytest.approx(their_rates("linear", 10, 3), rel=1e-6)


def test_a_warmup_ratio_is_rounded_up_from_the_decimal_that_was_written():
    assert [warmup_length(total, None, 0.03) for total in (1, 33, 34, 100, 1000)] == [1, 1, 2, 3, 30]
    assert 0.07 * 100 > 7
    assert warmup_length(100, None, 0.07) == 7
    assert (warmup_length(5, None, 0.0), warmup_length(5, None, 1.0), warmup_length(5, 2, None)) == (0, 5, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: learning_rate_at("linear", peak=1.0, total_steps=3, warmup_steps=4),
            "warm-up of 4 steps in a training of 3",
        ),
        (lambda: learning_rate_at("step", peak=1.0, total_steps=3), "unknown schedule `step`"),
        (lambda: warmup_length(10, 1, 0.1), r"both warmup_steps \(1\) and warmup_ratio \(0.1\)"),
        (lambda: warmup_length(10, None, 1.5), "warmup_ratio is 1.5"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_with_its_value(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


@pytest.mark.parametrize(
    "settings",
    [{"warmup_ratio": 0.1}, {"warmup_steps": 1}, {"warmup_ratio": 1.0, "lr_schedule": "wsd"}],
    ids=["a ratio rounded up to the only step", "one step", "all of the run"],
)
def test_a_run_of_which_every_rate_is_zero_is_refused_with_a_fix_that_works(settings):
    """Rounding up makes one step of warm-up of any ratio, and the first step of a warm-up has rate 0."""
    training = replace(TrainingConfig(), learning_rate=PEAK, **settings)
    with pytest.raises(ConfigError, match="nothing would be trained: the learning rate of every step is 0") as error:
        schedule_of(training, 1)
    key = re.search(r"set `training\.(\w+)=0`", error.value.problems[0].fix)[1]
    assert schedule_of(replace(training, **{key: 0}), 1)(0) == PEAK
    assert schedule_of(training, 2)(1) > 0


@pytest.mark.parametrize(
    ("every_steps", "every_epochs", "steps"),
    [
        (None, None, None),
        (4, None, [4, 8, 12, 16, 20]),
        (0.3, None, [7, 14, 21]),
        (0.001, None, list(range(1, 24))),
        (100, None, []),
        (None, 1, [6, 12, 18]),
        (None, 0.5, [3, 6, 9, 12, 15, 18, 21]),
        (None, 0.25, [2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23]),
        (None, 0.01, list(range(1, 24))),
        (None, 2, [12]),
        (None, 1.5, [9, 18]),
    ],
)
def test_an_interval_in_steps_parts_of_the_run_or_epochs(every_steps, every_epochs, steps):
    """23 steps, 6 an epoch. Epochs end where they end, also where the interval does not divide them."""
    every = interval(every_steps, every_epochs, total_steps=23, steps_per_epoch=6)
    assert (every if every is None else [step for step in range(1, 24) if is_due(step, every)]) == steps


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.07, 0.5, 0.999])
@pytest.mark.parametrize("total", [1, 7, 100, 2300])
def test_a_fraction_of_all_steps_is_that_of_the_trainer_of_transformers(fraction, total):
    from transformers import TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir="unused", eval_steps=fraction, eval_strategy="steps", report_to="none")
    state = TrainerState(max_steps=total)
    state.compute_steps(arguments, total)
    assert abs(interval(fraction, None, total_steps=total, steps_per_epoch=1) - state.eval_steps) <= (fraction == 0.07)
