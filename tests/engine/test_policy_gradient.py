"""GRPO's formulas and its window law; whole runs are in `tests/training/test_grpo_runs.py`.

The policy of the window law is a table of logits in float64, so that equal means equal to 1e-12.
"""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.schema import ObjectiveConfig
from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.data.example import Example
from llmtune.engine import policy_gradient
from llmtune.engine.devices import Devices
from llmtune.engine.objective import flat_token_log_probs, plain_token_log_probs
from llmtune.engine.policy_gradient import (
    DrawnAnswer,
    PolicyGradientObjective,
    group_advantages,
    kl_estimates,
    token_losses,
)
from llmtune.engine.preference import resolve_objective
from llmtune.kernels.attention import use_segment_attention
from llmtune.kernels.linear_cross_entropy import find_head

DEVICES = Devices(torch.device("cpu"))
VOCABULARY = 12
PROMPT_TOKENS = 3


# --- formulas


def test_an_advantage_is_the_distance_from_the_mean_in_standard_deviations_of_the_sample():
    rewards = [1.0, 0.0, 0.0, 3.0]
    expected = (np.array(rewards) - 1.0) / (np.std(rewards, ddof=1) + 1e-4)
    assert group_advantages(rewards, scale=True) == pytest.approx(expected.tolist(), abs=1e-12)
    assert group_advantages(rewards, scale=False) == [0.0, -1.0, -1.0, 2.0]


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_a_single_one_and_none_at_all_give_no_advantage(scale):
    assert group_advantages([0.7] * 4, scale=scale) == [0.0] * 4
    assert group_advantages([None, 2.0, None], scale=scale) == [0.0] * 3
    assert group_advantages([None, None], scale=scale) == [0.0] * 2


def test_an_answer_without_a_reward_has_no_part_in_the_mean():
    assert group_advantages([4.0, None, 2.0], scale=False) == [1.0, 0.0, -1.0]


def test_losses_are_those_of_the_clipped_surrogate():
    rng = np.random.default_rng(0)
    new, old, advantage = rng.normal(-2, 0.5, 200), rng.normal(-2, 0.5, 200), rng.normal(0, 1, 200)
    ratio = np.exp(new - old)
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    got = token_losses(*(torch.tensor(values) for values in (new, old, advantage)), clip=0.2, clip_high=0.28)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    assert ((ratio < 0.8) | (ratio > 1.28)).sum() > 50  # the bounds are met


def test_a_token_beyond_the_bound_that_its_advantage_pulls_further_has_no_gradient():
    new = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    old, advantages = torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    token_losses(new, old, advantages, clip=0.2, clip_high=0.28).sum().backward()
    assert (new.grad == 0).tolist() == [True, False, False, True]


def test_the_estimate_of_the_kl_divergence_is_never_negative_and_has_the_right_mean():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    estimates = kl_estimates(policy.log(), reference.log())
    assert (estimates >= 0).all()
    assert (policy * estimates).sum().item() == pytest.approx((policy * (policy / reference).log()).sum().item(), 1e-12)


# --- the window law


