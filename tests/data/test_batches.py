"""P3, P9: which rows make which step is a pure function of its number; how they are cut and laid out changes nothing
else.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from example_list import ExampleList
from llmtune.data.dataset.batches import BatchPlan, eval_batches
from llmtune.data.dataset.micro_batch import even_groups, make_micro_batch
from llmtune.data.dataset.packing import plan_packs
from llmtune.data.example import Example
from llmtune.errors import ConfigError, DataError


def make_examples(count=23, seed=0):
    rng = np.random.default_rng(seed)
    return ExampleList(
        [
            Example(f"a:{i}", rng.integers(1, 99, n).astype(np.int32), np.r_[0, rng.random(n - 1)].astype(np.float32))
            for i, n in enumerate(rng.integers(2, 30, count).tolist())
        ]
    )


def make_plan(examples=None, *, packing="none", **changes):
    examples = examples or make_examples()
    options = {"batch_size": 2, "accumulation": 2, "epochs": 3, "max_steps": None, "shuffle_seed": 5} | changes
    return BatchPlan(examples, plan_packs(examples.lengths, 64, packing, options["shuffle_seed"]), **options)


def rows_of(window):
    return [source for batch in window.micro_batches for source in batch.sources]


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    """P3, with the rows that are left over in a smaller window."""
    plan = make_plan()
    assert (plan.steps_per_epoch, plan.total_steps, plan.num_packs) == (6, 18, 23)
    epochs = [[row for step in range(6) for row in rows_of(plan.window(6 * epoch + step + 1))] for epoch in range(3)]
    assert all(sorted(rows) == sorted(f"a:{i}" for i in range(23)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [plan.window(6).num_sequences, plan.window(5).num_sequences] == [3, 4]


def test_a_window_is_a_pure_function_of_its_step():
    """P3: asked in any order, from a plan built anew, the same rows, tensors and numbers; resuming costs nothing."""
    for step in (18, 1, 7, 7):
        ours, theirs = make_plan().window(step), list(make_plan().windows())[step - 1]
        assert (ours.step, ours.epoch, ours.sources, ours.loss_weight) == (
            theirs.step,
            theirs.epoch,
            theirs.sources,
            theirs.loss_weight,
        )
        assert all(
            torch.equal(a.input_ids, b.input_ids) for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True)
        )
    assert [window.step for window in make_plan().windows(start_step=15)] == [16, 17, 18]


def test_without_a_seed_rows_come_in_the_order_of_the_files():
    plan = make_plan(shuffle_seed=None)
    assert plan.window(1).sources == plan.window(7).sources == ("a:0", "a:1", "a:2", "a:3")


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_step_has_the_same_rows_on_any_number_of_processes(packing):
    """P9: one global batch of 8, cut eight ways."""
    plan_of_one = make_plan(packing=packing, batch_size=8, accumulation=1)
    for world_size, batch_size, accumulation in [(1, 2, 4), (2, 4, 2), (2, 1, 8), (4, 2, 4), (8, 8, 1)]:
        cut = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world_size, "packing": packing}
        ranks = [make_plan(rank=rank, **cut) for rank in range(world_size)]
        assert {plan.total_steps for plan in ranks} == {plan_of_one.total_steps}
        assert {plan.digest for plan in ranks} == {plan_of_one.digest}
        for step in range(1, plan_of_one.total_steps + 1):
            windows = [plan.window(step) for plan in ranks]
            assert {window.sources for window in windows} == {plan_of_one.window(step).sources}
            assert {window.rows_digest for window in windows} == {plan_of_one.window(step).rows_digest}
            assert sorted(row for window in windows for row in rows_of(window)) == sorted(
                plan_of_one.window(step).sources
            )
            assert sum(window.loss_weight for window in windows) == pytest.approx(
                plan_of_one.window(step).loss_weight, rel=1e-12
            )
            assert sum(window.num_tokens for window in windows) == plan_of_one.window(step).num_tokens


def test_a_process_may_get_no_row():
    """N2's hard case: 23 rows in windows of 4 leave 3 for four processes."""
    counts = [
        make_plan(batch_size=4, accumulation=1, world_size=4, rank=rank).window(6).num_sequences for rank in range(4)
    ]
    assert sorted(counts) == [0, 1, 1, 1]


def test_tokens_are_dealt_evenly():
    """No process waits long for another: the fullest has at most a tenth more than the mean."""
    examples = make_examples(512)
    shares = [
        make_plan(examples, batch_size=64, accumulation=4, world_size=4, rank=rank, epochs=1).window(1).num_tokens
        for rank in range(4)
    ]
    assert max(shares) < 1.1 * np.mean(shares)


