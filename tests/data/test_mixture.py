"""The mixture law: shares of an epoch exact to one row, every row seen equally often, each epoch a pure function of its
number (P3).
"""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.config.layers import load_config
from llmtune.config.schema import SourceConfig
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.make_dataset import prepare_data, survey_data
from llmtune.data.dataset.mixture import EpochDraws, epoch_counts, plan_epochs
from llmtune.data.rows.preferences import RECOGNIZED_BY
from llmtune.errors import ConfigError, DataError

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def shares_of(weights, total):
    """Shares in proportion to whole weights that add up to `total`, as a config has them."""
    return [round(total * weight / sum(weights), 6) for weight in weights]


@given(sizes=SIZES, weights=st.data(), rest=st.integers(1, 200))
@settings(deadline=None, max_examples=80)
def test_shares_beside_sources_without_one_are_exact_to_one_row(sizes, weights, rest):
    weights = weights.draw(st.lists(st.integers(1, 20), min_size=len(sizes), max_size=len(sizes)))
    shares = shares_of(weights, 0.7)
    sources = [SourceConfig("a", share=share) for share in shares] + [SourceConfig("rest")]
    counts = epoch_counts([*sizes, rest], sources)
    total = sum(counts)
    assert counts[-1] == rest
    assert abs(total - rest / (1 - sum(shares))) <= 0.5 + 1e-6
    assert all(abs(count - share * total) <= 1 for count, share in zip(counts, shares, strict=False))


@given(sizes=SIZES, weights=st.data())
@settings(deadline=None, max_examples=80)
def test_shares_of_all_sources_are_exact_to_one_row_of_an_epoch_as_long_as_all_together(sizes, weights):
    weights = weights.draw(st.lists(st.integers(1, 20), min_size=len(sizes), max_size=len(sizes)))
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    sources = [SourceConfig("a", share=float(share)) for share in shares]
    counts = epoch_counts(sizes, sources)
    assert sum(counts) == sum(sizes)
    assert all(abs(count - share * sum(sizes)) <= 1 for count, share in zip(counts, shares, strict=True))


def test_the_counts_of_an_epoch_by_hand():
    def counts(sizes, *pairs):
        return epoch_counts(sizes, [SourceConfig("a", repeat=repeat, share=share) for repeat, share in pairs])

    assert counts([10, 30], (1, 0.25), (1, None)) == [10, 30]
    assert counts([10, 30], (1, 0.5), (1, 0.5)) == [20, 20]
    assert counts([10, 30], (1, 0.5), (2, None)) == [60, 60]
    assert counts([10, 30], (3, None), (0.1, None)) == [30, 3]
    assert counts([10, 3], (1, None), (0.1, None)) == [10, 1]  # rounded, and never to nothing
    assert counts([7, 7, 7], (1, 1 / 3), (1, 1 / 3), (1, 1 / 3)) == [7, 7, 7]
    assert counts([5, 5], (1, 0.333333), (1, 0.666667)) == [3, 7]


@given(
    sizes=SIZES,
    counts=st.data(),
    seed=st.none() | st.integers(0, 99),
    epochs=st.integers(1, 6),
)
@settings(deadline=None, max_examples=80)
def test_after_any_number_of_epochs_rows_of_a_source_were_seen_equally_often_or_once_more(sizes, counts, seed, epochs):
    counts = counts.draw(st.lists(st.integers(0, 90), min_size=len(sizes), max_size=len(sizes)))
    ends = np.cumsum(sizes)
    groups = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    draws = EpochDraws(groups, counts, seed)
    seen = Counter()
    for epoch in range(epochs):
        order = draws.order(epoch).tolist()
        assert [sum(index in group for index in order) for group in groups] == counts
        seen.update(order)
    for group in groups:
        times = [seen[index] for index in group.tolist()]
        assert max(times) - min(times) <= 1


def test_an_epoch_is_a_pure_function_of_its_number_and_seed():
    groups = [np.arange(10), np.arange(10, 14)]
    orders = [EpochDraws(groups, [3, 9], 7).order(epoch).tolist() for epoch in (4, 0, 4, 1)]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1] != orders[3]
    assert EpochDraws(groups, [3, 9], 8).order(4).tolist() != orders[0]
    # Unlike the rows of a fixed prefix: other rows in the next epoch, all of them in the end.
    first = [set(EpochDraws(groups, [3, 9], 7).order(epoch).tolist()) & set(range(10)) for epoch in range(4)]
    assert first[0] != first[1]
    assert set().union(*first) == set(range(10))


