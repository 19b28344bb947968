"""Group relative policy optimization (GRPO): answers drawn to a prompt are compared with each other by their rewards.

A window holds the answers to its prompts. Its loss is a sum over all their tokens and all devices, divided once, so how
it is cut into micro-batches and processes decides nothing.

Shapes: S answers, G answers to one prompt, N trained tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmtune.config.schema import ObjectiveConfig
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.devices import Devices
from llmtune.engine.objective import Objective, WindowRows
from llmtune.engine.reference import LogProbs, Reference

__all__ = [
    "DrawnAnswer",
    "DrawnAnswers",
    "PolicyGradientObjective",
    "count_answers",
    "group_advantages",
    "token_losses",
]

STANDARD_DEVIATION_FLOOR = 1e-4
"""Added to the standard deviation of rewards, so that rewards that are nearly equal are not blown up."""


@dataclass(frozen=True)
class DrawnAnswer:
    """One answer to a prompt, with everything that its loss needs."""

    ids: tuple[int, ...]
    """Tokens of the answer as they were drawn, the stop token included."""
    reward: float | None
    """Weighted sum of its rewards; None where none of them judges it."""
    advantage: float
    """See `group_advantages`; 0 without a reward."""
    rewards: Mapping[str, float | None]
    """Each reward by its name."""
    is_truncated: bool
    """It reached the greatest length."""
    log_probs: tuple[float, ...] | None = None
    """Log-probability of each of its tokens by the policy that drew it, in nats; None for the policy of the step."""


class DrawnAnswers(Protocol):
    """The answers of the present window, by their number (see `PlannedAnswers`)."""

    def __getitem__(self, number: int) -> DrawnAnswer: ...


def group_advantages(rewards_G: Sequence[float | None], *, scale: bool) -> list[float]:
    """Advantage of each of the answers to one prompt: A_g = (r_g - mean r) / (std r + 1e-4), no unit.

    The standard deviation is the unbiased one (DeepSeekMath, arXiv:2402.03300, section 4.1.2). scale: divide by it;
    without, prompts of all difficulties count alike (Dr. GRPO, arXiv:2503.20783). An answer without a reward (None) has
    advantage 0 and no part in the mean. Equal rewards give zeros.

    >>> group_advantages([1.0, 0.0, None, 0.5], scale=False)
    [0.5, -0.5, 0.0, 0.0]
    """
    known = np.array([reward for reward in rewards_G if reward is not None], dtype=np.float64)
    # One answer cannot be compared, and its standard deviation would be 0 / 0.
    if len(known) < 2:
        return [0.0] * len(rewards_G)
    mean = float(known.mean())
    divisor = float(known.std(ddof=1)) + STANDARD_DEVIATION_FLOOR if scale else 1.0
    return [0.0 if reward is None else (reward - mean) / divisor for reward in rewards_G]


def token_losses(
    log_probs_N: Tensor, drawn_N: Tensor, advantages_N: Tensor, *, clip: float, clip_high: float
) -> Tensor:
    """Loss of each token: -min(r A, clip(r, 1 - clip, 1 + clip_high) A) with r = p / p_drawn; float32 [N], no unit.

    The clipped surrogate of PPO (arXiv:1707.06347, equation 7), with a bound of its own above (DAPO, arXiv:2503.14476,
    equation 10). log_probs_N: by the policy, joined to the graph; drawn_N: by the policy that drew the tokens; both in
    nats.
    """
    ratio_N = (log_probs_N - drawn_N).exp()
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip_high)
    # The smaller of both: the bound takes away the reward for going far, never the penalty.
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def kl_estimates(log_probs_N: Tensor, reference_N: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each drawn token: q - log q - 1 with q = p_ref / p; nats, float32 [N].

    It is never negative and has the right mean (J. Schulman, "Approximating KL divergence", 2020; GRPO, equation 4).
    """
    log_ratio_N = reference_N - log_probs_N
    # `expm1`: close to the reference the difference of two nearly equal numbers would be all rounding.
    return torch.expm1(log_ratio_N) - log_ratio_N


