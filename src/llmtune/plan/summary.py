"""The whole plan of a run, as an object, as lines for people and as plain values for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmtune.common.bytes import readable_bytes
from llmtune.errors import MachineError, in_one_line
from llmtune.plan.activation_trace import TRACE_ERRORS
from llmtune.plan.forecast import Forecaster, Steps, kept_rate
from llmtune.plan.memory import MemoryPlan, optimizer_bytes
from llmtune.plan.suggestions import Change, changes, largest_batch
from llmtune.runs.disk import DiskForecast, forecast_disk

__all__ = ["Plan", "as_dict", "compared_lines", "duration", "lines", "make_plan", "short_lines"]


@dataclass(frozen=True)
class Plan:
    """What a run will need on one device."""

    device: str
    budget_bytes: int
    """What may be filled there."""
    steps: Steps
    memory: MemoryPlan | None
    """None where the model cannot be traced; `missing` then says why."""
    missing: str | None
    disk: DiskForecast | None
    disk_problem: str | None
    """Why the disk is too small, with the fix."""
    tokens_per_second: float | None
    """Measured on this machine for this very shape, now or before."""
    largest_batch: int | None = None
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the planned peak is within the budget; None without a plan."""
        return None if self.memory is None else self.memory.peak_bytes <= self.budget_bytes

    @property
    def seconds(self) -> float | None:
        """Planned time of the steps, without evaluations; None where no rate was measured."""
        return None if self.tokens_per_second is None else self.steps.run_tokens / self.tokens_per_second


def make_plan(forecaster: Forecaster, *, full: bool = False) -> Plan:
    """Plan a run; `full` also looks for the largest micro-batch that fits and, where nothing does, for what to change."""
    memory, missing = None, None
    try:
        memory = forecaster.memory()
    except TRACE_ERRORS as error:
        missing = f"this model cannot be traced without its weights ({type(error).__name__}: {in_one_line(error)})"
    most, advice = None, []
    if full and memory is not None:
        most = largest_batch(forecaster, memory)
        if memory.peak_bytes > forecaster.target.budget_bytes:
            advice = changes(forecaster)
    disk, problem = _disk(forecaster, memory)
    return Plan(
        device=forecaster.target.name,
        budget_bytes=forecaster.target.budget_bytes,
        steps=forecaster.steps(),
        memory=memory,
        missing=missing,
        disk=disk,
        disk_problem=problem,
        tokens_per_second=kept_rate(forecaster) if forecaster.target.is_here else None,
        largest_batch=most,
        changes=tuple(advice),
    )