def test_draws_without_a_seed_keep_the_order_of_the_files():
    draws = EpochDraws([np.arange(5), np.arange(5, 7)], [2, 3], None)
    assert [draws.order(epoch).tolist() for epoch in range(2)] == [[0, 1, 5, 6, 5], [2, 3, 6, 5, 6]]


def test_passes_epochs_and_packs_are_ordered_by_different_draws():
    """NumPy fills a short key up with zeros: (seed, 1) and (seed, 1, 0, 0) are one."""
    from llmtune.data.dataset.packing import seeded_order

    assert seeded_order(20, 3, 1).tolist() == seeded_order(20, 3, 1, 0, 0).tolist()
    draws = EpochDraws([np.arange(20), np.arange(20, 40)], [20, 20], 3)
    passes = [draws._pass(place, number).tolist() for place in range(2) for number in range(2)]
    orders = [seeded_order(20, 3).tolist(), *(seeded_order(20, 3, epoch).tolist() for epoch in range(3))]
    zero_based = [[index % 20 for index in order] for order in passes]
    assert len({tuple(order) for order in zero_based + orders}) == len(zero_based) + len(orders) - 1  # (3,) is (3, 0)


# --- through the data of a config


@pytest.fixture
def two_files(write):
    small = write("small.jsonl", [{"text": f"small {number}"} for number in range(4)])
    large = write("large.jsonl", [{"text": f"large row {number}"} for number in range(20)])
    return str(small), str(large)


def plan_of(prepared, data, **changes):
    packs, draws = plan_epochs(prepared.train, data)
    options = {"batch_size": 3, "accumulation": 1, "epochs": 3, "max_steps": None, "shuffle_seed": data.shuffle_seed}
    return BatchPlan(prepared.train, packs, draws=draws, **(options | changes))


def names(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1)
    return Counter(name.split("/")[-1].split(".")[0] for step in steps for name in plan.window(step).sources)


def test_every_epoch_has_its_shares_in_windows_of_the_same_number(two_files, config, renderer):
    small, large = two_files
    data = config(SourceConfig(small, share=0.4, name="few"), large)
    prepared = prepare_data(data, renderer)
    plan = plan_of(prepared, data)
    assert (plan.num_packs, plan.steps_per_epoch, plan.total_steps) == (33, 11, 33)
    assert [names(plan, epoch) for epoch in range(3)] == [Counter(large=20, small=13)] * 3
    said = [str(decision) for decision in prepared.decisions if decision.key.startswith("data.train[")]
    assert said == [
        "data.train[0] = 13 of 4 examples an epoch: `share: 0.4`; 39.39% of an epoch of 33",
        "data.train[1] = 20 of 20 examples an epoch: no `share` of its own; 60.61% of an epoch of 33",
    ]
    assert plan.tokens_of_epoch(1)[0] == sum(plan.window(step).num_tokens for step in range(12, 23))


def test_the_windows_do_not_depend_on_processes_or_micro_batches(two_files, config, renderer):
    small, large = two_files
    data = config(SourceConfig(small, share=0.4), large)
    prepared = prepare_data(data, renderer)
    whole = plan_of(prepared, data, batch_size=4)
    cut = [plan_of(prepared, data, batch_size=1, accumulation=4, world_size=2, rank=rank) for rank in (0, 1)]
    assert [plan.digest for plan in cut] == [whole.digest] * 2
    for step in (1, 5, 9, whole.total_steps):
        assert cut[0].window(step).sources == whole.window(step).sources
        assert sum(plan.window(step).num_tokens for plan in cut) == whole.window(step).num_tokens


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_whole_numbers_of_repeat_are_that_many_times_every_row_also_in_packs(two_files, config, renderer, packing):
    small, large = two_files
    data = config(SourceConfig(small, repeat=3), large, packing=packing, max_length=64)
    plan = plan_of(prepare_data(data, renderer), data)
    assert not plan.draws_anew
    for epoch in range(2):
        assert names(plan, epoch) == Counter(small=12, large=20)


