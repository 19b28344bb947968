"""Resolve `auto` by the plan: the micro-batch, and recomputation of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmtune.common.bytes import readable_bytes
from llmtune.common.decisions import Decision
from llmtune.config.schema import Config, TrainingConfig
from llmtune.engine.devices import Devices
from llmtune.plan.forecast import Forecaster
from llmtune.plan.memory import MemoryPlan
from llmtune.prepare import Prepared

__all__ = ["keep_resolved", "resolve", "resolve_on_all_ranks"]

SEQUENCES = TrainingConfig().batch_size
"""Sequences of a micro-batch where `training.batch_size` is `auto`; times `gradient_accumulation_steps` they are the
global batch, which `auto` keeps.
"""


Recompute = bool | Literal["offload"]
LEVELS: tuple[Recompute, ...] = (False, True, "offload")
"""What `model.gradient_checkpointing: auto` may become, least work first; the last only on a CUDA device, and not with
compiled blocks.
"""


def has_auto(config: Config) -> bool:
    """Whether the config leaves something to the plan."""
    return "auto" in (config.training.batch_size, config.model.gradient_checkpointing)


def resolve(forecaster: Forecaster) -> tuple[Prepared, list[Decision]]:
    """Choose the values that the config leaves to the plan. The global batch stays, so the result does too.

    `training.batch_size: auto` stands for 8 sequences times `gradient_accumulation_steps`; that product is cut into the
    largest equal micro-batches that fit. Blocks are recomputed only where nothing fits without, their inputs offloaded
    only where that is not enough.
    """
    config, decisions = _resolve_batch(forecaster, forecaster.config)
    prepared = forecaster.prepared
    return replace(prepared, config=config, decisions=(*prepared.decisions, *decisions)), decisions


def _resolve_batch(forecaster: Forecaster, config: Config) -> tuple[Config, list[Decision]]:
    """Choose the micro-batch and whether blocks are recomputed, as far as `config` leaves them open."""
    if not has_auto(config):
        return config, []
    levels = LEVELS if forecaster.target.kind == "cuda" and not config.training.compile else LEVELS[:2]
    if config.model.gradient_checkpointing != "auto":
        levels = (config.model.gradient_checkpointing,)
    sizes = micro_batches(config.training)
    for recompute in levels:
        largest = _largest_that_fits(forecaster, config, recompute, sizes)
        if largest is not None:
            chosen, memory = largest
            return chosen, _decisions(config, chosen, _reason(memory, forecaster))
    chosen = with_micro_batch(config, sizes[0], levels[-1])
    needed, target = readable_bytes(forecaster.memory(chosen).peak_bytes), forecaster.target
    budget = f"{target.name} has {readable_bytes(target.budget_bytes)} to fill"
    return chosen, _decisions(config, chosen, f"nothing fits: even so the plan is {needed} and {budget}")


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


def resolve_on_all_ranks(forecaster: Forecaster, devices: Devices) -> Prepared:
    """The run with `auto` resolved; with several processes as on the main one: the others may have more memory free."""
    prepared, _ = resolve(forecaster)
    training, model = prepared.config.training, prepared.config.model
    assert isinstance(training.batch_size, int)
    assert model.gradient_checkpointing != "auto"
    level = LEVELS.index(model.gradient_checkpointing)
    choices = (training.batch_size, training.gradient_accumulation_steps, level)
    # The sum over ranks is the main one's choice, because every other rank adds zeros.
    sums = devices.sum(*(float(choice) if devices.is_main else 0.0 for choice in choices))
    size, accumulation, level = map(int, sums)
    return replace(prepared, config=with_micro_batch(prepared.config, (size, accumulation), LEVELS[level]))


def keep_resolved(prepared: Prepared, earlier: Mapping[str, Any]) -> Prepared:
    """The run with what `auto` became in `earlier`, its config as plain values: a resumed run repeats every sum."""
    requested = prepared.config
    if not has_auto(requested):
        return prepared
    batch_size, accumulation = requested.training.batch_size, requested.training.gradient_accumulation_steps
    if batch_size == "auto":
        batch_size = earlier["training"]["batch_size"]
        accumulation = earlier["training"]["gradient_accumulation_steps"]
    recompute = requested.model.gradient_checkpointing
    if recompute == "auto":
        recompute = earlier["model"]["gradient_checkpointing"]
    return replace(prepared, config=with_micro_batch(requested, (batch_size, accumulation), recompute))


def _largest_that_fits(
    forecaster: Forecaster, config: Config, recompute: Recompute, sizes: list[tuple[int, int]]
) -> tuple[Config, MemoryPlan] | None:
    """The largest of `sizes` (ascending) that fits, by bisection: memory grows with the size. None when none fits."""
    best = None
    low, high = 0, len(sizes) - 1
    middle = high  # the largest first, because on a machine with room it is the only one tried
    while low <= high:
        candidate = with_micro_batch(config, sizes[middle], recompute)
        memory = forecaster.memory(candidate)
        if memory.peak_bytes <= forecaster.target.budget_bytes:
            best, low = (candidate, memory), middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return best


def _reason(memory: MemoryPlan, forecaster: Forecaster) -> str:
    peak, budget = readable_bytes(memory.peak_bytes), readable_bytes(forecaster.target.budget_bytes)
    return f"planned {peak} of the {budget} that may be filled on {forecaster.target.name}"


def _decisions(requested: Config, chosen: Config, reason: str) -> list[Decision]:
    decisions = []
    if requested.training.batch_size == "auto":
        size, count = chosen.training.batch_size, chosen.training.gradient_accumulation_steps
        text = f"{size}, gradient_accumulation_steps {count}"
        assert isinstance(size, int)
        decisions.append(Decision("training.batch_size", text, f"a step keeps its {size * count} sequences; {reason}"))
    if requested.model.gradient_checkpointing == "auto":
        decisions.append(Decision("model.gradient_checkpointing", chosen.model.gradient_checkpointing, reason))
    return decisions