def test_a_window_counts_what_it_holds():
    plan = make_plan(packing="best_fit")
    for window in plan.windows():
        batches = list(window.micro_batches)
        assert window.num_tokens == sum(batch.num_tokens for batch in batches)
        assert window.num_sequences == sum(batch.num_sequences for batch in batches) == len(window.sources)
        assert window.loss_weight == pytest.approx(sum(batch.loss_weight for batch in batches), rel=1e-6)
        assert len(window.micro_batches[:1]) == 1
    assert (
        sum(plan.window(step).num_tokens for step in range(1, plan.steps_per_epoch + 1))
        == make_examples().lengths.sum()
    )


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"),
    [
        (1, None, 6),
        (3, None, 18),
        (0.5, None, 3),
        (0.1, None, 1),
        (1.5, None, 9),
        (2.01, None, 13),
        (3, 4, 4),
        (1, 100, 100),
    ],
)
def test_the_number_of_steps_is_exact(epochs, max_steps, total):
    plan = make_plan(epochs=epochs, max_steps=max_steps)
    windows = list(plan.windows())
    assert (plan.total_steps, len(windows), windows[-1].step) == (total, total, total)
    assert windows[-1].progress == 1.0


def test_a_fraction_of_an_epoch_is_the_decimal_that_was_written():
    """0.07 of 100 windows are 7, where floating point makes 7.000000000000001."""
    assert 0.07 * 100 > 7
    assert make_plan(make_examples(400), epochs=0.07).total_steps == 7


def test_epochs_are_counted_in_rows():
    plan = make_plan()
    assert [plan.window(step).epoch for step in (1, 6, 7, 18)] == [4 / 23, 1.0, 1 + 4 / 23, 3.0]


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("limit", [1, 20, 64])
def test_groups_cut_micro_batches_and_leave_windows(layout, limit):
    """A group holds at most so many positions, unless one example alone has more; the rows of the step stay."""
    uncut, cut = make_plan(layout=layout, batch_size=8), make_plan(layout=layout, batch_size=8, max_group_tokens=limit)
    for step in range(1, uncut.total_steps + 1):
        groups = list(cut.window(step).micro_batches)
        assert all(group.input_ids.numel() <= limit or group.num_sequences == 1 for group in groups)
        assert sorted(rows_of(cut.window(step))) == sorted(rows_of(uncut.window(step)))
        assert cut.window(step).sources == uncut.window(step).sources
        assert cut.window(step).loss_weight == uncut.window(step).loss_weight
    assert cut.digest == uncut.digest


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), limit=st.integers(1, 80))
@example(sizes=[30, 1, 1, 1, 30, 1], limit=10)
def test_groups_of_a_flat_row_are_few_and_even(sizes, limit):
    """Each example once and in order; only a single larger example is over the limit; at most one group more than
    filling one after the other takes; so even that without its smallest member no group holds more than another."""
    groups = even_groups(sizes, limit)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert groups == sorted(sorted(group) for group in groups)
    larger = [group for group in groups if sizes[group[0]] > limit]
    assert all(len(group) == 1 for group in larger)
    sums = {tuple(group): sum(sizes[index] for index in group) for group in groups if group not in larger}
    assert max(sums.values(), default=0) <= limit
    assert len(groups) <= in_order_count(sizes, limit) + 1
    assert all(total - min(sizes[index] for index in group) <= min(sums.values()) for group, total in sums.items())


def in_order_count(sizes, limit):
    """Groups that filling one after the other takes."""
    count, total = 1, 0
    for size in sizes:
        if total and total + size > limit:
            count, total = count + 1, 0
        total += size
    return count


def test_a_window_is_cut_into_no_more_groups_than_needed():
    """In order these lengths take five groups of at most 1,536; evenly four do, and the largest of them gets smaller."""  # noqa: E501
    sizes = [466, 281, 872, 833, 334, 566, 652, 779]
    groups = even_groups(sizes, 1536)
    assert in_order_count(sizes, 1536) == 5
    assert [sum(sizes[index] for index in group) for group in groups] == [1245, 1153, 1167, 1218]


