"""Memory of each of several devices, and the bytes that it sends in a step, by strategy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from llmtune.common.text import readable_bytes
from llmtune.config.distributed_checks import reason_against_sharding
from llmtune.plan.forecast import Forecaster
from llmtune.plan.meta_model import ModelSizes

__all__ = ["StrategyPlan", "plan_strategies", "strategies_as_dicts", "strategy_lines", "traffic_bytes"]

FORMULAS = {
    "ddp": "2(N-1)/N x gradients",
    "fsdp": "(N-1)/N x (2 x blocks + outside + gradients) x micro-batches",
}
"""What a device sends in a step, in words for people; `traffic_bytes` computes it."""


@dataclass(frozen=True)
class StrategyPlan:
    """One strategy on `devices` equal devices; bytes are of one device."""

    strategy: Literal["ddp", "fsdp"]
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
    formula: str
    refused_for: str | None
    """The key because of which a training would refuse this strategy."""


def traffic_bytes(
    strategy: Literal["ddp", "fsdp"],
    devices: int,
    *,
    gradient_bytes: int,
    block_bytes: int,
    outside_bytes: int,
    micro_batches: int,
) -> int:
    """Bytes that each of N devices sends in a step, by rings, which send the least (Patarasu and Yuan, 2009).

    ddp sums the gradients once a step: 2(N-1)/N of them. fsdp (arXiv:2304.11277), for each micro-batch, gathers the
    blocks twice and what is outside of them once, and scatters the summed gradients: (N-1)/N of each.

    >>> traffic_bytes("ddp", 4, gradient_bytes=100, block_bytes=80, outside_bytes=20, micro_batches=2)
    150
    >>> traffic_bytes("fsdp", 4, gradient_bytes=100, block_bytes=80, outside_bytes=20, micro_batches=2)
    420
    """
    # What is sent for one round over all devices, times N.
    once = {
        "ddp": 2 * gradient_bytes,
        "fsdp": (2 * block_bytes + outside_bytes + gradient_bytes) * micro_batches,
    }
    return -(-once[strategy] * (devices - 1) // devices)


def plan_strategies(forecaster: Forecaster) -> list[StrategyPlan]:
    """Plan ddp and fsdp on the forecaster's `world_size` devices. Raises any of MODEL_ERRORS as `memory` does."""
    config, devices = forecaster.config, forecaster.world_size
    sizes, micro_batches = forecaster.sizes(config), len(forecaster.batches(config).groups(1))
    plans = []
    for strategy in STRATEGIES:
        chosen = replace(config, distributed=replace(config.distributed, strategy=strategy))
        peak = forecaster.memory(chosen).peak_bytes
        counts = _counts(sizes, micro_batches)
        plans.append(
            StrategyPlan(
                strategy=strategy,
                devices=devices,
                peak_bytes=peak,
                fits=peak <= forecaster.target.budget_bytes,
                sent_bytes=traffic_bytes(strategy, devices, **counts),
                formula=FORMULAS[strategy],
                refused_for=reason_against_sharding(config) if strategy == "fsdp" else None,
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
        lines.append(f"  {plan.strategy:<5} {peak:>10}  {verdict}; sends {sent} a step = {plan.formula}{refused}")
    sizes = {"gradients": plan.gradient_bytes, "blocks": plan.block_bytes, "outside": plan.outside_bytes}
    counted = ", ".join(f"{name} {readable_bytes(size)}" for name, size in sizes.items())
    return [*lines, f"  N = {plan.devices}, {counted}, micro-batches {plan.micro_batches}"]


def strategies_as_dicts(plans: list[StrategyPlan]) -> list[dict[str, object]]:
    """The strategies as plain values; sizes in bytes."""
    return [asdict(plan) for plan in plans]


STRATEGIES: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
