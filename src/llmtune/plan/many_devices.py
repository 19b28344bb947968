"""Memory of each of several devices, and the bytes that it sends in a step, by strategy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from llmtune.common.text import readable_bytes
from llmtune.config.distributed_checks import reason_against_masters, reason_against_sharding
from llmtune.config.schema import Config
from llmtune.engine.precision import DTYPES
from llmtune.engine.sequence_parallel import shared_heads
from llmtune.plan.forecast import Forecaster
from llmtune.plan.meta_model import ModelSizes

__all__ = ["StrategyName", "StrategyPlan", "plan_strategies", "strategies_as_dicts", "strategy_lines", "traffic_bytes"]

StrategyName: TypeAlias = Literal["ddp", "fsdp", "zero-1", "zero-2", "zero-3"]

FORMULAS = {
    "ddp": "2(N-1)/N x gradients",
    "fsdp": "(N-1)/N x (2 x blocks + outside + gradients) x micro-batches",
    "zero-1": "2(N-1)/N x gradients",
    "zero-2": "(N-1)/N x gradients x (micro-batches + 1)",
    "zero-3": "(N-1)/N x (2 x blocks + 2 x outside + gradients) x micro-batches",
}
"""What a device sends in a step, in words for people; `traffic_bytes` computes it."""

EXCHANGE = " + exchanged"
"""What is added where several devices share each row; `exchange_bytes` computes it."""


@dataclass(frozen=True)
class StrategyPlan:
    """One strategy on `devices` equal devices; bytes are of one device."""

    strategy: StrategyName
    devices: int
    peak_bytes: int
    fits: bool
    sent_bytes: int
    """Bytes sent in a step; as many are received."""
    gradient_bytes: int
    block_bytes: int
    """Bytes of the weights in blocks, which fsdp gathers twice: for the forward and for the backward pass."""
    outside_bytes: int
    """Bytes of the other weights, which fsdp gathers once."""
    micro_batches: int
    """Micro-batches of the main process in the first step."""
    exchanged_bytes: int
    """Of the bytes sent, those of attention where several devices share each row."""
    formula: str
    refused_for: str | None
    """The key because of which a training would refuse this strategy."""


def traffic_bytes(
    strategy: StrategyName,
    devices: int,
    *,
    gradient_bytes: int,
    block_bytes: int,
    outside_bytes: int,
    micro_batches: int,
) -> int:
    """Bytes that each of N devices sends in a step, by rings, which send the least (Patarasu and Yuan, 2009).

    ddp sums the gradients once a step: 2(N-1)/N of them. fsdp (arXiv:2304.11277), for each micro-batch, gathers the
    blocks twice and what is outside of them once, and scatters the summed gradients: (N-1)/N of each. ZeRO
    (arXiv:1910.02054) scatters the gradients, once a step (stage 1) or for each micro-batch (2, 3), and gathers the
    moved weights, as many bytes as their gradients, once a step (1, 2), or all weights twice for each micro-batch (3).

    >>> traffic_bytes("ddp", 4, gradient_bytes=100, block_bytes=80, outside_bytes=20, micro_batches=2)
    150
    >>> traffic_bytes("fsdp", 4, gradient_bytes=100, block_bytes=80, outside_bytes=20, micro_batches=2)
    420
    >>> traffic_bytes("zero-2", 4, gradient_bytes=100, block_bytes=80, outside_bytes=20, micro_batches=2)
    225
    """
    # What is sent for one round over all devices, times N.
    once = {
        "ddp": 2 * gradient_bytes,
        "fsdp": (2 * block_bytes + outside_bytes + gradient_bytes) * micro_batches,
        "zero-1": 2 * gradient_bytes,
        "zero-2": gradient_bytes * (micro_batches + 1),
        "zero-3": (2 * block_bytes + 2 * outside_bytes + gradient_bytes) * micro_batches,
    }
    return -(-once[strategy] * (devices - 1) // devices)


def exchange_bytes(sharing: int, *, tokens: int, row_bytes: int, passes: int) -> int:
    """Bytes that each of P devices sends in a step for the rows that they share (arXiv:2309.14509).

    Each has a P-th of the tokens, and sends all but a P-th of what attention takes and gives there: in the forward
    pass, in the backward pass, and where blocks are recomputed once more (`passes`). row_bytes: queries, keys, values
    and outputs of one position in all blocks.

    >>> exchange_bytes(2, tokens=100, row_bytes=10, passes=2), exchange_bytes(1, tokens=100, row_bytes=10, passes=2)
    (500, 0)
    """
    return -(-passes * tokens * row_bytes * (sharing - 1) // sharing**2)


def _exchanged(forecaster: Forecaster) -> int:
    config, shape = forecaster.config, forecaster.shape.config.get_text_config()
    sharing = config.distributed.sequence_parallel
    if sharing == 1:
        return 0
    lengths = np.asarray(forecaster.prepared.examples.lengths)
    heads = shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    key_heads = shared_heads(getattr(shape, "num_key_value_heads", None) or heads, sharing)
    number_bytes = (DTYPES[forecaster.precision] or torch.float32).itemsize  # type: ignore[index]
    return exchange_bytes(
        sharing,
        tokens=sum(int(lengths[group].sum()) for group in forecaster.batches(config).groups(1)),
        row_bytes=2 * (heads + key_heads) * width * shape.num_hidden_layers * number_bytes,
        passes=3 if config.model.recomputes else 2,
    )


def _refused_for(forecaster: Forecaster, chosen: Config) -> str | None:
    sharing = chosen.distributed.sequence_parallel
    heads = getattr(forecaster.shape.config.get_text_config(), "num_attention_heads", 1)
    if forecaster.world_size % sharing or heads % sharing:
        return "distributed.sequence_parallel"
    was_chosen = any(decision.key == "training.master_weights" for decision in forecaster.prepared.decisions)
    if chosen.training.master_weights is True and not was_chosen and reason_against_masters(chosen) is not None:
        return "training.master_weights"
    return reason_against_sharding(chosen)


def plan_strategies(forecaster: Forecaster) -> list[StrategyPlan]:
    """Plan every strategy on the forecaster's `world_size` devices. Raises any of MODEL_ERRORS as `memory` does."""
    config, devices = forecaster.config, forecaster.world_size
    micro_batches = len(forecaster.batches(config).groups(1))
    exchanged = _exchanged(forecaster)
    plans = []
    for strategy, keys in STRATEGIES.items():
        offload = config.distributed.offload if config.distributed.offload in OFFLOADS[strategy] else None
        distributed = replace(config.distributed, deepspeed_config=None, zero_stage=None, offload=offload)
        chosen = replace(config, distributed=replace(distributed, **keys))
        refused_for = _refused_for(forecaster, chosen)
        if reason_against_masters(chosen) is not None:  # `auto` would keep float32 weights there
            chosen = replace(chosen, training=replace(chosen.training, master_weights=False))
        peak = forecaster.memory(chosen).peak_bytes
        counts = _counts(forecaster.sizes(chosen), micro_batches)
        plans.append(
            StrategyPlan(
                strategy=strategy,
                devices=devices,
                peak_bytes=peak,
                fits=peak <= forecaster.target.budget_bytes,
                sent_bytes=traffic_bytes(strategy, devices, **counts) + exchanged,
                exchanged_bytes=exchanged,
                formula=FORMULAS[strategy] + (EXCHANGE if exchanged else ""),
                refused_for=refused_for,
                **counts,
            )
        )
    return plans


