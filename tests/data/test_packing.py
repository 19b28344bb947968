"""Packs: every example once, never split, little waste, the same plan for the same seed."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data.dataset import packing
from llmtune.data.dataset.packing import STRATEGIES, packing_efficiency, plan_packs, seeded_order
from llmtune.errors import DataError

PACKING = ["greedy", "first_fit", "best_fit"]


def long_tailed(count, seed=0, longest=2048):
    """Lengths as real conversations have them: a median of 270 tokens, a tail to the limit."""
    lengths = np.random.default_rng(seed).lognormal(5.6, 1.0, count).astype(np.int64)
    return np.clip(lengths, 4, longest)


def plan(lengths, limit, strategy, seed=None):
    return [pack.tolist() for pack in plan_packs(np.array(lengths), limit, strategy, seed)]


def test_small_plans_by_hand():
    lengths = [6, 5, 4, 3, 2]
    assert plan(lengths, 10, "none") == [[0], [1], [2], [3], [4]]
    assert plan(lengths, 10, "greedy") == [[0], [1, 2], [3, 4]]
    assert plan(lengths, 10, "first_fit") == [[0, 2], [1, 3, 4]]
    assert plan([7, 6, 3, 4], 10, "first_fit") == plan([7, 6, 3, 4], 10, "best_fit") == [[0, 2], [1, 3]]
    assert plan([], 10, "best_fit") == []


def test_best_fit_takes_the_tightest_pack_and_first_fit_the_oldest():
    """After 17, 13 + 5 and 13 the rooms are 3, 2 and 7: the last example, of 2, tells the rules apart."""
    lengths = [17, 13, 13, 5, 2]
    assert plan(lengths, 20, "first_fit") == [[0, 4], [1, 3], [2]]
    assert plan(lengths, 20, "best_fit") == [[0], [1, 3, 4], [2]]


def naive(lengths, limit, tightest):
    """First-fit or best-fit decreasing, one example at a time; the number of packs and their sorted contents by length."""  # noqa: E501
    packs = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= limit]
        if not fitting:
            packs.append([length])
        elif tightest:
            max(fitting, key=sum).append(length)
        else:
            fitting[0].append(length)
    return sorted(sorted(pack) for pack in packs)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.integers(20, 30),
    st.sampled_from(["first_fit", "best_fit"]),
)
@settings(max_examples=300, deadline=None)
def test_the_fast_rules_are_the_textbook_ones(lengths, limit, strategy):
    """The sweeps over equal lengths fill packs exactly as one example at a time does."""
    packs = plan_packs(np.array(lengths), limit, strategy, None)
    ours = sorted(sorted(lengths[index] for index in pack) for pack in packs)
    assert ours == naive(lengths, limit, strategy == "best_fit")


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80),
    st.sampled_from(list(STRATEGIES)),
    st.none() | st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_every_example_is_in_exactly_one_pack_and_none_is_overfull(lengths, strategy, seed):
    packs = plan(lengths, 50, strategy, seed)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 50 for pack in packs)
    assert all(packs)


@pytest.mark.parametrize("strategy", ["first_fit", "best_fit"])
def test_less_than_three_percent_is_waste_on_long_tailed_lengths(strategy):
    """The figure of the packing promise, at 2048 tokens; greedy wastes about a sixth."""
    lengths = long_tailed(20_000)
    assert packing_efficiency(lengths, plan_packs(lengths, 2048, strategy, 1), 2048) > 0.97
    assert packing_efficiency(lengths, plan_packs(lengths, 2048, "greedy", 1), 2048) > 0.8


@pytest.mark.parametrize("strategy", PACKING)
def test_a_million_examples_are_planned_in_seconds(strategy):
    lengths = long_tailed(1_000_000)
    begin = time.process_time()
    packs = plan_packs(lengths, 2048, strategy, 1)
    assert time.process_time() - begin < 10
    assert sum(len(pack) for pack in packs) == 1_000_000


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_seed_means_one_plan(strategy):
    lengths = long_tailed(500)
    assert plan(lengths, 2048, strategy, 1) == plan(lengths, 2048, strategy, 1)
    assert plan(lengths, 2048, strategy, 1) != plan(lengths, 2048, strategy, 2)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_without_a_seed_the_order_of_the_files_is_kept(strategy):
    """Within a pack, and over the packs by their first example."""
    packs = plan(long_tailed(500), 2048, strategy, None)
    assert all(pack == sorted(pack) for pack in packs)
    assert packs == sorted(packs, key=lambda pack: pack[0])


def test_the_seeded_order_is_written_down():
    """The stream of PCG64 is fixed for ever: these numbers may never change, or resumed runs would see other rows."""
    assert seeded_order(8, 42, 0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    assert sorted(seeded_order(1000, 42, 7).tolist()) == list(range(1000))


@pytest.mark.parametrize(
    ("lengths", "problem"),
    [
        ([3, 11, 12], r"example 1 has 11 tokens, a pack holds 10 \(2 such examples\)"),
        ([3, 0], r"example 1 has no tokens \(1 such examples\)"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_its_number(lengths, problem):
    with pytest.raises(DataError, match=problem):
        plan(lengths, 10, "best_fit")


def test_an_unknown_strategy_is_refused():
    with pytest.raises(DataError, match="unknown packing `tetris`"):
        plan([1], 10, "tetris")


def test_a_long_example_needs_no_pack_when_nothing_is_packed():
    assert plan([99, 1], 10, "none") == [[0], [1]]


def test_the_strategies_are_those_of_the_config():
    from typing import get_args, get_type_hints

    from llmtune.config.schema import DataConfig

    assert get_args(get_type_hints(DataConfig)["packing"]) == tuple(packing.STRATEGIES)
