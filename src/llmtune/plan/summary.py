"""The plan of a run: as an object, as lines for people and as plain values for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmtune.common.text import Fact, readable_bytes, readable_duration
from llmtune.config.schema import TrainingConfig
from llmtune.engine.probe import MODEL_ERRORS
from llmtune.engine.schedule import NEGLIGIBLE_RATE, Interval, interval, is_due, schedule_of, warmup_length
from llmtune.errors import MachineError, in_one_line
from llmtune.plan.forecast import Forecaster, Steps
from llmtune.plan.memory import MemoryPlan, optimizer_bytes
from llmtune.plan.suggestions import Suggestion, largest_batch, suggest
from llmtune.runs.disk import DiskForecast, forecast_disk

__all__ = ["Plan", "as_dict", "comparison_facts", "make_plan", "plan_lines", "start_facts"]


@dataclass(frozen=True)
class Plan:
    """Steps, memory, time and disk of a run on one device."""

    device: str
    budget_bytes: int
    """Bytes of the device's memory that may be filled."""
    steps: Steps
    memory: MemoryPlan | None
    """None where the model cannot be traced; `missing` then says why."""
    missing: str | None
    disk: DiskForecast | None
    disk_problem: str | None
    """Why the disk is too small, with the fix."""
    tokens_per_second: float | None
    """Measured on this machine for a run of the same model, settings and rows; None where it never was."""
    largest_batch: int | None = None
    """Sequences of the largest micro-batch that fits."""
    changes: tuple[Suggestion, ...] = ()
    """Where the run does not fit: changes that need less."""
    notes: tuple[str, ...] = ()
    """Settings that do nothing, or not all they say, in a run of this length."""

    @property
    def fits(self) -> bool | None:
        """Whether the planned peak is within the budget; None without a plan."""
        return None if self.memory is None else self.memory.peak_bytes <= self.budget_bytes

    @property
    def seconds(self) -> float | None:
        """Planned time of the steps, without evaluations; None where no rate was measured."""
        return None if self.tokens_per_second is None else self.steps.run_tokens / self.tokens_per_second


def make_plan(forecaster: Forecaster, *, full: bool = False) -> Plan:
    """Plan a run; `full` also looks for the largest micro-batch that fits, and for changes where the run does not.

    Raises ConfigError for a run of which every step has learning rate 0.
    """
    notes = _length_notes(forecaster)
    memory, missing = None, None
    try:
        memory = forecaster.memory()
    except MODEL_ERRORS as error:  # the model may train all the same, so a missing plan stops nothing
        missing = f"this model cannot be traced without its weights ({type(error).__name__}: {in_one_line(error)})"
    budget, largest, suggestions = forecaster.target.budget_bytes, None, []
    if full and memory is not None:
        # Each of these searches traces the model several times, which a training must not wait for.
        largest = largest_batch(forecaster, memory)
        if memory.peak_bytes > budget:
            suggestions = suggest(forecaster)
    disk, problem = _disk(forecaster, memory)
    return Plan(
        device=forecaster.target.name,
        budget_bytes=budget,
        steps=forecaster.steps(),
        memory=memory,
        missing=missing,
        disk=disk,
        disk_problem=problem,
        # A rate measured here says nothing about another device.
        tokens_per_second=forecaster.cached_rate() if forecaster.target.is_local else None,
        largest_batch=largest,
        changes=tuple(suggestions),
        notes=tuple(notes),
    )


