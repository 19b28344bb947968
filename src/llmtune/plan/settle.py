"""What `auto` becomes by the plan: the micro-batch, and whether blocks are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmtune.config.schema import Config, TrainingConfig
from llmtune.decisions import Decision
from llmtune.plan.forecast import Forecaster
from llmtune.plan.memory import MemoryPlan, gigabytes
from llmtune.preparation import Prepared
from llmtune.training.devices import Devices

__all__ = ["as_before", "is_open", "settle", "settle_together"]

SEQUENCES = TrainingConfig().batch_size
"""Sequences of a micro-batch when the config does not say; times `gradient_accumulation_steps` they are the global batch `auto` keeps."""


Recompute = bool | Literal["offload"]
LEVELS: tuple[Recompute, ...] = (False, True, "offload")
"""What `model.gradient_checkpointing: auto` may become, least work first; the last only on a CUDA device, and not with compiled blocks."""


def is_open(config: Config) -> bool:
    """Whether the plan has something to choose."""
    return config.training.batch_size == "auto" or config.model.gradient_checkpointing == "auto"


def settle(forecaster: Forecaster) -> tuple[Prepared, list[Decision]]:
    """Choose what the config leaves to the plan; the global batch on each device stays as asked for, so the result does too.

    `training.batch_size: auto` stands for 8 sequences times `gradient_accumulation_steps`; that product is cut into the largest equal
    micro-batches that fit. Blocks are recomputed only where nothing fits without, their inputs offloaded only where that is not enough.
    """
    config = forecaster.config
    if not is_open(config):
        return forecaster.prepared, []
    levels = LEVELS if forecaster.target.kind == "cuda" and not config.training.compile else LEVELS[:2]
    checkpointing = levels if config.model.gradient_checkpointing == "auto" else (config.model.gradient_checkpointing,)
    sizes = micro_batches(config.training)
    budget = forecaster.target.budget_bytes
    for recompute in checkpointing:
        found = _largest_that_fits(forecaster, recompute, sizes, budget)
        if found is not None:
            chosen, memory = found
            return _settled(forecaster, chosen, _why(memory, budget, forecaster.target.name))
    chosen = variant(config, sizes[0], checkpointing[-1])
    needed = gigabytes(forecaster.memory(chosen).peak_bytes)
    reason = f"nothing fits: even so the plan is {needed} and {forecaster.target.name} has {gigabytes(budget)} to fill"
    return _settled(forecaster, chosen, reason)


def micro_batches(training: TrainingConfig) -> list[tuple[int, int]]:
    """The (micro-batch, accumulation) pairs with the global batch asked for, smallest micro-batch first.

    >>> micro_batches(TrainingConfig(batch_size="auto", gradient_accumulation_steps=1))
    [(1, 8), (2, 4), (4, 2), (8, 1)]
    """
    if training.batch_size != "auto":
        return [(training.batch_size, training.gradient_accumulation_steps)]
    assert isinstance(SEQUENCES, int)
    total = SEQUENCES * training.gradient_accumulation_steps
    return [(size, total // size) for size in range(1, total + 1) if total % size == 0]


def variant(config: Config, size: tuple[int, int], recompute: Recompute) -> Config:
    """The config with this cut of the global batch, and blocks recomputed or not."""
    training = replace(config.training, batch_size=size[0], gradient_accumulation_steps=size[1])
    return replace(config, training=training, model=replace(config.model, gradient_checkpointing=recompute))


def settle_together(forecaster: Forecaster, devices: Devices) -> Prepared:
    """The run with what is left to the plan chosen; with several processes as the first one chooses, whose memory may differ."""
    prepared, _ = settle(forecaster)
    config = prepared.config
    assert isinstance(config.training.batch_size, int)
    recompute = config.model.gradient_checkpointing
    assert recompute != "auto"
    mine = (config.training.batch_size, config.training.gradient_accumulation_steps, LEVELS.index(recompute))
    size, count, level = (int(one) for one in devices.sum(*(float(one) if devices.is_main else 0.0 for one in mine)))
    return replace(prepared, config=variant(config, (size, count), LEVELS[level]))


def as_before(prepared: Prepared, config: Mapping[str, Any]) -> Prepared:
    """The run with what an earlier process of it chose (its config as plain values), so that going on changes no sum."""
    if not is_open(prepared.config):
        return prepared
    training, asked = config["training"], prepared.config
    size = (training["batch_size"], training["gradient_accumulation_steps"])
    if asked.training.batch_size != "auto":
        size = (asked.training.batch_size, asked.training.gradient_accumulation_steps)
    recompute = asked.model.gradient_checkpointing
    return replace(prepared, config=variant(asked, size, config["model"]["gradient_checkpointing"] if recompute == "auto" else recompute))


def _largest_that_fits(
    forecaster: Forecaster, recompute: Recompute, sizes: list[tuple[int, int]], budget: int
) -> tuple[Config, MemoryPlan] | None:
    """Try the largest first, because on a machine with room it is the only one tried; then halve the rest (memory grows with the size)."""
    best = None
    low, high = 0, len(sizes) - 1
    middle = high
    while low <= high:
        config = variant(forecaster.config, sizes[middle], recompute)
        memory = forecaster.memory(config)
        if memory.peak_bytes <= budget:
            best, low = (config, memory), middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return best


def _why(memory: MemoryPlan, budget: int, name: str) -> str:
    return f"planned {gigabytes(memory.peak_bytes)} of the {gigabytes(budget)} that may be filled on {name}"


def _settled(forecaster: Forecaster, chosen: Config, reason: str) -> tuple[Prepared, list[Decision]]:
    asked, decisions = forecaster.config, []
    if asked.training.batch_size == "auto":
        size, count = chosen.training.batch_size, chosen.training.gradient_accumulation_steps
        text = f"{size}, gradient_accumulation_steps {count}"
        assert isinstance(size, int)
        decisions.append(Decision("training.batch_size", text, f"a step keeps its {size * count} sequences; {reason}"))
    if asked.model.gradient_checkpointing == "auto":
        decisions.append(Decision("model.gradient_checkpointing", chosen.model.gradient_checkpointing, reason))
    prepared = forecaster.prepared
    return replace(prepared, config=chosen, decisions=(*prepared.decisions, *decisions)), decisions
