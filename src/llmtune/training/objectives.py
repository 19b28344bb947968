"""Build the objectives of a run, over the training and the held-out rows: the less usual ones, and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from llmtune.common.decisions import Decision
from llmtune.config.process_options import Options
from llmtune.config.schema import Config, TrainingConfig
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.data.example import ExampleSet
from llmtune.engine.devices import Devices
from llmtune.engine.forward import Engine
from llmtune.engine.neftune import Neftune
from llmtune.engine.objective import Objective, next_token_objective
from llmtune.engine.own_loss import own_objective
from llmtune.engine.policy_gradient import PolicyGradientObjective
from llmtune.engine.precision import Precision
from llmtune.engine.preference import Mismatches, PreferenceObjective, needs_reference
from llmtune.engine.reference import LogProbs, Reference
from llmtune.engine.scoring import scoring_objective
from llmtune.errors import UsageError
from llmtune.evaluation.rewards import Reward
from llmtune.models.parameters import switch_off_dropout
from llmtune.prepare import Prepared
from llmtune.training.reference_log_probs import ReferenceLogProbs
from llmtune.training.rollouts import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Objectives", "build_objectives", "make_objectives", "own_objectives"]


class Objectives(NamedTuple):
    """The objective over the training rows, the one over the held-out rows, and the choices made."""

    training: Objective
    heldout: Objective | None
    """None without held-out rows, and where their loss is that of the engine."""
    decisions: list[Decision]
    rollouts: Rollouts | None = None
    """What draws the answers that training learns from."""
    reference_digest: str | None = None
    """sha256 over the weights of a second model that answers are compared with."""


def make_objectives(
    prepared: Prepared,
    options: Options,
    model: PreTrainedModel,
    engine: Engine,
    parameters: Mapping[str, nn.Parameter],
    precision: Precision,
    devices: Devices,
    rewards: Sequence[Reward],
    *,
    base_digest: str,
) -> Objectives:
    """Build the objectives that the config names, or the user's own loss, of a model as before step 1.

    All but the usual one: the next token's, without noise.
    """
    if options.loss is not None:
        return own_objectives(own_objective(engine, options.loss), model, prepared.config)
    if prepared.config.objective.method == "sft":
        noisy = _with_noise(engine.nll_sum, model, prepared.config.training)
        return Objectives(next_token_objective(noisy), None, [])
    if prepared.config.objective.trains_head:
        return _build_scoring(prepared, engine)
    build = build_objectives
    if prepared.config.objective.method == "grpo":
        build = partial(_build_policy_gradient, rewards=rewards)
    return build(
        prepared, model, engine, parameters, precision, devices, base_digest=base_digest, offline=options.offline
    )


def build_objectives(
    prepared: Prepared,
    model: PreTrainedModel,
    engine: Engine,
    parameters: Mapping[str, nn.Parameter],
    precision: Precision,
    devices: Devices,
    *,
    base_digest: str,
    offline: bool = False,
) -> Objectives:
    """Build the objectives of a model as it is before step 1, and switch its dropout off.

    `prepared.config` is resolved. Measures the reference over all rows where the config says `precomputed`.
    """
    config = prepared.config
    decisions = _without_dropout(model)
    sets = [prepared.data.train, *([prepared.data.eval] if prepared.data.eval is not None else [])]
    references: list[Reference | None] = [None] * len(sets)
    digest: str | None = None
    if needs_reference(config.objective):
        made = ReferenceLogProbs(
            prepared,
            model,
            engine,
            lambda engine: engine.log_probs,
            parameters,
            precision,
            devices,
            base_digest,
            offline=offline,
        )
        digest = made.digest
        references = [made.of(examples) for examples in sets]
        decisions.append(made.decision)
    objectives = [
        _objective(prepared, examples, engine, precision, reference)
        for examples, reference in zip(sets, references, strict=True)
    ]
    heldout = objectives[1] if len(objectives) > 1 else None
    return Objectives(objectives[0], heldout, decisions, reference_digest=digest)


def _build_scoring(prepared: Prepared, engine: Engine) -> Objectives:
    """Build the objectives of a run that trains a head that gives scores; dropout stays as the config says."""
    sets = [prepared.data.train, *([prepared.data.eval] if prepared.data.eval is not None else [])]
    training, *heldout = (scoring_objective(examples, engine.scores, prepared.labels) for examples in sets)
    decisions = []
    pad_id = prepared.tokenizer.tokenizer.pad_token_id
    if pad_id is not None and pad_id in prepared.renderer.stop_token_ids:
        token = prepared.tokenizer.tokenizer.convert_ids_to_tokens(pad_id)
        reason = "it ends rows and is the padding token too, which transformers never reads"
        decisions.append(Decision("head", f"reads the token before `{token}` at the end", reason))
    return Objectives(training, heldout[0] if heldout else None, decisions)


def _build_policy_gradient(
    prepared: Prepared,
    model: PreTrainedModel,
    engine: Engine,
    parameters: Mapping[str, nn.Parameter],
    precision: Precision,
    devices: Devices,
    rewards: Sequence[Reward],
    *,
    base_digest: str,
    offline: bool = False,
) -> Objectives:
    """Build the objective of a run that draws answers, and what draws them; switch the model's dropout off.

    `prepared.config` is resolved.
    """
    settings = prepared.config.objective
    decisions = _without_dropout(model)

    def log_probs_of(engine: Engine) -> LogProbs:
        # At the temperature of the draw: that is the policy whose answers have the rewards.
        return lambda batch: engine.token_log_probs(batch, settings.temperature)

    reference: Reference | None = None
    digest: str | None = None
    if needs_reference(settings):
        made = ReferenceLogProbs(
            prepared, model, engine, log_probs_of, parameters, precision, devices, base_digest, offline=offline
        )
        reference, digest = made.of(prepared.data.train), made.digest
        decisions.append(made.decision)
    rollouts = Rollouts(prepared, model, engine, precision, devices, rewards)
    objective = PolicyGradientObjective(settings, rollouts, log_probs_of(engine), reference, rollouts.reward_names)
    return Objectives(objective.as_objective(), None, decisions, rollouts, digest)


def _without_dropout(model: PreTrainedModel) -> list[Decision]:
    changed = switch_off_dropout(model)
    if not changed:
        return []
    reason = "answers are compared with a reference, whose numbers dropout would blur"
    return [Decision("dropout", f"off in {changed} modules", reason)]


def _objective(
    prepared: Prepared, examples: ExampleSet, engine: Engine, precision: Precision, reference: Reference | None
) -> Objective:
    config, batch_size = prepared.config, prepared.config.training.batch_size
    assert isinstance(batch_size, int)
    mismatches = None
    if config.objective.method == "kto" and config.objective.loss == "kto":
        mismatches = Mismatches(
            examples,
            autocast=precision.autocast,
            layout=engine.layout,
            pad_id=prepared.tokenizer.tokenizer.pad_token_id or 0,
            batch_size=batch_size,
            max_group_tokens=engine.max_group_tokens,
            max_length=config.data.max_length,
            equal_counts=engine.equal_counts,
        )
    return PreferenceObjective(config.objective, examples, engine.log_probs, reference, mismatches).as_objective()


def own_objectives(own: Objective, model: PreTrainedModel, config: Config) -> Objectives:
    """Take a loss of the user's own for the training rows.

    Raises UsageError where the config asks for another objective than the usual one, or for rows that are cut.
    """
    if config.objective.method != "sft":
        problem = (
            f"a loss of your own takes the place of the usual one, and objective.method is {config.objective.method}"
        )
        raise UsageError(problem, "Trainer(loss=...)", "set `objective.method: sft`, or leave the loss out")
    if config.distributed.sequence_parallel > 1:
        problem = "a loss of your own is given the log-probabilities of whole rows, and processes share them here"
        raise UsageError(problem, "Trainer(loss=...)", "set `distributed.sequence_parallel: 1`, or leave the loss out")
    reason = "your function of the log-probabilities of trained tokens; held-out rows have the usual loss"
    noisy = replace(own, loss_sum=_with_noise(own.loss_sum, model, config.training))
    return Objectives(noisy, None, [Decision("objective", own.name, reason)])


def _with_noise(
    nll_sum: Callable[[MicroBatch], torch.Tensor], model: PreTrainedModel, training: TrainingConfig
) -> Callable[[MicroBatch], torch.Tensor]:
    """Add noise to the embeddings of training rows where the config asks for it; loss sums have shape [].

    x' = x + alpha / sqrt(L D) u, u uniform in [-1, 1] (NEFTune, arXiv:2310.05914).
    """
    if training.neftune_alpha is None:
        return nll_sum
    return Neftune(nll_sum, model.get_input_embeddings(), training.neftune_alpha)