@dataclass(frozen=True)
class AnswerCounts:
    """Answers added up over all devices."""

    answers: float
    tokens: float
    truncated: float
    judged: float
    """Answers with a reward."""
    rewards: float
    """Sum of the rewards."""
    squares: float
    """Sum of their squares."""
    with_advantage: float
    by_name: Mapping[str, float | None]
    """The mean of each reward over the answers that it judges; None where it judges none."""

    @property
    def reward(self) -> float:
        """Mean reward of the judged answers, 0 without any."""
        return self.rewards / (self.judged or 1.0)

    @property
    def means_by_name(self) -> dict[str, float]:
        """`reward_NAME` of each reward that judged an answer, where there are several."""
        several = self.by_name if len(self.by_name) > 1 else {}
        return {f"reward_{name}": mean for name, mean in several.items() if mean is not None}

    @property
    def tokens_per_answer(self) -> float:
        """Mean length, 0 without an answer."""
        return self.tokens / (self.answers or 1.0)


def count_answers(answers: Sequence[DrawnAnswer], reward_names: Sequence[str], devices: Devices) -> AnswerCounts:
    """Add up the answers that each process has. Every process calls it, also one without an answer."""
    known = [answer.reward for answer in answers if answer.reward is not None]
    own = [
        float(len(answers)),
        float(sum(len(answer.ids) for answer in answers)),
        float(sum(answer.is_truncated for answer in answers)),
        float(len(known)),
        math.fsum(known),
        math.fsum(reward**2 for reward in known),
        float(sum(answer.advantage != 0 for answer in answers)),  # without a reward it is 0
    ]
    for name in reward_names:
        values = [value for answer in answers if (value := answer.rewards[name]) is not None]
        own += [math.fsum(values), float(len(values))]
    count, tokens, truncated, judged, rewards, squares, useful, *by_name = devices.sum(*own)
    means = [value / number if number else None for value, number in zip(by_name[::2], by_name[1::2], strict=True)]
    return AnswerCounts(
        count, tokens, truncated, judged, rewards, squares, useful, dict(zip(reward_names, means, strict=True))
    )