def test_padded_micro_batches_put_equal_lengths_together():
    """Positions spent on padding are fewer than in the order of the rows."""
    plan = make_plan(make_examples(64), batch_size=4, accumulation=8)
    padded = sum(batch.input_ids.numel() for batch in plan.window(1).micro_batches)
    lengths = {f"a:{i}": length for i, length in enumerate(make_examples(64).lengths.tolist())}
    in_order = [[lengths[row] for row in plan.window(1).sources[i : i + 4]] for i in range(0, 32, 4)]
    assert padded < 0.8 * sum(4 * max(group) for group in in_order)


def three():
    return [
        Example("a:1", np.array([5, 6, 7], np.int32), np.array([0, 1, 0.5], np.float32)),
        Example("a:2", np.array([8], np.int32), np.array([0], np.float32)),
        Example("a:3", np.array([9, 10], np.int32), np.array([0, 1], np.float32)),
    ]


def test_the_flat_layout():
    batch = make_micro_batch(three(), "flat", 0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.weights.tolist() == [[0, 1, 0.5, 0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.segments.tolist() == [0, 3, 4, 6]
    assert batch.attention_mask is None
    assert (batch.num_tokens, batch.num_sequences, batch.loss_weight, batch.sources) == (
        6,
        3,
        2.5,
        ("a:1", "a:2", "a:3"),
    )
    kinds = (batch.input_ids.dtype, batch.weights.dtype, batch.position_ids.dtype, batch.segments.dtype)
    assert kinds == (torch.int64, torch.float32, torch.int64, torch.int32)


def test_the_padded_layout():
    batch = make_micro_batch(three(), "padded", 42)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 42, 42], [9, 10, 42]]
    assert batch.weights.tolist() == [[0, 1, 0.5], [0, 0, 0], [0, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2]] * 3
    assert batch.attention_mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert batch.segments is None
    assert (batch.num_tokens, batch.num_sequences, batch.loss_weight) == (6, 3, 2.5)
    assert make_micro_batch(three()[:1] * 2, "padded", 0).attention_mask is None


def test_nothing_predicts_across_a_border():
    """The first token of every example has weight 0 in every layout; an example that breaks this is our own bug."""
    plan = make_plan(packing="best_fit", layout="flat")
    for window in plan.windows():
        for batch in window.micro_batches:
            assert (batch.weights[0, batch.segments[:-1].long()] == 0).all()
            assert (batch.position_ids[0, batch.segments[:-1].long()] == 0).all()
    broken = Example("a:1", np.array([5, 6], np.int32), np.array([1, 1], np.float32))
    with pytest.raises(AssertionError, match="first token"):
        make_micro_batch([broken], "flat", 0)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_evaluation_sees_every_example_once_longest_first(layout):
    """Rows are taken longest first, a batch at a time; a flat batch may be cut anywhere."""
    examples = make_examples()
    batches = list(eval_batches(examples, batch_size=4, layout=layout, pad_id=0, max_group_tokens=60))
    rows = [row for batch in batches for row in batch.sources]
    assert sorted(rows) == sorted(example.source for example in examples)
    lengths = {example.source: len(example) for example in examples}
    fours = [[lengths[row] for row in rows[begin : begin + 4]] for begin in range(0, len(rows), 4)]
    assert all(min(four) >= max(after) for four, after in pairwise(fours))
    assert layout == "flat" or all(four == sorted(four, reverse=True) for four in fours)
    ranks = [
        eval_batches(examples, batch_size=4, layout=layout, pad_id=0, world_size=3, rank=rank) for rank in range(3)
    ]
    assert sorted(row for batches in ranks for batch in batches for row in batch.sources) == sorted(rows)


def test_the_digest_is_that_of_what_decides_the_rows():
    same = [
        make_plan(),
        make_plan(layout="flat"),
        make_plan(epochs=9),
        make_plan(batch_size=1, accumulation=4),
        make_plan(max_group_tokens=9),
    ]
    assert len({plan.digest for plan in same}) == 1
    others = [
        make_plan(),
        make_plan(shuffle_seed=6),
        make_plan(batch_size=4),
        make_plan(packing="greedy"),
        make_plan(make_examples(22)),
    ]
    assert len({plan.digest for plan in others}) == len(others)


def test_a_plan_without_examples_or_steps_is_refused():
    with pytest.raises(DataError, match="no example to train on"):
        BatchPlan(ExampleList([]), [], batch_size=1, accumulation=1, epochs=1, max_steps=None, shuffle_seed=None)
    with pytest.raises(ConfigError, match=r"`training.epochs` is 0"):
        make_plan(epochs=0)
    with pytest.raises(ConfigError, match=r"`training.max_steps` is 0"):
        make_plan(max_steps=0)