@pytest.mark.parametrize("keys", [{"share": 0.4}, {"repeat": 2.0}, {"repeat": 1.5}])
def test_pairs_of_answers_are_drawn_together(write, config, renderer, keys):
    def pairs(name, count):
        rows = [{"prompt": f"{name} {number}", "chosen": "yes", "rejected": "no"} for number in range(count)]
        return str(write(f"{name}.jsonl", rows))

    data = config(SourceConfig(pairs("few", 3), **keys), pairs("many", 6))
    prepared = prepare_data(data, renderer, formats=RECOGNIZED_BY["dpo"])
    plan = plan_of(prepared, data, batch_size=2, together=2)
    expected = {"share": 4, "repeat": int(keys.get("repeat", 0) * 3 + 0.5)}[next(iter(keys))]
    for epoch in range(3):
        order = plan.order(epoch).reshape(-1, 2)
        assert (order[:, 0] % 2 == 0).all()
        assert (order[:, 1] == order[:, 0] + 1).all()
        assert (order[:, 0] < 6).sum() == expected
        assert len(order) == expected + 6 == plan.num_packs


def test_other_mixtures_are_other_batches_and_names_and_plain_sources_are_not(two_files, config, renderer):
    small, large = two_files

    def digest(**keys):
        data = config(SourceConfig(small, **keys), large)
        return plan_of(prepare_data(data, renderer), data).digest

    digests = [digest(), digest(repeat=2.0), digest(repeat=1.5), digest(share=0.2), digest(share=0.3)]
    assert len(set(digests)) == 5
    assert digest(name="few") == digests[0]


def test_held_out_rows_are_never_among_the_repeated_ones(two_files, config, renderer):
    small, large = two_files
    data = config(SourceConfig(small, repeat=5), SourceConfig(large, repeat=1.5), test_size=6)
    prepared = prepare_data(data, renderer)
    held_out = {example.source for example in prepared.eval}
    assert len(held_out) == 6
    plan = plan_of(prepared, data)
    seen = {name for window in plan.windows() for name in window.sources}
    assert not seen & held_out
    assert len(seen) == 18


def test_a_share_of_no_rows_is_a_problem_of_its_source(two_files, config, renderer, write):
    small, large = two_files
    empty = str(write("empty.jsonl", [{"text": "x"}]))
    data = config(SourceConfig(empty, share=0.4, max_samples=1), large, min_length=5)
    with pytest.raises(DataError, match=r"data.train\[0\]: no row is left of .*empty.jsonl") as caught:
        prepare_data(data, renderer)
    assert len(caught.value.problems) == 1
    assert survey_data(data, renderer).problems
    with pytest.raises(DataError, match=r"data.train\[0\]: `share: 0.001` of an epoch of 20 is no row"):
        prepare_data(config(SourceConfig(small, share=0.001), large), renderer)
    with pytest.raises(DataError, match=r"an epoch would have 200,000 rows"):
        prepare_data(config(SourceConfig(small, share=0.9999), large), renderer)


BAD = {
    "[{path: a, share: 0.5}, {path: b, share: 0.4}]": "add up to 1, not to 0.9",
    "[{path: a, share: 0.5}, {path: b, share: 0.5}, c]": "below 1 together, not 1",
    "[{path: a, share: 0.5, repeat: 2}, b]": "the share decides how often",
    "[{path: a, share: 1.5}, b]": "`share` above 0 and at most 1",
    "[{path: a, repeat: 0}, b]": "`repeat` above 0",
}


@pytest.mark.parametrize("sources", BAD)
def test_shares_that_are_none_are_refused(sources):
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ={}, overrides=[f"data.train={sources}"])
    assert BAD[sources] in str(caught.value)


def test_shares_of_held_out_rows_and_of_packs_are_refused():
    for words in (["data.eval=[{path: a, share: 0.5}]"], ["data.eval=[{path: a, repeat: 2}]"]):
        with pytest.raises(ConfigError, match="which only training rows have"):
            load_config(None, environ={}, overrides=words)
    for keys in ("share: 0.5", "repeat: 1.5"):
        words = [f"data.train=[{{path: a, {keys}}}, b]", "data.packing=greedy"]
        with pytest.raises(ConfigError, match="drawn anew each epoch"):
            load_config(None, environ={}, overrides=words)