class Table:
    """A bigram model: logits of the next token by the one before it, float64 [V, V]."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)

    def token_log_probs(self, batch):
        """Log-probabilities of trained tokens, example after example, of a padded micro-batch."""
        table = self.logits.log_softmax(dim=1)
        return table[batch.input_ids[:, :-1], batch.input_ids[:, 1:]][batch.weights[:, 1:] != 0]


class WindowOf:
    def __init__(self, numbers):
        self.indices = self.all_indices = np.array(numbers, dtype=np.int64)


def answers_of_a_window(*, drawn_by=None, rewards=None, count=12, group=4):
    """Ragged answers to three prompts, of which one is truncated and one has no reward; and their examples."""
    rng = np.random.default_rng(3)
    rewards = list(rng.normal(0, 1, count)) if rewards is None else list(rewards)
    if len(set(rewards)) > 1:
        rewards[5] = None
    advantages = [a for at in range(0, count, group) for a in group_advantages(rewards[at : at + group], scale=True)]
    examples, answers = [], []
    for number in range(count):
        ids = rng.integers(0, VOCABULARY, int(rng.integers(1, 9)))
        prompt = rng.integers(0, VOCABULARY, PROMPT_TOKENS)
        weights = np.array([0] * PROMPT_TOKENS + [1] * len(ids), dtype=np.float32)
        examples.append(Example(f"a:{number}", np.concatenate([prompt, ids]).astype(np.int32), weights))
        log_probs = None
        if drawn_by is not None:
            batch = make_micro_batch([examples[-1]], "padded", 0)
            log_probs = tuple(drawn_by.token_log_probs(batch).tolist())
        judged = {"mine": rewards[number]}
        answers.append(
            DrawnAnswer(tuple(ids.tolist()), rewards[number], advantages[number], judged, number == 7, log_probs)
        )
    return examples, answers


def loss_gradient_and_metrics(settings, cut, examples, answers, *, reference=None):
    """Run a window that is cut into micro-batches of these numbers of examples."""
    table = Table(1)
    table.logits.requires_grad_()
    objective = PolicyGradientObjective(settings, answers, table.token_log_probs, reference, ["mine"])
    numbers = list(range(len(examples)))
    divisor = objective.begin_window(WindowOf(numbers), DEVICES)
    total, place = torch.zeros((), dtype=torch.float64), iter(numbers)
    for size in cut:
        part = list(itertools.islice(place, size))
        batch = make_micro_batch([examples[number] for number in part], "padded", 0)
        batch = type(batch)(**{**vars(batch), "indices": np.array(part)})
        total = total + objective.loss_sum(batch)
    loss = total / divisor
    loss.backward()
    return loss.item(), table.logits.grad, objective.measure(DEVICES)


class ReferenceTable:
    def __init__(self):
        self.log_probs = Table(9).token_log_probs


SETTINGS = {
    "dapo": ObjectiveConfig("grpo"),
    "grpo": ObjectiveConfig("grpo", loss="grpo"),
    "dr_grpo": ObjectiveConfig("grpo", loss="dr_grpo", max_new_tokens=9, scale_rewards=False),
    "masked": ObjectiveConfig("grpo", mask_truncated=True),
    "with kl": ObjectiveConfig("grpo", beta=0.3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_how_a_window_is_cut_decides_nothing(name):
    settings = resolve_objective(SETTINGS[name], new_adapter=True)
    reference = ReferenceTable() if settings.beta else None
    examples, answers = answers_of_a_window(drawn_by=Table(2))
    loss, gradient, metrics = loss_gradient_and_metrics(settings, [12], examples, answers, reference=reference)
    assert gradient.abs().max() > 1e-3
    for cut in ([1] * 12, [5, 5, 2], [3, 9], [11, 1]):
        other = loss_gradient_and_metrics(settings, cut, examples, answers, reference=reference)
        assert other[0] == pytest.approx(loss, abs=1e-6)  # weights of tokens are float32
        torch.testing.assert_close(other[1], gradient, atol=1e-12, rtol=0)
        assert other[2] == pytest.approx(metrics, abs=1e-12)


def by_hand(settings, examples, answers, *, reference=None):
    """The loss as the papers write it, answer by answer, in NumPy."""
    table = Table(1).logits.log_softmax(dim=1).numpy()
    other = Table(9).logits.log_softmax(dim=1).numpy()
    total = tokens = count = 0.0
    for example, answer in zip(examples, answers, strict=True):
        if answer.reward is None or (settings.mask_truncated and answer.is_truncated):
            continue
        ids = example.input_ids
        places = range(PROMPT_TOKENS, len(ids))
        new = np.array([table[ids[t - 1], ids[t]] for t in places])
        ratio = np.exp(new - np.array(answer.log_probs))
        clipped = np.clip(ratio, 1 - settings.clip, 1 + settings.clip_high)
        losses = -np.minimum(ratio * answer.advantage, clipped * answer.advantage)
        if reference is not None:
            gap = np.array([other[ids[t - 1], ids[t]] for t in places]) - new
            losses += settings.beta * (np.exp(gap) - gap - 1)
        total += losses.mean() if settings.loss == "grpo" else losses.sum()
        tokens, count = tokens + len(losses), count + 1
    return total / {"dapo": tokens, "grpo": count, "dr_grpo": count * settings.max_new_tokens}[settings.loss]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_that_of_the_paper(name):
    settings = resolve_objective(SETTINGS[name], new_adapter=True)
    reference = ReferenceTable() if settings.beta else None
    examples, answers = answers_of_a_window(drawn_by=Table(2))
    loss, _, metrics = loss_gradient_and_metrics(settings, [12], examples, answers, reference=reference)
    assert loss == pytest.approx(by_hand(settings, examples, answers, reference=reference), abs=1e-6)
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    assert metrics["reward"] == pytest.approx(np.mean(rewards), abs=1e-12)
    assert metrics["reward_std"] == pytest.approx(np.std(rewards), abs=1e-12)
    assert metrics["truncated"] == pytest.approx(1 / 12)
    table = Table(1).logits.log_softmax(dim=1).numpy()
    ratios = [
        np.exp(table[example.input_ids[place - 1], example.input_ids[place]] - log_prob)
        for example, answer in zip(examples, answers, strict=True)
        for place, log_prob in enumerate(answer.log_probs, start=PROMPT_TOKENS)
    ]
    beyond = [not 1 - settings.clip <= ratio <= 1 + settings.clip_high for ratio in ratios]
    assert metrics["clipped"] == pytest.approx(np.mean(beyond))
    assert any(1.2 < ratio < 1.28 for ratio in ratios)


def test_equal_rewards_give_no_gradient_at_all():
    settings = resolve_objective(ObjectiveConfig("grpo"), new_adapter=True)
    examples, answers = answers_of_a_window(rewards=[0.5] * 12)
    loss, gradient, metrics = loss_gradient_and_metrics(settings, [12], examples, answers)
    assert loss == 0.0
    assert not gradient.any()
    assert metrics["with_advantage"] == 0.0


def test_at_the_policy_that_drew_every_ratio_is_exactly_1():
    settings = resolve_objective(ObjectiveConfig("grpo"), new_adapter=True)
    examples, answers = answers_of_a_window()
    loss, _, metrics = loss_gradient_and_metrics(settings, [12], examples, answers)
    tokens = sum(len(answer.ids) for answer in answers if answer.reward is not None)
    expected = -sum(answer.advantage * len(answer.ids) for answer in answers) / tokens
    assert loss == pytest.approx(expected, abs=1e-6)
    assert metrics["clipped"] == 0.0


def test_answers_in_another_order_with_their_rewards_change_nothing():
    """Also across the cut: each group of answers is turned around, and the groups too."""
    for settings in (resolve_objective(settings, new_adapter=True) for settings in SETTINGS.values()):
        examples, answers = answers_of_a_window(drawn_by=Table(2))
        reference = ReferenceTable() if settings.beta else None
        expected = loss_gradient_and_metrics(settings, [5, 7], examples, answers, reference=reference)
        found = loss_gradient_and_metrics(settings, [5, 7], examples[::-1], answers[::-1], reference=reference)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        torch.testing.assert_close(found[1], expected[1], atol=1e-12, rtol=0)
        assert found[2] == pytest.approx(expected[2], abs=1e-12)
    rewards = [0.5, 2.0, None, -1.0, 0.25]
    order = [3, 0, 4, 2, 1]
    for scale in (True, False):
        advantages = group_advantages(rewards, scale=scale)
        turned = group_advantages([rewards[at] for at in order], scale=scale)
        assert turned == pytest.approx([advantages[at] for at in order], abs=1e-15)


def test_an_answer_without_a_reward_has_no_gradient():
    settings = resolve_objective(ObjectiveConfig("grpo", beta=0.3), new_adapter=True)
    examples, answers = answers_of_a_window(drawn_by=Table(2))
    only = [examples[5]], [answers[5]]
    assert only[1][0].reward is None
    table = Table(1)
    table.logits.requires_grad_()
    objective = PolicyGradientObjective(settings, only[1], table.token_log_probs, ReferenceTable(), ["mine"])
    objective.begin_window(WindowOf([0]), DEVICES)
    batch = make_micro_batch(only[0], "padded", 0)
    objective.loss_sum(type(batch)(**{**vars(batch), "indices": np.array([0])})).backward()
    assert not table.logits.grad.any()


# --- the log-probabilities of a model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_at_the_temperature_of_the_draw_in_both_layouts(temperature):
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **shape, num_attention_heads=2, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = answers_of_a_window()[0][:4]
    padded, flat = (make_micro_batch(examples, layout, 0) for layout in ("padded", "flat"))
    logits = model(padded.input_ids, attention_mask=padded.attention_mask).logits[:, :-1] / temperature
    expected = logits.log_softmax(-1).gather(2, padded.input_ids[:, 1:, None])[..., 0][padded.weights[:, 1:] != 0]
    torch.testing.assert_close(plain_token_log_probs(model, padded, temperature), expected, atol=1e-6, rtol=0)
    use_segment_attention(model, "tiles")
    head = find_head(model)
    found = flat_token_log_probs(model, flat, temperature, head=head, device=torch.device("cpu"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


MUTANTS = {
    "the gradient of equal rewards": (
        test_equal_rewards_give_no_gradient_at_all,
        "advantages_N = of_tokens([answer.advantage for answer in answers])",
        "advantages_N = of_tokens([answer.reward or 0.0 for answer in answers])",
    ),
    "an order that counts": (
        test_answers_in_another_order_with_their_rewards_change_nothing,
        "advantages_N = of_tokens([answer.advantage for answer in answers])",
        "advantages_N = of_tokens([self._answers[at].advantage for at in range(len(answers))])",
    ),
    "a mean of the first answers": (
        test_answers_in_another_order_with_their_rewards_change_nothing,
        "mean = float(known.mean())",
        "mean = float(known[:3].mean())",
    ),
    "a ratio that is not 1": (
        test_at_the_policy_that_drew_every_ratio_is_exactly_1,
        "return log_probs_N.detach()",
        "return log_probs_N.detach() - 0.01",
    ),
    "None as 0 in the mean": (
        test_an_answer_without_a_reward_has_no_part_in_the_mean,
        "[reward for reward in rewards_G if reward is not None]",
        "[reward or 0.0 for reward in rewards_G]",
    ),
    "None that is trained": (
        test_an_answer_without_a_reward_has_no_gradient,
        "return answer.reward is None or (",
        "return (",
    ),
    "tokens of the micro-batch": (
        lambda: test_how_a_window_is_cut_decides_nothing("dapo"),
        "return (losses_N * of_tokens(shares)).sum()",
        "return (losses_N * of_tokens(shares)).mean()",
    ),
    "the larger of both": (
        test_losses_are_those_of_the_clipped_surrogate,
        "-torch.minimum(ratio_N",
        "-torch.maximum(ratio_N",
    ),
    "the other divergence": (
        test_the_estimate_of_the_kl_divergence_is_never_negative_and_has_the_right_mean,
        "log_ratio_N = reference_N - log_probs_N",
        "log_ratio_N = log_probs_N - reference_N",
    ),
}
"""The test of a law, and what breaks it."""


@pytest.mark.parametrize(("law", "before", "after"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_copy_is_found(mutant, monkeypatch, law, before, after):
    broken = mutant(policy_gradient, before, after)
    for name in ("PolicyGradientObjective", "group_advantages", "kl_estimates", "token_losses"):
        monkeypatch.setitem(globals(), name, getattr(broken, name))
    with pytest.raises(AssertionError):
        law()
