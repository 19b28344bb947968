"""Resolve everything that a config leaves open (`auto`, or no rate), once, each value with its reason.

Precision and rates follow from the model and the device, the micro-batch and recomputation of blocks from the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch

from llmtune.common.decisions import Decision
from llmtune.common.text import readable_bytes
from llmtune.config.distributed_checks import reason_against_masters, reason_against_sharding, takes_deepspeed
from llmtune.config.dump import config_to_dict
from llmtune.config.schema import Config, ObjectiveConfig, TrainingConfig
from llmtune.engine.devices import Devices
from llmtune.engine.optim import choose_rates
from llmtune.engine.precision import PrecisionName, choose_precision
from llmtune.engine.preference import begins_anew, resolve_objective
from llmtune.engine.probe import MODEL_ERRORS
from llmtune.errors import ConfigError
from llmtune.plan.forecast import Forecaster
from llmtune.plan.memory import MemoryPlan
from llmtune.prepare import Prepared

__all__ = ["fit_to_memory", "keep_resolved", "resolve", "resolve_on_all_ranks", "resolve_rates", "resolve_strategy"]

SEQUENCES = TrainingConfig().batch_size
"""Sequences of a micro-batch where `training.batch_size` is `auto`; times `gradient_accumulation_steps` they are the
global batch, which `auto` keeps.
"""


Recompute = bool | Literal["offload"]
LEVELS: tuple[Recompute, ...] = (False, True, "offload")
"""What `model.gradient_checkpointing: auto` may become, least work first; the last only on a CUDA device, and not with
compiled blocks.
"""


OPEN_VALUES: tuple[tuple[str, str, object], ...] = (
    ("training", "precision", "auto"),
    ("training", "master_weights", "auto"),
    ("training", "learning_rate", None),
    ("training", "weight_decay", None),
    ("training", "batch_size", "auto"),
    ("model", "gradient_checkpointing", "auto"),
    ("objective", "loss", "auto"),
    ("objective", "beta", None),
    ("objective", "reference", "auto"),
)
"""(section, key, value with which a config leaves the choice to llmtune)."""


def resolve(forecaster: Forecaster) -> tuple[Prepared, list[Decision]]:
    """Resolve every open value of the run's config; returns the run with that config, and the decisions made."""
    prepared, decisions = resolve_rates(forecaster)
    prepared, memory_decisions = fit_to_memory(forecaster.with_prepared(prepared))
    return prepared, decisions + memory_decisions


def resolve_rates(forecaster: Forecaster) -> tuple[Prepared, list[Decision]]:
    """Choose precision, learning rate and weight decay where the config leaves them open."""
    config = forecaster.config
    training, decisions = config.training, []
    if training.precision == "auto":
        training = replace(training, precision=cast("PrecisionName", forecaster.precision))
        decisions.append(_precision_decision(forecaster))
    if training.master_weights is not False:
        training, choices = _resolve_masters(forecaster, replace(config, training=training))
        decisions += choices
    if training.learning_rate is None or training.weight_decay is None:
        scratch = forecaster.prepared.source.kind == "scratch"
        # Only from scratch the number of parameters decides, and counting them builds the model without weights.
        parameters = forecaster.sizes(config).parameters if scratch else 0
        adapter = config.adapter.method != "none"
        # A new head begins at 0, far from its best: there a rate of supervised fine-tuning is the usual one.
        compares = config.objective.method != "sft" and not config.objective.trains_head
        training, rates = choose_rates(
            training, scratch=scratch, adapter=adapter, parameters=parameters, compares=compares
        )
        decisions += rates
    objective = config.objective
    if objective.method != "sft" and not objective.trains_head:
        objective, choices = _resolve_objective(config)
        decisions += choices
    return _decided(forecaster.prepared, replace(config, training=training, objective=objective), decisions), decisions


def _resolve_masters(forecaster: Forecaster, config: Config) -> tuple[TrainingConfig, list[Decision]]:
    """Hold the model in bf16 beside float32 masters where that is asked for, or `auto` on a GPU in bf16.

    Raises ConfigError where it is asked for and the arithmetic is not bf16.
    """
    key, training, against = "training.master_weights", config.training, reason_against_masters(config)
    if training.master_weights is True and against is not None:
        problem = f"{key} is true, and the arithmetic here is {training.precision}"
        raise ConfigError(problem, key, "set `training.precision: bf16`, or `training.master_weights: false`")
    if training.master_weights is True:
        return training, []
    without, chosen = replace(training, master_weights=False), replace(training, master_weights=True)
    if forecaster.target.kind != "cuda" or against is not None:
        return without, []
    budget = forecaster.target.budget_bytes

    def cost(variant: TrainingConfig) -> tuple[int, int, int]:
        """Bytes that are too many, the level of recomputation, and the planned bytes."""
        planned, memory = _largest_that_fits(forecaster, replace(config, training=variant))
        return max(0, memory.peak_bytes - budget), LEVELS.index(planned.model.gradient_checkpointing), memory.peak_bytes

    # Masters take more for each weight and less for each token, so which of both fits is asked of the plan.
    try:
        masters, float32 = cost(chosen), cost(without)
    except MODEL_ERRORS:
        return without, [Decision(key, False, "the model has no plan, and without masters a weight takes less")]
    if masters[:2] <= float32[:2]:
        reason = "the model is held in bf16, and the optimizer moves float32 masters of its weights"
        return chosen, [Decision(key, True, reason)]
    planned = f"planned {readable_bytes(masters[2])} with masters, {readable_bytes(float32[2])} without"
    more = "; with them blocks would be recomputed or offloaded" if masters[1] > float32[1] else ""
    return without, [Decision(key, False, f"{planned}, and {readable_bytes(budget)} may be filled{more}")]