def _length_notes(forecaster: Forecaster) -> list[str]:
    """Name each setting that a run as short as this one rounds to nothing, or never comes to."""
    config, batches = forecaster.config, forecaster.batches(forecaster.config)
    training, evaluation, total = config.training, config.evaluation, batches.total_steps
    rate, peak = schedule_of(training, total), training.learning_rate
    assert peak is not None, "a config is resolved before it is planned"
    warmup = warmup_length(total, training.warmup_steps, training.warmup_ratio)
    notes = _small_rate_notes(training, largest_rate=rate(min(warmup, total - 1)))
    if warmup >= total:
        notes.append(
            f"the warm-up is all {total:,} steps of this run: the learning rate ends at {rate(total - 1):.3g} "
            f"and never reaches its peak of {peak:.3g}; set training.warmup_steps or training.warmup_ratio lower"
        )

    if training.lr_schedule == "cosine_with_restarts" and training.num_cycles > total - warmup:
        notes.append(
            f"training.num_cycles asks for {training.num_cycles:,} falls of the learning rate, and after the warm-up "
            f"the run has {total - warmup:,} steps"
        )

    def steps_between(every_steps: float | None, every_epochs: float | None) -> Interval | None:
        spans = {"total_steps": total, "steps_per_epoch": batches.steps_per_epoch}
        return interval(every_steps, every_epochs, **spans)

    every = steps_between(evaluation.every_steps, evaluation.every_epochs)
    if every is not None and every > total:
        notes.append(
            f"nothing is evaluated during training: every {float(every):g} steps is more than the {total:,} of this run"
        )
    if every is not None and evaluation.early_stopping_patience is not None:
        # The first evaluation cannot be worse than another, and stopping at the last step is no stopping.
        chances = sum(is_due(step, every) for step in range(1, total)) - (0 if evaluation.before_training else 1)
        if chances < evaluation.early_stopping_patience:
            notes.append(
                f"this run cannot stop early: {chances} evaluations before its last step can be without improvement, "
                f"and evaluation.early_stopping_patience is {evaluation.early_stopping_patience}"
            )
    saves = steps_between(config.checkpoint.every_steps, config.checkpoint.every_epochs)
    if saves is not None and saves > total:
        notes.append(f"saved at the end only: every {float(saves):g} steps is more than the {total:,} of this run")
    if config.tracking.every_steps > total:
        notes.append(
            f"metrics of the last step only: tracking.every_steps is {config.tracking.every_steps:,} "
            f"and the run has {total:,}"
        )
    return notes


def _small_rate_notes(training: TrainingConfig, *, largest_rate: float) -> list[str]:
    """Name each learning rate that leaves float32 weights of a usual size as they are. largest_rate: of all steps."""
    rates = {
        "learning_rate": largest_rate,
        "embedding_learning_rate": training.embedding_learning_rate,
    }
    return [
        f"training.{key} of {rate:.3g} trains next to nothing: an update changes a weight by about that much, "
        f"and float32 keeps weights above {rate * 2**24:.2g} as they are"
        for key, rate in rates.items()
        if rate is not None and rate < NEGLIGIBLE_RATE
    ]


def _disk(forecaster: Forecaster, memory: MemoryPlan | None) -> tuple[DiskForecast | None, str | None]:
    if memory is None:
        return None, None
    config, sizes = forecaster.config, memory.sizes
    batches = forecaster.batches(config)
    state = optimizer_bytes(config.training.optimizer, entries=sizes.trained, entry_bytes=sizes.gradient_bytes)
    try:
        return forecast_disk(
            config,
            weights_bytes=sizes.gradient_bytes,
            optimizer_bytes=state,
            total_steps=batches.total_steps,
            steps_per_epoch=batches.steps_per_epoch,
            has_heldout=forecaster.prepared.data.eval is not None,
        ), None
    except MachineError as error:
        return None, str(error)


def start_facts(plan: Plan) -> list[Fact]:
    """What a training says of its plan before it starts."""
    memory = plan.memory
    notes = [Fact("note", note) for note in plan.notes]
    if memory is None:
        return [*notes, Fact("memory", f"not planned: {plan.missing}")]
    peak, budget = readable_bytes(memory.peak_bytes), readable_bytes(plan.budget_bytes)
    facts = [*notes, Fact("memory", f"{peak} planned of {budget} on {plan.device}", memory.parts)]
    if memory.host_bytes:
        facts.append(Fact("host", f"{readable_bytes(memory.host_bytes)} of page-locked memory for what is offloaded"))
    if not plan.fits:
        facts.append(Fact("warning:", "by the plan this does not fit; `llmtune plan` says what to change"))
    if plan.seconds is not None:
        rate = f"{plan.tokens_per_second:,.0f} tokens/s"
        facts.append(Fact("time", f"{readable_duration(plan.seconds)} planned at the {rate} measured here before"))
    return facts