def _counts(sizes: ModelSizes, micro_batches: int) -> dict[str, int]:
    return {
        "gradient_bytes": sizes.gradient_bytes,
        "block_bytes": sizes.block_bytes,
        "outside_bytes": sizes.outside_bytes,
        "micro_batches": micro_batches,
    }


def strategy_lines(plans: list[StrategyPlan]) -> list[str]:
    """The strategies for people: a heading, one line each, and what the formulas are made of; none without plans."""
    if not plans:
        return []
    lines = [f"on {plans[0].devices} devices, for each of them:"]
    for plan in plans:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        refused = f"; refused for {plan.refused_for}" if plan.refused_for else ""
        peak, sent = readable_bytes(plan.peak_bytes), readable_bytes(plan.sent_bytes)
        lines.append(f"  {plan.strategy:<6} {peak:>10}  {verdict}; sends {sent} a step = {plan.formula}{refused}")
    sizes = {"gradients": plan.gradient_bytes, "blocks": plan.block_bytes, "outside": plan.outside_bytes}
    if plan.exchanged_bytes:
        sizes["exchanged"] = plan.exchanged_bytes
    counted = ", ".join(f"{name} {readable_bytes(size)}" for name, size in sizes.items())
    return [*lines, f"  N = {plan.devices}, {counted}, micro-batches {plan.micro_batches}"]


def strategies_as_dicts(plans: list[StrategyPlan]) -> list[dict[str, object]]:
    """The strategies as plain values; sizes in bytes."""
    return [asdict(plan) for plan in plans]


STRATEGIES: dict[StrategyName, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero-1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero-2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero-3": {"strategy": "deepspeed", "zero_stage": 3},
}
"""Keys of the section `distributed` by which a training takes the strategy; `zero-N` are DeepSpeed's stages."""

OFFLOADS: dict[StrategyName, tuple[str, ...]] = {
    "ddp": (),
    "fsdp": ("all",),
    "zero-1": ("optimizer",),
    "zero-2": ("optimizer",),
    "zero-3": ("optimizer", "all"),
}
"""Values of `distributed.offload` that each of them has."""
