"""Objectives that compare answers, by the window law: sums over all pairs of a window and all devices, divided once.

How a window is cut into micro-batches, packs and processes therefore decides nothing. What must be known of the whole
window first - its numbers of pairs and of chosen tokens, KTO's reference point - is counted before its first
micro-batch.

Shapes: S examples of a micro-batch, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llmtune.common.decisions import Decision
from llmtune.config.schema import AdapterConfig, Config, EvaluationConfig, ObjectiveConfig
from llmtune.data.dataset.micro_batch import Layout, MicroBatch, idle_micro_batch, make_micro_batch, split_group
from llmtune.data.dataset.packing import examples_together
from llmtune.data.example import SIDES, Example, ExampleSet
from llmtune.engine.devices import Devices
from llmtune.engine.objective import Objective, WindowRows
from llmtune.engine.preference_loss import (
    PairLogProbs,
    dpo_losses,
    kto_losses,
    log_ratios,
    orpo_losses,
    simpo_losses,
    token_means,
)
from llmtune.engine.reference import LogProbs, Reference

__all__ = [
    "Mismatches",
    "PreferenceObjective",
    "begins_anew",
    "for_comparison",
    "mismatched_example",
    "needs_reference",
    "resolve_objective",
]

UNITS = {"kto": "per answer"}
"""Unit of the mean loss by method; others are per pair."""


def begins_anew(adapter: AdapterConfig) -> bool:
    """Whether training begins with a new adapter, without which the model is what it was before step 1."""
    return adapter.method != "none" and adapter.start_from is None and adapter.begins_at_zero


def resolve_objective(objective: ObjectiveConfig, *, new_adapter: bool) -> ObjectiveConfig:
    """Fill in what the config leaves open: loss, beta and the reference, the base where the adapter is a new one.

    >>> resolve_objective(ObjectiveConfig(method="simpo"), new_adapter=True).beta
    2.0
    """
    losses = {"dpo": "sigmoid", "kto": "kto", "grpo": "dapo"}
    if objective.loss == "auto" and objective.method in losses:
        objective = replace(objective, loss=losses[objective.method])  # type: ignore[arg-type]
    if objective.beta is None:
        objective = replace(objective, beta={"simpo": 2.0, "grpo": 0.0}.get(objective.method, 0.1))
    if objective.reference == "auto":
        objective = replace(objective, reference="base" if new_adapter else "start")
    return objective


def for_comparison(config: Config) -> tuple[Config, list[Decision]]:
    """Return the config of a run with another objective than answers, and the choices made.

    The best model is chosen by a metric that there is; dropout is off where answers are compared with a reference.
    """
    chosen: list[Decision] = []
    if config.evaluation.best_by == EvaluationConfig().best_by:
        draws = config.objective.method == "grpo"
        metric = "eval_reward" if draws else "eval_loss"
        config = replace(config, evaluation=replace(config.evaluation, best_by=metric))
        reason = "the mean reward of held-out prompts" if draws else f"the held-out loss of {config.objective.method}"
        chosen.append(Decision("evaluation.best_by", metric, reason))
    if config.objective.trains_head:  # nothing is compared with another model, and there are no answers
        if config.evaluation.prompts:
            chosen.append(Decision("evaluation.prompts", "not used", "a model that gives scores answers nothing"))
        return replace(config, evaluation=replace(config.evaluation, prompts=())), chosen
    reason = "answers are compared with a reference, whose numbers dropout would blur"
    rates = {
        "adapter.dropout": config.adapter.dropout,
        "model.architecture.dropout": config.model.architecture.dropout,
        "model.architecture.attention_dropout": config.model.architecture.attention_dropout,
    }
    shape = replace(config.model.architecture, dropout=0.0, attention_dropout=0.0)
    if config.model.architecture.dropout or config.model.architecture.attention_dropout:
        config = replace(config, model=replace(config.model, architecture=shape))
    config = replace(config, adapter=replace(config.adapter, dropout=0.0))
    off = [Decision(key, 0.0, f"{reason} (asked for: {rate:g})") for key, rate in rates.items() if rate]
    return config, [*chosen, *off]


def needs_reference(objective: ObjectiveConfig) -> bool:
    """Whether a resolved objective compares with a reference: those of `dpo` and `kto`, and of `grpo` with a beta."""
    return objective.method in ("dpo", "kto") or (objective.method == "grpo" and bool(objective.beta))


class PreferenceObjective:
    """One objective over one set of examples.

    settings: resolved (see `resolve_objective`). log_probs: of the policy, joined to the graph. reference: None for
    `simpo` and `orpo`. mismatches: makes the mismatched pairs of `kto`.
    """

    def __init__(
        self,
        settings: ObjectiveConfig,
        examples: ExampleSet,
        log_probs: LogProbs,
        reference: Reference | None,
        mismatches: Mismatches | None = None,
    ) -> None:
        assert settings.beta is not None
        self._settings, self._beta = settings, settings.beta
        self._log_probs, self._reference, self._mismatches = log_probs, reference, mismatches
        self._is_chosen = np.isin(examples.sides, [SIDES.index("chosen"), SIDES.index("desirable")])
        self._loss_weights = np.asarray(examples.loss_weights, dtype=np.float64)
        self._count = self._chosen_tokens = 0.0
        self._z0 = 0.0
        self._sums: list[Tensor] = []

    def as_objective(self) -> Objective:
        """Give the objective as the loop takes it."""
        unit = UNITS.get(self._settings.method, "per pair")
        return Objective(self.loss_sum, "loss", unit, begin_window=self.begin_window, measure=self.measure)

    def begin_window(self, window: WindowRows, devices: Devices) -> float:
        """Count the window over all devices, and find KTO's reference point; gives the divisor of its loss."""
        mine = window.indices
        chosen = mine[self._is_chosen[mine]]
        # KTO judges each answer by itself; elsewhere the chosen sides count the pairs.
        answers = len(mine) if self._settings.method == "kto" else len(chosen)
        self._count, self._chosen_tokens = devices.sum(answers, float(self._loss_weights[chosen].sum()))
        self._sums = []
        if self._mismatches is not None:
            self._z0 = self._reference_point(self._mismatches, window, devices)
        return self._count

    def _reference_point(self, mismatches: Mismatches, window: WindowRows, devices: Devices) -> float:
        """z0 = max(0, mean of log p - log p_ref over the mismatched pairs of the window)."""
        assert self._reference is not None
        # A process whose share makes no mismatched pair has something to add up too.
        ratios = [torch.zeros((), dtype=torch.float64, device=devices.device)]
        batches = list(mismatches.batches(window))
        if mismatches.equal_counts:
            (most,) = devices.largest(len(batches))
            batches += [idle_micro_batch(mismatches.layout)] * (int(most) - len(batches))
        # The reference point is a constant for the gradient (arXiv:2402.01306, section 4).
        with torch.no_grad(), mismatches.autocast():
            for batch in batches:
                reference = self._reference.log_probs(batch)
                ratios.append((self._log_probs(batch) - reference).double().sum())
        total = float(devices.sum_tensor(torch.stack(ratios).sum()))
        return max(0.0, total / len(window.all_indices))

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Sum of the losses of a micro-batch, float32 of shape [], in which token means of the window count per pair.

        loss = sum_s loss(log pi(y_s | x_s), log pi_ref(y_s | x_s)), with the losses of `preference_loss.py` and their
        papers.
        """
        # The reference first: see `LiveReference`.
        reference = self._reference.log_probs(batch) if self._reference is not None else None
        policy = self._log_probs(batch)
        if not batch.num_sequences:  # an idle one: 0, joined to the graph
            return policy.sum()
        if reference is None:
            reference = torch.zeros_like(policy)
        compare = self._answer_losses if self._settings.method == "kto" else self._pair_losses
        return compare(batch, policy, reference)

    def _pair_losses(self, batch: MicroBatch, policy: Tensor, reference: Tensor) -> Tensor:
        assert batch.sides == ("chosen", "rejected") * (len(batch.sides) // 2)
        tokens = batch.trained_tokens_per_example.to(policy.device)
        pairs = PairLogProbs(policy[0::2], policy[1::2], tokens[0::2], tokens[1::2], reference[0::2], reference[1::2])
        settings, beta = self._settings, self._beta
        nll_weight = 0.0
        if settings.method == "dpo":
            chosen, rejected = log_ratios(pairs, by_token=settings.loss == "ipo")
            losses = dpo_losses(
                chosen, rejected, loss=settings.loss, beta=beta, label_smoothing=settings.label_smoothing
            )
            nll_weight = settings.sft_weight
        else:
            chosen, rejected = token_means(pairs)
            if settings.method == "simpo":
                losses = simpo_losses(chosen, rejected, beta=beta, gamma_beta_ratio=settings.gamma_beta_ratio)
            else:
                losses, nll_weight = orpo_losses(chosen, rejected, beta=beta), 1.0
        total = losses.sum()
        if nll_weight:
            # Divided by the pairs of the window later, it is then per chosen token of the window.
            total = total - nll_weight * self._count / self._chosen_tokens * pairs.chosen.sum()
        with torch.no_grad():
            sums = [beta * chosen, beta * rejected, (chosen > rejected).to(chosen.dtype), pairs.chosen, pairs.rejected]
            self._sums.append(torch.stack([values.double().sum() for values in sums]))
        return total

    def _answer_losses(self, batch: MicroBatch, policy: Tensor, reference: Tensor) -> Tensor:
        is_desirable = torch.tensor([side in ("chosen", "desirable") for side in batch.sides], device=policy.device)
        ratios = policy - reference
        settings = self._settings
        losses = kto_losses(
            ratios,
            is_desirable,
            loss=settings.loss,
            beta=self._beta,
            z0=self._z0,
            weights=(settings.desirable_weight, settings.undesirable_weight),
        )
        with torch.no_grad():
            of_side = [is_desirable.double(), (~is_desirable).double()]
            values = [self._beta * ratios.double(), policy.double()]
            sums = [side.sum() for side in of_side] + [(value * side).sum() for value in values for side in of_side]
            self._sums.append(torch.stack(sums))
        return losses.sum()

    def measure(self, devices: Devices) -> dict[str, float]:
        """Means over the window and all devices: rewards and log-probabilities of each side, margin, accuracy.

        A pair counts for `accuracy` where the reward of its chosen side is the higher one: ties do not. `kto` has
        `kl`, its reference point, and no accuracy, because nothing says which of its answers belong together.
        """
        count = 6 if self._settings.method == "kto" else 5
        zero = torch.zeros(count, dtype=torch.float64, device=devices.device)
        sums = devices.sum_tensor(torch.stack([zero, *self._sums]).sum(dim=0)).tolist()
        self._sums = []
        if self._settings.method != "kto":
            means = [value / (self._count or 1.0) for value in sums]
            chosen, rejected, accuracy, logp_chosen, logp_rejected = means
            return {
                **_rewards(chosen, rejected),
                "accuracy": accuracy,
                "logp_chosen": logp_chosen,
                "logp_rejected": logp_rejected,
                "num_pairs": self._count,
            }
        desirable, undesirable, *totals = sums
        counts = (desirable, undesirable)
        chosen, rejected, logp_chosen, logp_rejected = (
            total / counts[index % 2] if counts[index % 2] else float("nan") for index, total in enumerate(totals)
        )
        line = {**_rewards(chosen, rejected), "logp_chosen": logp_chosen, "logp_rejected": logp_rejected}
        # A window may hold answers of one side only: it has no mean of the other.
        line = {name: value for name, value in line.items() if not np.isnan(value)}
        return {**line, **({"kl": self._z0} if self._mismatches is not None else {}), "num_answers": self._count}


def _rewards(chosen: float, rejected: float) -> dict[str, float]:
    return {"rewards_chosen": chosen, "rewards_rejected": rejected, "rewards_margin": chosen - rejected}


class Mismatches:
    """The mismatched pairs of KTO's reference point: each prompt of a window with the answer of the row after it.

    The last row has the answer of the first one; in rows that are pairs, each side that of the same side of the next
    pair. The rule reads the order of the window alone, which no cut changes. A mismatched pair over `max_length` loses
    the end of its answer. `batch_size` rows are computed at once.
    """

    def __init__(
        self,
        examples: ExampleSet,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        layout: Layout,
        pad_id: int,
        batch_size: int,
        max_group_tokens: int | None,
        max_length: int,
        equal_counts: bool,
    ) -> None:
        self.autocast = autocast
        """The context of a forward pass."""
        self.equal_counts = equal_counts
        """Whether every process must run the same number of micro-batches."""
        self._examples, self._together = examples, examples_together(examples)
        self.layout: Layout = layout
        self._pad_id, self._max_group_tokens, self._max_length = pad_id, max_group_tokens, max_length
        self._batch_size = batch_size * self._together

    def batches(self, window: WindowRows) -> Iterator[MicroBatch]:
        """The mismatched pairs of this process's rows; none in a window of one row, whose answer is its own."""
        order, shift = window.all_indices, self._together
        if len(order) <= shift:
            return
        partner = dict(zip(order.tolist(), np.roll(order, -shift).tolist(), strict=True))
        rows = window.indices.tolist()
        for start in range(0, len(rows), self._batch_size):
            made = [
                mismatched_example(self._examples[row], self._examples[partner[row]], self._max_length)
                for row in rows[start : start + self._batch_size]
            ]
            lengths = np.array([len(example) for example in made], dtype=np.int64)
            places = np.arange(len(made), dtype=np.int64)
            for group in split_group(places, lengths, self.layout, self._max_group_tokens):
                yield make_micro_batch([made[int(place)] for place in group], self.layout, self._pad_id)


def mismatched_example(prompt_of: Example, answer_of: Example, max_length: int) -> Example:
    """The prompt of one example with the answer of another, at most `max_length` tokens; only the answer is trained.

    A prompt is all before the first trained token.
    """
    prompt = int(np.flatnonzero(prompt_of.weights)[0])
    answer = int(np.flatnonzero(answer_of.weights)[0])
    ids = np.concatenate([prompt_of.input_ids[:prompt], answer_of.input_ids[answer:]])
    weights = np.concatenate([prompt_of.weights[:prompt], answer_of.weights[answer:]])
    return Example(prompt_of.source, ids[:max_length], weights[:max_length], prompt_of.side)