class PolicyGradientObjective:
    """The loss of the answers that were drawn for a window.

    settings: resolved. answers: those of the window that is trained, by number. token_log_probs: of the policy at the
    temperature of the draw. reference: gives the same of another model; None without `beta`.
    """

    def __init__(
        self,
        settings: ObjectiveConfig,
        answers: DrawnAnswers,
        token_log_probs: LogProbs,
        reference: Reference | None,
        reward_names: Sequence[str],
    ) -> None:
        assert settings.beta is not None
        self._settings, self._beta, self._answers = settings, settings.beta, answers
        self._token_log_probs, self._reference = token_log_probs, reference
        # Known beforehand: a process without a prompt in a window adds up the same numbers as the others.
        self._reward_names = tuple(reward_names)
        self._sums: list[Tensor] = []
        self._drawn: list[DrawnAnswer] = []

    def as_objective(self) -> Objective:
        """Give the objective as the loop takes it."""
        unit = {"dapo": "per token", "grpo": "per answer", "dr_grpo": "per longest answer"}[self._settings.loss]
        return Objective(self.loss_sum, "loss", unit, begin_window=self.begin_window, measure=self.measure)

    def begin_window(self, window: WindowRows, devices: Devices) -> float:
        """Count the window over all devices; gives the divisor of its loss."""
        self._sums = []
        self._drawn = [self._answers[int(number)] for number in window.indices]
        trained = [answer for answer in self._drawn if not self._is_masked(answer)]
        count, tokens = devices.sum(len(trained), sum(len(answer.ids) for answer in trained))
        if self._settings.loss == "dapo":
            return tokens
        # A constant for each answer, so that long answers weigh by their length (Dr. GRPO).
        return count if self._settings.loss == "grpo" else count * self._settings.max_new_tokens

    def _is_masked(self, answer: DrawnAnswer) -> bool:
        return answer.reward is None or (self._settings.mask_truncated and answer.is_truncated)

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Sum of the losses of the tokens of a micro-batch, float32 of shape [].

        loss = sum_n share_n (loss_n + beta kl_n), with `token_losses`, `kl_estimates` and their papers. share: 0 for a
        masked answer, else 1, and with `grpo` 1 / (tokens of the answer) (arXiv:2402.03300, equation 3).
        """
        # The reference first: see `LiveReference`.
        reference_N = self._reference.log_probs(batch) if self._reference is not None else None
        log_probs_N = self._token_log_probs(batch)
        assert batch.indices is not None
        answers = [self._answers[int(number)] for number in batch.indices]
        tokens_S = batch.trained_tokens_per_example
        device = log_probs_N.device

        def of_tokens(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(tokens_S).to(device)

        advantages_N = of_tokens([answer.advantage for answer in answers])
        losses_N = token_losses(
            log_probs_N,
            self._drawn_log_probs(answers, log_probs_N),
            advantages_N,
            clip=self._settings.clip,
            clip_high=self._settings.clip_high,
        )
        kl_N = torch.zeros_like(losses_N)
        if reference_N is not None:
            kl_N = kl_estimates(log_probs_N, reference_N)
            losses_N = losses_N + self._beta * kl_N
        # Masked answers are computed all the same: every process makes the same number of forward passes.
        shares = [0.0 if self._is_masked(answer) else 1.0 for answer in answers]
        if self._settings.loss == "grpo":
            shares = [share / len(answer.ids) for share, answer in zip(shares, answers, strict=True)]
        self._count(log_probs_N, answers, kl_N)
        return (losses_N * of_tokens(shares)).sum()

    def _drawn_log_probs(self, answers: Sequence[DrawnAnswer], log_probs_N: Tensor) -> Tensor:
        """Log-probabilities by the policy that drew, float32 [N]; where it is the step's own, exactly its numbers."""
        if all(answer.log_probs is None for answer in answers):
            return log_probs_N.detach()
        drawn = [value for answer in answers for value in answer.log_probs or ()]
        return torch.tensor(drawn, dtype=torch.float32, device=log_probs_N.device)

    @torch.no_grad()
    def _count(self, log_probs_N: Tensor, answers: Sequence[DrawnAnswer], kl_N: Tensor) -> None:
        ratio_N = (log_probs_N.detach() - self._drawn_log_probs(answers, log_probs_N)).exp()
        # By the ratio alone, whichever sign the advantage has: it tells how far the policy went.
        is_clipped_N = (ratio_N < 1 - self._settings.clip) | (ratio_N > 1 + self._settings.clip_high)
        sums = [-log_probs_N.detach(), kl_N.detach(), is_clipped_N.float()]
        self._sums.append(torch.stack([values.double().sum() for values in sums]))

    def measure(self, devices: Devices) -> dict[str, float]:
        """Means over the window and all devices.

        `reward` and its standard deviation over all answers, and each reward by name; `answer_tokens`; the parts of the
        answers that are `truncated` and that have an advantage (`with_advantage`: where the rewards of a prompt are all
        equal, nothing is learnt). Per token: `entropy`, the mean of -log p of what was drawn, in nats; `kl`; the part
        of ratios that are `clipped`.
        """
        zero = torch.zeros(3, dtype=torch.float64, device=devices.device)
        by_token = devices.sum_tensor(torch.stack([zero, *self._sums]).sum(dim=0)).tolist()
        self._sums = []
        seen = count_answers(self._drawn, self._reward_names, devices)
        line = {
            "reward": seen.reward,
            "reward_std": math.sqrt(max(0.0, seen.squares / (seen.judged or 1.0) - seen.reward**2)),
            "answer_tokens": seen.tokens_per_answer,
            "truncated": seen.truncated / (seen.answers or 1.0),
            "with_advantage": seen.with_advantage / (seen.judged or 1.0),
            "entropy": by_token[0] / (seen.tokens or 1.0),
            "clipped": by_token[2] / (seen.tokens or 1.0),
            "num_answers": seen.answers,
        }
        if self._reference is not None:
            line["kl"] = by_token[1] / (seen.tokens or 1.0)
        return line | seen.means_by_name