def plan_lines(plan: Plan) -> list[str]:
    """The plan for people, one fact a line."""
    lines = [*_step_lines(plan.steps), *(f"note       {note}" for note in plan.notes), *_memory_lines(plan)]
    if plan.largest_batch is not None:
        lines.append(f"batch      up to {plan.largest_batch} sequences a micro-batch fit")
    if plan.seconds is not None:
        rate = f"{plan.tokens_per_second:,.0f} tokens/s"
        lines.append(f"time       {readable_duration(plan.seconds)} at {rate} measured here, without evaluations")
    else:
        lines.append("time       not measured for this shape yet; `llmtune plan --measure` runs a few steps")
    if plan.disk is not None:
        lines.append(f"disk       {plan.disk}")
    if plan.disk_problem is not None:
        lines.append(f"disk       {plan.disk_problem}")
    if plan.changes:
        lines.append("what to change, and the memory planned then:")
    for change in plan.changes:
        fits = "fits" if change.fits else "    "
        lines.append(f"  {readable_bytes(change.peak_bytes):>10}  {fits}  {change.overrides}")
    return lines


def _step_lines(steps: Steps) -> list[str]:
    trained = f"{steps.trained_tokens:,.0f} of them trained"
    return [
        f"steps      {steps.total_steps:,}; {steps.steps_per_epoch:,} an epoch of {steps.sequences:,} sequences",
        f"tokens     {steps.run_tokens:,} in all; {steps.tokens:,} an epoch, {trained}",
        f"padding    {steps.padding_share:.1%} of the computed positions",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    if memory is None:
        return [f"memory     not planned: {plan.missing}"]
    peak, budget = readable_bytes(memory.peak_bytes), readable_bytes(plan.budget_bytes)
    verdict = f"{plan.device} may fill {budget}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    lines = [f"memory     {peak} at most ({memory.moment}); {verdict}"]
    lines += [f"  {name:<13}{readable_bytes(count):>10}" for name, count in memory.parts.items() if count]
    if memory.host_bytes:
        host = readable_bytes(memory.host_bytes)
        lines.append(f"  and {host} of page-locked memory of the host, for what is offloaded")
    lines.append(f"  largest micro-batch: {memory.batch.tokens:,} tokens in {len(memory.batch.lengths)} rows")
    lines.append(f"  {memory.sizes.trained:,} of {memory.sizes.parameters:,} parameters are trained")
    return lines


def comparison_facts(plan: Plan, *, steps: int, seconds: float, memory_bytes: int) -> list[Fact]:
    """Planned beside measured, at the end of a run: `steps` made, seconds spent in them, most memory held in bytes."""
    facts = [Fact("steps", f"{plan.steps.total_steps:,} planned, {steps:,} made")]
    if plan.memory is not None and memory_bytes:
        planned, measured = readable_bytes(plan.memory.peak_bytes), readable_bytes(memory_bytes)
        change = f"{plan.memory.peak_bytes / memory_bytes - 1:+.0%}"
        facts.append(Fact("memory", f"{planned} planned, {measured} measured ({change})"))
    planned = f"{readable_duration(plan.seconds)} planned, " if plan.seconds is not None else ""
    return [*facts, Fact("time", f"{planned}{readable_duration(seconds)} measured in steps")]


def as_dict(plan: Plan) -> dict[str, object]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    memory = plan.memory
    planned = None
    if memory is not None:
        planned = {
            "peak_bytes": memory.peak_bytes,
            "moment": memory.moment,
            "parts": memory.parts,
            "host_bytes": memory.host_bytes,
            "largest_micro_batch": {"tokens": memory.batch.tokens, "rows": len(memory.batch.lengths)},
            "parameters": memory.sizes.parameters,
            "trained": memory.sizes.trained,
        }
    return {
        "device": plan.device,
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "steps": asdict(plan.steps),
        "memory": planned,
        "missing": plan.missing,
        "largest_batch": plan.largest_batch,
        "tokens_per_second": plan.tokens_per_second,
        "seconds": plan.seconds,
        "disk": None if plan.disk is None else plan.disk._asdict(),
        "disk_problem": plan.disk_problem,
        "notes": list(plan.notes),
        "changes": [
            {"overrides": change.overrides, "peak_bytes": change.peak_bytes, "fits": change.fits}
            for change in plan.changes
        ],
    }
