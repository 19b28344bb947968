"""What `auto` becomes by the plan: the micro-batch, whether blocks are recomputed, and whether frozen weights are laid
out beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmtune.common.bytes import readable_bytes
from llmtune.common.decisions import Decision
from llmtune.config.schema import Config, TrainingConfig
from llmtune.engine.devices import Devices
from llmtune.engine.forward import cannot_prepack
from llmtune.engine.precision import DTYPES as COMPUTE
from llmtune.errors import ConfigError
from llmtune.plan.activation_trace import TRACE_ERRORS
from llmtune.plan.forecast import Forecaster
from llmtune.plan.memory import MemoryPlan
from llmtune.prepare import Prepared

__all__ = ["keep_resolved", "resolve", "resolve_on_all_ranks"]

SEQUENCES = TrainingConfig().batch_size
"""Sequences of a micro-batch when the config does not say; times `gradient_accumulation_steps` they are the global
batch `auto` keeps.
"""


Recompute = bool | Literal["offload"]
LEVELS: tuple[Recompute, ...] = (False, True, "offload")
"""What `model.gradient_checkpointing: auto` may become, least work first; the last only on a CUDA device, and not with
compiled blocks.
"""


def is_open(config: Config) -> bool:
    """Whether the plan has something to choose."""
    return "auto" in (config.training.batch_size, config.model.gradient_checkpointing, config.model.weights_prepack)


def resolve(forecaster: Forecaster) -> tuple[Prepared, list[Decision]]:
    """Choose what the config leaves to the plan.

    The global batch on each device stays as asked for, so the result does too.

    `training.batch_size: auto` stands for 8 sequences times `gradient_accumulation_steps`; that product is cut into the
    largest equal micro-batches that fit. Blocks are recomputed only where nothing fits without, their inputs offloaded
    only where that is not enough. Frozen weights are laid out for the kernels where there is room for that too and no
    blocks are recomputed, which is done to save memory. Raises ConfigError where that is asked for and cannot be.
    """
    asked = forecaster.config
    refusal = cannot_prepack(asked, forecaster.target.kind, COMPUTE[forecaster.precision])
    if asked.model.weights_prepack is True and refusal is not None:
        what = f"frozen weights cannot be laid out beforehand: {refusal}"
        raise ConfigError(what, where="model.weights_prepack", fix="set it to auto, which does where it can be")
    chosen, decisions = _settle_batch(forecaster, _prepacked(asked, asked.model.weights_prepack is True))
    if asked.model.weights_prepack == "auto" and refusal is None and not chosen.model.recomputes:
        chosen, more = _settle_prepack(forecaster, chosen)
        decisions += more
    prepared = forecaster.prepared
    return replace(prepared, config=chosen, decisions=(*prepared.decisions, *decisions)), decisions


def _settle_batch(forecaster: Forecaster, config: Config) -> tuple[Config, list[Decision]]:
    """Choose the micro-batch and whether blocks are recomputed, as far as `config` leaves them open."""
    if not is_open(config):
        return config, []
    levels = LEVELS if forecaster.target.kind == "cuda" and not config.training.compile else LEVELS[:2]
    checkpointing = levels if config.model.gradient_checkpointing == "auto" else (config.model.gradient_checkpointing,)
    sizes = micro_batches(config.training)
    budget = forecaster.target.budget_bytes
    for recompute in checkpointing:
        found = _largest_that_fits(forecaster, config, recompute, sizes)
        if found is not None:
            chosen, memory = found
            return chosen, _told(config, chosen, _why(memory, forecaster))
    chosen = variant(config, sizes[0], checkpointing[-1])
    needed = readable_bytes(forecaster.memory(chosen).peak_bytes)
    reason = (
        f"nothing fits: even so the plan is {needed} and {forecaster.target.name} has {readable_bytes(budget)} to fill"
    )
    return chosen, _told(config, chosen, reason)


def _settle_prepack(forecaster: Forecaster, config: Config) -> tuple[Config, list[Decision]]:
    """Choose whether frozen weights are laid out beforehand, where they can be; not for a model that has no plan."""
    try:
        memory = forecaster.memory(_prepacked(config, True))
    except TRACE_ERRORS:
        return config, []
    if not memory.counted.prepacked_bytes:
        return config, []
    fits = memory.peak_bytes <= forecaster.target.budget_bytes
    reason = f"two more copies of frozen weights, {readable_bytes(memory.counted.prepacked_bytes)}; with them {_why(memory, forecaster)}"
    return _prepacked(config, fits), [Decision("model.weights_prepack", fits, reason)]


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


def _prepacked(config: Config, wanted: bool) -> Config:
    return replace(config, model=replace(config.model, weights_prepack=wanted))


def resolve_on_all_ranks(forecaster: Forecaster, devices: Devices) -> Prepared:
    """The run with what is left to the plan chosen.

    With several processes as the first one chooses, whose memory may differ.
    """
    prepared, _ = resolve(forecaster)
    config = prepared.config
    assert isinstance(config.training.batch_size, int)
    recompute = config.model.gradient_checkpointing
    assert recompute != "auto"
    assert config.model.weights_prepack != "auto"
    mine = (
        config.training.batch_size, config.training.gradient_accumulation_steps, LEVELS.index(recompute), config.model.weights_prepack
    )  # fmt: skip
    size, count, level, prepack = (
        int(one) for one in devices.sum(*(float(one) if devices.is_main else 0.0 for one in mine))
    )
    return replace(prepared, config=_prepacked(variant(config, (size, count), LEVELS[level]), bool(prepack)))


def keep_resolved(prepared: Prepared, config: Mapping[str, Any]) -> Prepared:
    """The run with what an earlier process of it chose (its config as plain values), so that going on changes no sum."""
    if not is_open(prepared.config):
        return prepared
    training, asked = config["training"], prepared.config
    size = (training["batch_size"], training["gradient_accumulation_steps"])
    if asked.training.batch_size != "auto":
        size = (asked.training.batch_size, asked.training.gradient_accumulation_steps)
    before = config["model"]
    recompute, prepack = asked.model.gradient_checkpointing, asked.model.weights_prepack
    chosen = variant(asked, size, before["gradient_checkpointing"] if recompute == "auto" else recompute)
    return replace(
        prepared, config=_prepacked(chosen, before.get("weights_prepack", False) if prepack == "auto" else prepack)
    )


def _largest_that_fits(
    forecaster: Forecaster, asked: Config, recompute: Recompute, sizes: list[tuple[int, int]]
) -> tuple[Config, MemoryPlan] | None:
    """Try the largest first, because on a machine with room it is the only one tried.

    Then halve the rest (memory grows with the size).
    """
    best = None
    low, high = 0, len(sizes) - 1
    middle = high
    while low <= high:
        config = variant(asked, sizes[middle], recompute)
        memory = forecaster.memory(config)
        if memory.peak_bytes <= forecaster.target.budget_bytes:
            best, low = (config, memory), middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return best


def _why(memory: MemoryPlan, forecaster: Forecaster) -> str:
    target = forecaster.target
    return f"planned {readable_bytes(memory.peak_bytes)} of the {readable_bytes(target.budget_bytes)} that may be filled on {target.name}"


def _told(asked: Config, chosen: Config, reason: str) -> list[Decision]:
    decisions = []
    if asked.training.batch_size == "auto":
        size, count = chosen.training.batch_size, chosen.training.gradient_accumulation_steps
        text = f"{size}, gradient_accumulation_steps {count}"
        assert isinstance(size, int)
        decisions.append(Decision("training.batch_size", text, f"a step keeps its {size * count} sequences; {reason}"))
    if asked.model.gradient_checkpointing == "auto":
        decisions.append(Decision("model.gradient_checkpointing", chosen.model.gradient_checkpointing, reason))
    return decisions