def _disk(forecaster: Forecaster, memory: MemoryPlan | None) -> tuple[DiskForecast | None, str | None]:
    if memory is None:
        return None, None
    config, counted = forecaster.config, memory.counted
    batches = forecaster.batches(config)
    every = config.checkpoint.every_steps or batches.steps_per_epoch
    has_best = config.checkpoint.keep_best and forecaster.prepared.data.eval is not None
    state = optimizer_bytes(config.training.optimizer, entries=counted.trained, entry_bytes=counted.gradient_bytes)
    try:
        return forecast_disk(
            config.run.output_dir,
            checkpoint_bytes=counted.gradient_bytes + state,
            saves=-(-batches.total_steps // every),
            keep_last=config.checkpoint.keep_last,
            best_bytes=counted.gradient_bytes if has_best else 0,
            final_bytes=counted.gradient_bytes,
        ), None
    except MachineError as error:
        return None, str(error)


def short_lines(plan: Plan) -> list[str]:
    """What a training says before it starts."""
    memory = plan.memory
    if memory is None:
        return [f"memory  not planned: {plan.missing}"]
    parts = ", ".join(f"{name} {readable_bytes(count)}" for name, count in memory.parts.items() if count)
    found = [
        f"memory  {readable_bytes(memory.peak_bytes)} planned of {readable_bytes(plan.budget_bytes)} on {plan.device} ({parts})"
    ]
    if memory.host_bytes:
        found.append(f"host    {readable_bytes(memory.host_bytes)} of page-locked memory for the inputs of blocks")
    if not plan.fits:
        found.append("warning: by the plan this does not fit; `llmtune plan` says what to change")
    if plan.seconds is not None:
        found.append(
            f"time    {duration(plan.seconds)} planned at the {plan.tokens_per_second:,.0f} tokens/s measured here before"
        )
    return found


def lines(plan: Plan) -> list[str]:
    """The plan for people, one fact a line."""
    steps, memory = plan.steps, plan.memory
    found = [
        f"steps      {steps.total_steps:,}; {steps.steps_per_epoch:,} an epoch of {steps.sequences:,} sequences",
        f"tokens     {steps.run_tokens:,} in all; {steps.tokens:,} an epoch, {steps.trained_tokens:,.0f} of them trained",
        f"padding    {steps.padding_share:.1%} of the computed positions",
    ]
    if memory is None:
        found.append(f"memory     not planned: {plan.missing}")
    else:
        may = f"{plan.device} may fill {readable_bytes(plan.budget_bytes)}: {'fits' if plan.fits else 'DOES NOT FIT'}"
        found.append(f"memory     {readable_bytes(memory.peak_bytes)} at most ({memory.moment}); {may}")
        found += [f"  {name:<13}{readable_bytes(count):>10}" for name, count in memory.parts.items() if count]
        if memory.host_bytes:
            found.append(
                f"  and {readable_bytes(memory.host_bytes)} of page-locked memory of the host, for the inputs of blocks"
            )
        found.append(f"  largest micro-batch: {memory.batch.tokens:,} tokens in {len(memory.batch.lengths)} rows")
        found.append(f"  {memory.counted.trained:,} of {memory.counted.parameters:,} parameters are trained")
    if plan.largest_batch is not None:
        found.append(f"batch      up to {plan.largest_batch} sequences a micro-batch fit")
    if plan.seconds is not None:
        found.append(
            f"time       {duration(plan.seconds)} at {plan.tokens_per_second:,.0f} tokens/s measured here, without evaluations"
        )
    else:
        found.append("time       not measured for this shape yet; `llmtune plan --measure` runs a few steps")
    if plan.disk is not None:
        found.append(f"disk       {plan.disk}")
    if plan.disk_problem is not None:
        found.append(f"disk       {plan.disk_problem}")
    if plan.changes:
        found.append("what to change, and the memory planned then:")
        found += [
            f"  {readable_bytes(one.peak_bytes):>10}  {'fits' if one.fits else '    '}  {one.overrides}"
            for one in plan.changes
        ]
    return found


def compared_lines(plan: Plan, *, steps: int, seconds: float, memory_bytes: int) -> list[str]:
    """Planned beside measured, at the end of a run: `steps` made, seconds spent in them, most memory held in bytes."""
    found = [f"steps   {plan.steps.total_steps:,} planned, {steps:,} made"]
    if plan.memory is not None and memory_bytes:
        off = plan.memory.peak_bytes / memory_bytes - 1
        found.append(
            f"memory  {readable_bytes(plan.memory.peak_bytes)} planned, {readable_bytes(memory_bytes)} measured ({off:+.0%})"
        )
    planned = f"{duration(plan.seconds)} planned, " if plan.seconds is not None else ""
    found.append(f"time    {planned}{duration(seconds)} measured in steps")
    return found


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    memory = plan.memory
    return {
        "device": plan.device,
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "steps": asdict(plan.steps),
        "memory": None
        if memory is None
        else {
            "peak_bytes": memory.peak_bytes,
            "moment": memory.moment,
            "parts": memory.parts,
            "host_bytes": memory.host_bytes,
            "largest_micro_batch": {"tokens": memory.batch.tokens, "rows": len(memory.batch.lengths)},
            "parameters": memory.counted.parameters,
            "trained": memory.counted.trained,
        },
        "missing": plan.missing,
        "largest_batch": plan.largest_batch,
        "tokens_per_second": plan.tokens_per_second,
        "seconds": plan.seconds,
        "disk": None if plan.disk is None else plan.disk._asdict(),
        "disk_problem": plan.disk_problem,
        "changes": [asdict(one) for one in plan.changes],
    }


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(42), duration(200), duration(7500)
    ('42 s', '3.3 min', '2.1 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
