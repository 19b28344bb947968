"""N7: every schedule equals its closed form and `transformers.get_scheduler` at every step."""

import math

import pytest
import torch

from llmtune.engine import schedule
from llmtune.engine.schedule import SCHEDULES, learning_rate_at, warmup_length
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
