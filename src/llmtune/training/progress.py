"""What a run says to the person in front of it: what was read, what was chosen and why, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from llmtune.common.decisions import Decision
from llmtune.common.printing import PrintLine
from llmtune.data.dataset.row_result import STATUSES
from llmtune.errors import Problem
from llmtune.plan.summary import Plan, start_lines
from llmtune.prepare import Prepared
from llmtune.runs.checkpoint import LoadedCheckpoint
from llmtune.runs.folder import RunFolder
from llmtune.runs.identity import Difference, Effect
from llmtune.training.build import TrainingSetup
from llmtune.training.evaluator import EvalState

__all__ = [
    "outlook_lines",
    "print_decisions",
    "print_difference",
    "print_preflight",
    "print_resume",
    "print_setup",
    "tokenizing_progress",
]

_EVERY_S = 2.0


def print_decisions(decisions: Iterable[Decision], print_line: PrintLine) -> None:
    """Say each choice with its reason."""
    for decision in decisions:
        print_line(f"  {decision}")


def tokenizing_progress(print_line: PrintLine) -> Callable[[int, int | None, float], None]:
    """A progress function for `prepare` that says a line every two seconds; a quick preparation says nothing."""
    last = time.monotonic()

    def progress(done: int, total: int | None, rows_per_second: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY_S:
            last = time.monotonic()
            of = f" of {'' if done == total else 'about '}{total:,}" if total else ""
            print_line(f"tokenizing: {done:,}{of} rows, {rows_per_second:,.0f} rows/s")

    return progress


def print_preflight(
    prepared: Prepared, device_decisions: Iterable[Decision], needs: Plan, print_line: PrintLine
) -> None:
    """Say what is known before the model is loaded: rows and their fate, exact steps, what it needs, and last every
    choice made so far.

    The choices made when the model is put together (`print_setup`) follow as lines of the same list.
    """
    data = prepared.data
    print_line(f"model   {prepared.source.name}")
    for part, counts in data.ledger.summary().items():
        statuses = ", ".join(f"{counts[status]:,} {status.replace('_', ' ')}" for status in STATUSES if counts[status])
        print_line(f"{part:<7} {counts['input']:,} rows: {statuses}")
    plan = prepared.batch_plan() if isinstance(prepared.config.training.batch_size, int) else None
    if plan is not None:
        tokens = int(data.train.lengths.sum())
        weights = float(data.train.loss_weights.sum())
        print_line(
            f"plan    {plan.total_steps:,} steps, {plan.steps_per_epoch:,} an epoch; {tokens:,} tokens an epoch, "
            f"{weights:,.0f} of them trained"
        )
    for line in start_lines(needs):
        print_line(line)
    print_line("chosen for you:")
    print_decisions([*device_decisions, *prepared.decisions], print_line)


def print_setup(setup: TrainingSetup, more: Iterable[Decision], print_line: PrintLine) -> None:
    """Say what was chosen when model, engine and optimizer were put together."""
    print_decisions([*setup.decisions, *more], print_line)
    counts = setup.counts
    print_line(f"training {counts.trained:,} of {counts.total:,} parameters")


def print_resume(
    run: RunFolder, loaded: LoadedCheckpoint | None, problems: Iterable[Problem], print_line: PrintLine
) -> None:
    """Say where a run goes on, and what was found on the way."""
    for line in run.removed:
        print_line(f"cleaned up: {line}")
    for problem in problems:
        print_line(f"warning: {problem}")
    if loaded is None:
        print_line(f"{run.name}: no checkpoint was saved yet; training from step 1")
    elif run.info["state"] == "finished":
        print_line(
            f"{run.name}: finished after step {loaded.step} already; it goes on only where a changed key asks for more steps"
        )
    else:
        print_line(f"{run.name}: going on after step {loaded.step}")


def print_difference(difference: Difference, print_line: PrintLine) -> None:
    """Say what is not as it was when the run stopped, and what that means."""
    meaning = {
        Effect.HARMLESS: "harmless",
        Effect.ROUNDING: "sums may round differently: not byte-identical to a run never stopped",
        Effect.SCHEDULE: "another training from here on, as you asked",
    }
    print_line(f"changed: {difference} ({meaning[difference.effect]})")


def outlook_lines(outlook: EvalState) -> list[str]:
    """Before and after, side by side, as far as it was measured."""
    lines = []
    if outlook.first_nll is not None and outlook.last_nll is not None:
        best = f"; best {outlook.best_nll:.4f} after step {outlook.best_step}" if outlook.best_nll is not None else ""
        lines.append(f"held-out loss {outlook.first_nll:.4f} -> {outlook.last_nll:.4f} nats per token{best}")
    if outlook.num_answers and outlook.first_exact is not None and outlook.last_exact is not None:
        share = outlook.last_exact / outlook.num_answers
        lines.append(
            f"held-out answers exactly right: {outlook.first_exact} of {outlook.num_answers} before, "
            f"{outlook.last_exact} of {outlook.num_answers} after ({share:.0%})"
        )
    return lines


def summary_lines(metrics: dict[str, Any], outlook: EvalState) -> list[str]:
    """How a run ended, in a few lines."""
    lines = []
    if metrics.get("train_mean_nll") is not None:
        lines.append(f"last training loss {metrics['train_mean_nll']:.4f} nats per token")
    return lines + outlook_lines(outlook)
