"""Objectives of a head that gives scores: how a window is cut decides nothing, and the formulas are those of NumPy.

The scores here are a table in float64, so that equal means equal to 1e-12; whole models are in
`tests/training/test_scoring_runs.py`.
"""

import numpy as np
import pytest
import torch

from example_list import ExampleList, windows_of
from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.data.example import Example
from llmtune.engine import scoring
from llmtune.engine.devices import Devices
from llmtune.engine.scoring import last_tokens, macro_f1, reward_losses

CPU = torch.device("cpu")
NAMES = ("bad", "good", "so so")


def make_rows(method, count=11):
    """Ragged rows: pairs of which some have a margin, or rows with one of three labels."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        margin, label = float(number % 3) / 2, NAMES[number % 5 % 3]
        for side in ("chosen", "rejected") if method == "reward" else ("labelled",):
            ids = rng.integers(0, 12, int(rng.integers(2, 12))).astype(np.int32)
            weights = np.array([0] + [1] * (len(ids) - 1), dtype=np.float32)
            judged = {"margin": margin} if method == "reward" else {"label": label}
            examples.append(Example(f"rows.jsonl:{number + 1}", ids, weights, side, **judged))
    return ExampleList(examples)


def results(method, windows, examples):
    """Loss, gradient and metrics of every window; the score of a row is the entry of its last token."""
    found = []
    for window in windows:
        units = 1 if method == "reward" else 3
        table = torch.randn(12, units, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        table.requires_grad_()

        def scores(batch, table=table):
            places = last_tokens(batch, None)
            ids = (
                batch.input_ids[0, places]
                if batch.segments is not None
                else batch.input_ids[range(len(places)), places]
            )
            return table[ids]

        objective = scoring.scoring_objective(examples, scores, ("reward",) if units == 1 else NAMES)
        count = objective.begin_window(window, Devices(CPU))
        loss = 0.0
        for batch in window.micro_batches:
            part = objective.loss_sum(batch)
            (part / count).backward()
            loss += part.item()
        found.append((loss / count, table.grad, objective.measure(Devices(CPU)), window))
    return found


CUTS = {
    "2x2": {"batch_size": 2, "accumulation": 2},
    "1x4": {"batch_size": 1, "accumulation": 4},
    "flat": {"batch_size": 4, "accumulation": 1, "layout": "flat"},
    "flat groups": {"batch_size": 4, "accumulation": 1, "layout": "flat", "group": 30},
}


@pytest.mark.parametrize("method", ["reward", "classification"])
def test_how_a_window_is_cut_decides_nothing(method):
    """11 rows in windows of 4: the last one is ragged."""
    examples = make_rows(method)
    expected = results(method, windows_of(examples, batch_size=4, accumulation=1), examples)
    assert len(expected) == 3
    for cut in CUTS.values():
        found = results(method, windows_of(examples, **cut), examples)
        for (loss, gradient, metrics, _), (other, other_gradient, other_metrics, _) in zip(
            found, expected, strict=True
        ):
            assert loss == pytest.approx(other, rel=1e-12)
            torch.testing.assert_close(gradient, other_gradient, rtol=1e-12, atol=1e-14)
            assert metrics == pytest.approx(other_metrics, rel=1e-12)
            assert gradient.abs().max() > 1e-6


def test_packs_cut_otherwise_give_the_same():
    examples = make_rows("reward", 17)
    cuts = [
        windows_of(examples, batch_size=size, accumulation=4 // size, packing="best_fit", layout="flat")
        for size in (1, 4)
    ]
    for first, second in zip(*(results("reward", cut, examples) for cut in cuts), strict=True):
        assert first[0] == pytest.approx(second[0], rel=1e-12)
        torch.testing.assert_close(first[1], second[1], rtol=1e-12, atol=1e-14)


def test_the_formulas_are_those_of_numpy():
    """Bradley-Terry with its margin, cross-entropy, accuracy without ties, and the mean F1 of the labels."""
    table = torch.randn(12, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()[:, 0]
    examples = make_rows("reward")
    (loss, _, metrics, window), *_ = results("reward", windows_of(examples, batch_size=4, accumulation=1), examples)
    pairs = window.indices.reshape(-1, 2)
    score = np.array([table[examples[int(row)].input_ids[-1]] for row in pairs.reshape(-1)]).reshape(-1, 2)
    margin = np.array([examples[int(row)].margin for row in pairs[:, 0]])
    assert margin.max() > 0
    difference = score[:, 0] - score[:, 1]
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(-(difference - margin)))), rel=1e-12)
    assert metrics["accuracy"] == np.mean(difference > 0)
    assert metrics["rewards_margin"] == pytest.approx(difference.mean(), rel=1e-12)

    table = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    examples = make_rows("classification")
    (loss, _, metrics, window), *_ = results(
        "classification", windows_of(examples, batch_size=11, accumulation=1), examples
    )
    logits = np.array([table[examples[int(row)].input_ids[-1]] for row in window.indices])
    right = np.array([NAMES.index(examples[int(row)].label) for row in window.indices])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert loss == pytest.approx(-log_p[np.arange(11), right].mean(), rel=1e-12)
    given = logits.argmax(axis=1)
    assert metrics["accuracy"] == pytest.approx((given == right).mean())
    f1 = [2 * ((given == k) & (right == k)).sum() / ((given == k).sum() + (right == k).sum()) for k in range(3)]
    assert metrics["macro_f1"] == pytest.approx(np.mean(f1), rel=1e-12)


def test_exchanging_the_sides_changes_the_loss_by_the_difference():
    """L(d) - L(-d) = -d, without a margin; a constant on both scores changes nothing, and a tie is no win."""
    chosen, rejected = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    zero = torch.zeros(50, dtype=torch.float64)
    difference = reward_losses(chosen, rejected, zero) - reward_losses(rejected, chosen, zero)
    torch.testing.assert_close(difference, rejected - chosen, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        reward_losses(chosen + 7, rejected + 7, zero), reward_losses(chosen, rejected, zero), rtol=1e-10, atol=1e-12
    )


def test_a_far_margin_has_a_finite_loss():
    far = torch.tensor([300.0], dtype=torch.float64)
    assert reward_losses(-far, far, far).item() == pytest.approx(900)
    assert macro_f1(np.zeros((3, 3))) == 0.0


def test_a_tie_is_no_win():
    examples = make_rows("reward", 4)
    (window,) = windows_of(examples, batch_size=4, accumulation=1)
    objective = scoring.scoring_objective(examples, lambda batch: torch.zeros(len(batch.sides), 1), ("reward",))
    objective.begin_window(window, Devices(CPU))
    for batch in window.micro_batches:
        objective.loss_sum(batch)
    assert objective.measure(Devices(CPU))["accuracy"] == 0.0


PAD = 0


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_head_reads_the_last_token_that_is_no_padding(layout):
    """Also where rows end with the padding token, as templates do whose end token is used for padding."""
    rows = [[5, 6, 7], [8, PAD], [PAD, PAD], [4, PAD, 3, PAD, PAD], [9]]
    examples = [Example("", np.array(ids, np.int32), np.zeros(len(ids), np.float32)) for ids in rows]
    batch = make_micro_batch(examples, layout, PAD)
    found = last_tokens(batch, PAD).tolist()
    if layout == "flat":
        found = [place - start for place, start in zip(found, batch.segments.tolist()[:-1], strict=True)]
    assert found == [2, 0, 0, 2, 0]
    everything = last_tokens(batch, None).tolist()
    if layout == "flat":
        everything = [place - start for place, start in zip(everything, batch.segments.tolist()[:-1], strict=True)]
    assert everything == [2, 1, 1, 4, 0]


MUTANTS = {
    "a mean of means": (
        "return reward_losses(chosen, rejected, margin).sum()",
        "return reward_losses(chosen, rejected, margin).mean()",
    ),
    "a mean of rows": ('reduction="sum"', 'reduction="mean"'),
    "no margin": ("chosen - rejected - margin", "chosen - rejected"),
    "sides exchanged": ("logsigmoid(chosen - rejected", "logsigmoid(rejected - chosen"),
    "ties are wins": ("(chosen, rejected, chosen > rejected)", "(chosen, rejected, chosen >= rejected)"),
    "half of F1": ("np.mean(2 * right_L", "np.mean(right_L"),
    "padding is read": ("if pad_id is None else ids != pad_id", "if True else ids"),
    "the document before": ("torch.maximum(latest_T[ends - 1], starts)", "latest_T[ends - 1]"),
}


@pytest.mark.parametrize(("before", "after"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_copy_is_found(mutant, monkeypatch, before, after):
    broken = mutant(scoring, before, after)
    monkeypatch.setitem(globals(), "scoring", broken)
    for name in ("last_tokens", "macro_f1", "reward_losses"):
        monkeypatch.setitem(globals(), name, getattr(broken, name))
    with pytest.raises(AssertionError):  # noqa: PT012 - one of them finds it
        test_the_formulas_are_those_of_numpy()
        test_how_a_window_is_cut_decides_nothing("reward")
        test_how_a_window_is_cut_decides_nothing("classification")
        test_exchanging_the_sides_changes_the_loss_by_the_difference()
        test_a_tie_is_no_win()
        test_the_head_reads_the_last_token_that_is_no_padding("flat")
