"""The losses that compare answers: their formulas recomputed in NumPy, in float64, and the laws that hold of them."""

import math

import numpy as np
import pytest
import torch

from llmtune.engine import preference_loss
from llmtune.engine.preference_loss import (
    PairLogProbs,
    dpo_losses,
    kto_losses,
    log_odds,
    log_ratios,
    orpo_losses,
    simpo_losses,
    token_means,
)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


@pytest.fixture
def pairs():
    """Log-probabilities of 64 pairs, from nearly certain answers to hopeless ones, in float64."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, (2, 64))
    policy, reference = -rng.gamma(1.0, 2.0, (2, 64)) * tokens, -rng.gamma(1.0, 2.0, (2, 64)) * tokens
    parts = (policy[0], policy[1], tokens[0], tokens[1], reference[0], reference[1])
    return PairLogProbs(*(torch.tensor(part) for part in parts))


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_dpo_and_its_forms(pairs):
    chosen, rejected, tokens, other_tokens, reference, other_reference = (part.numpy() for part in pairs)
    d = (chosen - reference) - (rejected - other_reference)
    ratios = log_ratios(pairs)
    close(dpo_losses(*ratios, loss="sigmoid", beta=0.3), -log_sigmoid(0.3 * d))
    smoothed = dpo_losses(*ratios, loss="sigmoid", beta=0.3, label_smoothing=0.2)
    close(smoothed, -0.8 * log_sigmoid(0.3 * d) - 0.2 * log_sigmoid(-0.3 * d))
    close(dpo_losses(*ratios, loss="hinge", beta=0.3), np.maximum(0, 1 - 0.3 * d))
    by_token = (chosen - reference) / tokens - (rejected - other_reference) / other_tokens
    close(dpo_losses(*log_ratios(pairs, by_token=True), loss="ipo", beta=0.3), (by_token - 1 / 0.6) ** 2)


def test_simpo_and_orpo_compare_means_of_tokens(pairs):
    chosen, rejected, tokens, other_tokens, *_ = (part.numpy() for part in pairs)
    mean, other = chosen / tokens, rejected / other_tokens
    expected = -log_sigmoid(2.5 * (mean - other) - 0.5 * 2.5)
    close(simpo_losses(*token_means(pairs), beta=2.5, gamma_beta_ratio=0.5), expected)

    def odds(m):
        return m - np.log1p(-np.exp(m))

    np.testing.assert_allclose(
        orpo_losses(*token_means(pairs), beta=0.2).numpy(), -0.2 * log_sigmoid(odds(mean) - odds(other)), rtol=1e-9
    )


def test_kto_and_apo_zero():
    rng = np.random.default_rng(1)
    ratios, good = rng.normal(0, 5, 50), rng.random(50) < 0.5
    weights = np.where(good, 1.5, 0.5)
    for loss, z0 in (("kto", 0.7), ("apo_zero", 0.0)):
        sign = np.where(good, 1, -1)
        expected = weights * (1 - 1 / (1 + np.exp(-0.1 * sign * (ratios - z0))))
        found = kto_losses(torch.tensor(ratios), torch.tensor(good), loss=loss, beta=0.1, z0=0.7, weights=(1.5, 0.5))
        close(found, expected)


@pytest.mark.parametrize("mean", [-30.0, -5.0, -math.log(2), -0.5, -1e-3, -1e-5, -1e-7])
def test_log_odds_are_right_in_float32_from_certain_to_hopeless(mean):
    """The naive form log(1 - exp(m)) is infinite from m = -6e-8 on, and off by a tenth at -1e-6."""
    given = torch.tensor([mean], dtype=torch.float32, requires_grad=True)
    found = log_odds(given)
    exact = float(given.detach().double())
    assert found.item() == pytest.approx(exact - math.log(-math.expm1(exact)), rel=2e-6, abs=2e-7)
    found.backward()
    assert given.grad.item() == pytest.approx(1 / -math.expm1(exact), rel=2e-6)


def test_a_certain_answer_has_finite_odds_and_gradient():
    given = torch.tensor([0.0, -1e-12, -1.0], requires_grad=True)
    log_odds(given).sum().backward()
    assert torch.isfinite(given.grad).all()


def test_swapping_the_sides_changes_the_loss_by_the_reward_difference(pairs):
    """L(d) - L(-d) = -beta d."""
    chosen, rejected = log_ratios(pairs)
    loss = dpo_losses(chosen, rejected, loss="sigmoid", beta=0.3)
    swapped = dpo_losses(rejected, chosen, loss="sigmoid", beta=0.3)
    close(loss - swapped, (-0.3 * (chosen - rejected)).numpy())


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_what_both_sides_gain_alike_changes_nothing(pairs, loss):
    moved = pairs._replace(chosen=pairs.chosen + 7, rejected=pairs.rejected + 7)
    both = [dpo_losses(*log_ratios(each), loss=loss, beta=0.1) for each in (pairs, moved)]
    close(both[0], both[1].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_equal_to_its_reference_starts_at_exactly_these_losses(pairs, dtype):
    same = PairLogProbs(*(part.to(dtype) for part in pairs))
    same = same._replace(reference_chosen=same.chosen, reference_rejected=same.rejected)
    chosen, rejected = log_ratios(same)
    half = torch.tensor(0.5, dtype=dtype)
    expected = {"sigmoid": -torch.nn.functional.logsigmoid(torch.zeros((), dtype=dtype)), "hinge": 2 * half}
    for loss, value in expected.items():
        assert (dpo_losses(chosen, rejected, loss=loss, beta=0.1) == value).all()
    ipo = dpo_losses(*log_ratios(same, by_token=True), loss="ipo", beta=0.5)
    assert (ipo == 1).all()  # 1 / (4 beta^2)
    is_good = torch.arange(64) % 2 == 0
    kto = kto_losses(chosen, is_good, loss="kto", beta=0.1, z0=0.0, weights=(2.0, 1.0))
    assert (kto == torch.where(is_good, 2 * half, half)).all()


def test_labels_smoothed_by_half_pull_nowhere_at_the_start():
    chosen = torch.zeros(5, requires_grad=True)
    dpo_losses(chosen, torch.zeros(5), loss="sigmoid", beta=0.1, label_smoothing=0.5).sum().backward()
    assert (chosen.grad == 0).all()


MUTANTS = {
    "one reference for both": (
        "pairs.rejected - pairs.reference_rejected",
        "pairs.rejected - pairs.reference_chosen",
    ),
    "smoothing left out": ("label_smoothing * functional.logsigmoid(-beta", "0 * functional.logsigmoid(-beta"),
    "IPO on sums": ("if by_token else (chosen, rejected)", "if False else (chosen, rejected)"),
    "the odds of the other branch": ("near.where(is_near, far)", "near.where(~is_near, far)"),
    "sides of KTO exchanged": ("gain.where(is_desirable_S, -gain)", "gain.where(~is_desirable_S, -gain)"),
    "a margin without beta": (
        "beta * (chosen - rejected - gamma_beta_ratio)",
        "(beta * (chosen - rejected) - gamma_beta_ratio)",
    ),
}


def exchange(mutant, monkeypatch, before, after):
    """Put the functions of a broken copy in the place of ours."""
    broken = mutant(preference_loss, before, after)
    for name in ("dpo_losses", "kto_losses", "log_odds", "log_ratios", "orpo_losses", "simpo_losses"):
        monkeypatch.setitem(globals(), name, getattr(broken, name))


@pytest.mark.parametrize(("before", "after"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_copy_of_the_losses_is_found(pairs, mutant, monkeypatch, before, after):
    exchange(mutant, monkeypatch, before, after)
    with pytest.raises(AssertionError):  # noqa: PT012 - one of them finds it
        test_dpo_and_its_forms(pairs)
        test_simpo_and_orpo_compare_means_of_tokens(pairs)
        test_kto_and_apo_zero()


LAWS = {
    "swap": (
        test_swapping_the_sides_changes_the_loss_by_the_reward_difference,
        ("losses = -functional.logsigmoid(beta * difference)", "losses = -functional.logsigmoid(difference)"),
    ),
    "constant": (
        lambda pairs: test_what_both_sides_gain_alike_changes_nothing(pairs, "hinge"),
        ("difference = chosen - rejected\n", "difference = chosen - 0.9 * rejected\n"),
    ),
    "start": (
        lambda pairs: test_a_model_equal_to_its_reference_starts_at_exactly_these_losses(pairs, torch.float32),
        ("pairs.chosen - pairs.reference_chosen, pairs", "pairs.chosen, pairs"),
    ),
    "start in bf16, compared later": (
        lambda pairs: test_a_model_equal_to_its_reference_starts_at_exactly_these_losses(pairs, torch.bfloat16),
        (
            "pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected",
            "pairs.chosen - pairs.rejected, pairs.reference_chosen - pairs.reference_rejected * 1.01",
        ),
    ),
    "half smoothing": (
        lambda _: test_labels_smoothed_by_half_pull_nowhere_at_the_start(),
        ("- label_smoothing * functional.logsigmoid(-beta", "+ label_smoothing * functional.logsigmoid(-beta"),
    ),
}
"""The test of a law, and what breaks it."""


@pytest.mark.parametrize(("law", "change"), LAWS.values(), ids=LAWS)
def test_a_copy_that_breaks_a_law_is_found(pairs, mutant, monkeypatch, law, change):
    exchange(mutant, monkeypatch, *change)
    with pytest.raises(AssertionError):
        law(pairs)
