"""What a run says to the person in front of it: what was read, what was chosen and why, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from llmtune.common.decisions import Decision
from llmtune.errors import Problem
from llmtune.plan.summary import Plan, short_lines
from llmtune.prepare import Prepared
from llmtune.runs.checkpoint import LoadedCheckpoint
from llmtune.runs.folder import RunFolder
from llmtune.runs.identity import Difference, Effect
from llmtune.training.build import Assembled
from llmtune.training.evaluator import Outlook

__all__ = [
    "outlook_lines",
    "say_assembled",
    "say_decisions",
    "say_difference",
    "say_preflight",
    "say_resume",
    "silent",
    "tokenizing_progress",
]

Say = Callable[[str], None]
_EVERY_S = 2.0


def silent(line: str) -> None:
    """Say nothing."""
    del line


def say_decisions(decisions: Iterable[Decision], say: Say) -> None:
    """Say each choice with its reason."""
    for decision in decisions:
        say(f"  {decision}")


def tokenizing_progress(say: Say) -> Callable[[int, int | None, float], None]:
    """A progress function for `prepare` that says a line every two seconds; a quick preparation says nothing."""
    last = time.monotonic()

    def progress(done: int, total: int | None, rows_per_second: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY_S:
            last = time.monotonic()
            of = f" of {'' if done == total else 'about '}{total:,}" if total else ""
            say(f"tokenizing: {done:,}{of} rows, {rows_per_second:,.0f} rows/s")

    return progress


def say_preflight(prepared: Prepared, device_decisions: Iterable[Decision], needs: Plan, say: Say) -> None:
    """Say what is known before the model is loaded: rows and their fate, exact steps, what it needs, and last every choice made so far.

    The choices made when the model is put together (`say_assembled`) follow as lines of the same list.
    """
    data = prepared.data
    say(f"model   {prepared.source.name}")
    for part, counts in data.ledger.summary().items():
        fates = ", ".join(f"{counts[fate]:,} {fate.replace('_', ' ')}" for fate in FATES if counts.get(fate))
        say(f"{part:<7} {counts['input']:,} rows: {fates}")
    plan = prepared.batch_plan() if isinstance(prepared.config.training.batch_size, int) else None
    if plan is not None:
        tokens = int(data.train.lengths.sum())
        weights = float(data.train.loss_weights.sum())
        say(
            f"plan    {plan.total_steps:,} steps, {plan.steps_per_epoch:,} an epoch; {tokens:,} tokens an epoch, "
            f"{weights:,.0f} of them trained"
        )
    for line in short_lines(needs):
        say(line)
    say("chosen for you:")
    say_decisions([*device_decisions, *prepared.decisions], say)


FATES = ("used", "cut", "dropped", "duplicate", "held_out", "bad")


def say_assembled(assembled: Assembled, more: Iterable[Decision], say: Say) -> None:
    """Say what was chosen when model, engine and optimizer were put together."""
    say_decisions([*assembled.decisions, *more], say)
    counts = assembled.counts
    say(f"training {counts.trained:,} of {counts.total:,} parameters")


def say_resume(run: RunFolder, loaded: LoadedCheckpoint | None, problems: Iterable[Problem], say: Say) -> None:
    """Say where a run goes on, and what was found on the way."""
    for line in run.swept:
        say(f"cleaned up: {line}")
    for problem in problems:
        say(f"warning: {problem}")
    if loaded is None:
        say(f"{run.name}: no checkpoint was saved yet; training from step 1")
    elif run.info["state"] == "finished":
        say(f"{run.name}: finished after step {loaded.step} already; it goes on only where a changed key asks for more steps")
    else:
        say(f"{run.name}: going on after step {loaded.step}")


def say_difference(difference: Difference, say: Say) -> None:
    """Say what is not as it was when the run stopped, and what that means."""
    meaning = {
        Effect.HARMLESS: "harmless",
        Effect.ROUNDING: "sums may round differently: not byte-identical to a run never stopped",
        Effect.SCHEDULE: "another training from here on, as you asked",
    }
    say(f"changed: {difference} ({meaning[difference.effect]})")


def outlook_lines(outlook: Outlook) -> list[str]:
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


def summary_lines(metrics: dict[str, Any], outlook: Outlook) -> list[str]:
    """How a run ended, in a few lines."""
    lines = []
    if metrics.get("train_mean_nll") is not None:
        lines.append(f"last training loss {metrics['train_mean_nll']:.4f} nats per token")
    return lines + outlook_lines(outlook)