def _resolve_objective(config: Config) -> tuple[ObjectiveConfig, list[Decision]]:
    resolved = resolve_objective(config.objective, new_adapter=begins_anew(config.adapter))
    reasons = {"loss": f"the usual one of {resolved.method}", "beta": f"the usual one of {resolved.method}"}
    changed = [name for name in reasons if getattr(resolved, name) != getattr(config.objective, name)]
    return resolved, [Decision(f"objective.{name}", getattr(resolved, name), reasons[name]) for name in changed]


def _precision_decision(forecaster: Forecaster) -> Decision:
    target = forecaster.target
    if target.kind == "cpu" or target.is_local:
        has_adapter = forecaster.config.adapter.method != "none"
        return choose_precision(torch.device(target.kind), has_adapter=has_adapter)
    native = "multiplies bf16 natively" if target.has_bf16 else "has no native bf16"
    return Decision("training.precision", forecaster.precision, f"{target.name} {native}")


def _decided(prepared: Prepared, config: Config, decisions: list[Decision]) -> Prepared:
    return replace(prepared, config=config, decisions=(*prepared.decisions, *decisions))


def fit_to_memory(forecaster: Forecaster) -> tuple[Prepared, list[Decision]]:
    """Choose micro-batch and recomputation where they are `auto`. The global batch stays, so the result does too.

    `training.batch_size: auto` stands for 8 sequences times `gradient_accumulation_steps`; that product is cut into the
    largest equal micro-batches that fit. Blocks are recomputed only where nothing fits without, their inputs offloaded
    only where that is not enough.
    """
    config, decisions = forecaster.config, []
    if "auto" not in (config.training.batch_size, config.model.gradient_checkpointing):
        return forecaster.prepared, []
    chosen, memory = _largest_that_fits(forecaster, config)
    target, peak = forecaster.target, readable_bytes(memory.peak_bytes)
    budget = readable_bytes(target.budget_bytes)
    # The run is not refused: a plan may be wrong, and the message says what it found.
    reason = (
        f"planned {peak} of the {budget} that may be filled on {target.name}"
        if memory.peak_bytes <= target.budget_bytes
        else f"nothing fits: even so the plan is {peak} and {target.name} has {budget} to fill"
    )
    if config.training.batch_size == "auto":
        size, count = chosen.training.batch_size, chosen.training.gradient_accumulation_steps
        assert isinstance(size, int)
        text = f"{size}, gradient_accumulation_steps {count}"
        decisions.append(Decision("training.batch_size", text, f"a step keeps its {size * count} sequences; {reason}"))
    if config.model.gradient_checkpointing == "auto":
        decisions.append(Decision("model.gradient_checkpointing", chosen.model.gradient_checkpointing, reason))
    return _decided(forecaster.prepared, chosen, decisions), decisions


def _largest_that_fits(forecaster: Forecaster, config: Config) -> tuple[Config, MemoryPlan]:
    """The config with the largest micro-batch at the lowest level of recomputation that fits, and its memory.

    Where nothing fits, the config with the smallest one at the highest level.
    """
    levels = _levels(forecaster, config)
    # Less recomputation before a larger micro-batch: computing blocks twice costs more than small products do.
    sizes = micro_batches(config.training)
    for recompute in levels:
        candidates = [with_micro_batch(config, size, recompute) for size in sizes]
        if (last := _last_that_fits(forecaster, candidates)) is not None:
            return last
    smallest = with_micro_batch(config, sizes[0], levels[-1])
    return smallest, forecaster.memory(smallest)


def _levels(forecaster: Forecaster, config: Config) -> tuple[Recompute, ...]:
    """The levels of recomputation that may be chosen."""
    if config.model.gradient_checkpointing != "auto":
        return (config.model.gradient_checkpointing,)
    levels = LEVELS if forecaster.target.kind == "cuda" and not config.training.compile else LEVELS[:2]
    return levels[1:] if config.model.offload_weights else levels


def _last_that_fits(forecaster: Forecaster, candidates: list[Config]) -> tuple[Config, MemoryPlan] | None:
    """The last candidate that fits, by bisection, and its memory, which grows along the list; None when none fits."""
    best = None
    low, high = 0, len(candidates) - 1
    middle = high  # the last first, because on a machine with room it is the only one tried
    while low <= high:
        memory = forecaster.memory(candidates[middle])
        if memory.peak_bytes <= forecaster.target.budget_bytes:
            best, low = (candidates[middle], memory), middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return best


def micro_batches(training: TrainingConfig) -> list[tuple[int, int]]:
    """The (micro-batch, accumulation) pairs of the global batch, smallest micro-batch first.

    >>> micro_batches(TrainingConfig(batch_size="auto", gradient_accumulation_steps=1))
    [(1, 8), (2, 4), (4, 2), (8, 1)]
    """
    if training.batch_size != "auto":
        return [(training.batch_size, training.gradient_accumulation_steps)]
    assert isinstance(SEQUENCES, int)
    total = SEQUENCES * training.gradient_accumulation_steps
    return [(size, total // size) for size in range(1, total + 1) if total % size == 0]


def with_micro_batch(config: Config, size: tuple[int, int], recompute: Recompute) -> Config:
    """The config with this (micro-batch, accumulation) pair, and blocks recomputed or not."""
    training = replace(config.training, batch_size=size[0], gradient_accumulation_steps=size[1])
    return replace(config, training=training, model=replace(config.model, gradient_checkpointing=recompute))


def resolve_strategy(forecaster: Forecaster, devices: Devices) -> Prepared:
    """The run with `distributed.strategy: auto` resolved, as on the main process; a process alone needs none.

    `deepspeed` where keys of it are set; `fsdp` where the least that every process could hold with `ddp` does not fit
    its device. Fast paths and rows are the same with all; `ddp` sends less.
    """
    config = forecaster.config
    if config.distributed.strategy != "auto" or devices.world_size == 1:
        return forecaster.prepared
    name, reason = devices.from_main(_strategy_that_fits(forecaster) if devices.is_main else ("ddp", ""))
    config = replace(config, distributed=replace(config.distributed, strategy=name))
    return _decided(forecaster.prepared, config, [Decision("distributed.strategy", name, reason)])


def _strategy_that_fits(forecaster: Forecaster) -> tuple[Literal["ddp", "fsdp", "deepspeed"], str]:
    if takes_deepspeed(forecaster.config):
        named = forecaster.config.distributed.deepspeed_config
        key = "zero_stage" if named is None else "deepspeed_config"
        return "deepspeed", f"`distributed.{key}` is set, which is DeepSpeed's"
    config = resolve_rates(forecaster)[0].config
    least = with_micro_batch(config, micro_batches(config.training)[0], _levels(forecaster, config)[-1])
    peak, budget = forecaster.memory(least).peak_bytes, forecaster.target.budget_bytes
    planned = f"at least {readable_bytes(peak)} in each process are planned"
    if peak <= budget:
        return "ddp", f"{planned}, and {readable_bytes(budget)} may be filled"
    against = reason_against_sharding(config)
    if against is not None:
        return "ddp", f"{planned}, more than the {readable_bytes(budget)}; but `{against}` cannot be sharded"
    return "fsdp", f"{planned} with ddp, and only {readable_bytes(budget)} may be filled"


def resolve_on_all_ranks(forecaster: Forecaster, devices: Devices) -> Prepared:
    """The run with every open value resolved as on the main process: the others may have more memory free."""
    prepared, _ = resolve(forecaster)
    return keep_resolved(forecaster.prepared, devices.from_main(config_to_dict(prepared.config)), prepared.decisions)


def keep_resolved(prepared: Prepared, earlier: Mapping[str, Any], decisions: Sequence[Decision] = ()) -> Prepared:
    """The run with its open values as in `earlier`, its config as plain values: a resumed run repeats every sum.

    decisions: those of the resolved run, where they are known. Values that `earlier` leaves open stay open.
    """
    config = prepared.config
    values: dict[str, dict[str, Any]] = {"training": {}, "model": {}, "objective": {}}
    for section, key, is_open in OPEN_VALUES:
        if getattr(getattr(config, section), key) == is_open:
            values[section][key] = earlier.get(section, {}).get(key, is_open)
    if "batch_size" in values["training"]:
        values["training"]["gradient_accumulation_steps"] = earlier["training"]["gradient_accumulation_steps"]
    training, model = replace(config.training, **values["training"]), replace(config.model, **values["model"])
    config = replace(config, training=training, model=model, objective=replace(config.objective, **values["objective"]))
    return replace(prepared, config=config, decisions=tuple(decisions) or prepared.decisions)
