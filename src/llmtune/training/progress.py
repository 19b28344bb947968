"""What a run prints: the rows read, the choices made and their reasons, how it ended; by one of its processes alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import durable
from llmtune.common.decisions import Decision
from llmtune.common.printing import PrintLine
from llmtune.common.text import printable
from llmtune.data.dataset.row_result import STATUSES
from llmtune.engine.devices import Devices
from llmtune.errors import MachineError, Problem
from llmtune.plan.summary import Plan, comparison_lines, start_lines
from llmtune.prepare import Prepared
from llmtune.runs.checkpoint import LoadedCheckpoint
from llmtune.runs.folder import RunFolder
from llmtune.runs.identity import Difference, Effect
from llmtune.training.build import TrainingSetup
from llmtune.training.evaluator import EvalState

if TYPE_CHECKING:
    from llmtune.training.training_run import Result

__all__ = [
    "RankPrinter",
    "final_lines",
    "print_decisions",
    "print_difference",
    "print_length",
    "print_preflight",
    "print_result",
    "print_resume",
    "print_setup",
    "tokenizing_progress",
]

PROGRESS_EVERY_S = 2.0


class RankPrinter:
    """Prints the lines of the main process; those of the others go to `logs/rank-N.log` in the run's folder.

    What the others have to say before there is a folder is written when it is opened, and lost when it never is.
    """

    def __init__(self, devices: Devices, print_line: PrintLine) -> None:
        self._rank, self._print_line = devices.rank, print_line
        self._early_lines: list[str] = []
        self._file: Path | None = None

    def __call__(self, line: str) -> None:
        """Print or write one line."""
        if self._rank == 0:
            self._print_line(line)
        elif self._file is None:
            self._early_lines.append(line)
        else:
            with suppress(MachineError):  # a full disk costs these lines and not the run
                durable.append_line(self._file, line)

    def open(self, run_folder: Path) -> None:
        """Write to this run's folder from here on."""
        if self._rank == 0:
            return
        with suppress(MachineError):
            durable.make_folder(run_folder / "logs")
        self._file = run_folder / "logs" / f"rank-{self._rank}.log"
        for line in self._early_lines:
            self(line)


def print_decisions(decisions: Iterable[Decision], print_line: PrintLine) -> None:
    """Print each choice with its reason."""
    for decision in decisions:
        print_line(f"  {decision}")


def tokenizing_progress(print_line: PrintLine) -> Callable[[int, int | None, float], None]:
    """Return a progress function for `prepare` that prints a line every two seconds."""
    last = time.monotonic()

    def progress(done: int, total: int | None, rows_per_second: float) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_EVERY_S:
            last = time.monotonic()
            # Before the end the number of rows is an estimate from the bytes read so far.
            of = f" of {'' if done == total else 'about '}{total:,}" if total else ""
            print_line(f"tokenizing: {done:,}{of} rows, {rows_per_second:,.0f} rows/s")

    return progress


def print_preflight(
    prepared: Prepared, device_decisions: Iterable[Decision], plan: Plan, print_line: PrintLine
) -> None:
    """Print what is known before the model is loaded: rows, exact steps, memory, and last every choice made so far.

    The choices made while the model is built follow as lines of the same list (`print_setup`).
    """
    data = prepared.data
    print_line(f"model   {prepared.source.name}")
    for part, counts in data.ledger.summary().items():
        statuses = ", ".join(f"{counts[status]:,} {status.replace('_', ' ')}" for status in STATUSES if counts[status])
        answers = f"; {counts['answers']:,} answers, {counts['trained_answers']:,} trained" if counts["answers"] else ""
        if "pairs" in counts:
            answers = f"; {counts['pairs']:,} pairs of answers"
        print_line(f"{part:<7} {counts['input']:,} rows: {statuses}{answers}")
    for line in (*data.ledger.training_warnings(), *data.ledger.unused_fields()):
        print_line(f"note    {line}")
    batches = prepared.batch_plan()
    tokens, weights = batches.tokens_of_epoch()
    print_line(
        f"plan    {batches.total_steps:,} steps, {batches.steps_per_epoch:,} an epoch; {tokens:,} tokens an epoch, "
        f"{weights:,.0f} of them trained"
    )
    for line in start_lines(plan):
        print_line(line)
    print_line("chosen for you:")
    print_decisions([*device_decisions, *prepared.decisions], print_line)


def print_setup(setup: TrainingSetup, tracker_decisions: Iterable[Decision], print_line: PrintLine) -> None:
    """Print the choices made while model, engine and optimizer were built."""
    print_decisions([*setup.decisions, *tracker_decisions], print_line)
    counts = setup.counts
    print_line(f"training {counts.trained:,} of {counts.total:,} parameters")


def print_resume(
    run: RunFolder,
    loaded: LoadedCheckpoint | None,
    problems: Iterable[Problem],
    print_line: PrintLine,
    *,
    newest_step: int | None = None,
) -> None:
    """Print where a run goes on, what was cleaned up and which checkpoints were damaged.

    newest_step: of the newest checkpoint, where another one was asked for.
    """
    for line in run.removed:
        print_line(f"cleaned up: {line}")
    for problem in problems:
        print_line(f"warning: {problem}")
    if loaded is None:
        print_line(f"{run.name}: no checkpoint was saved yet; training from step 1")
    elif newest_step is not None and newest_step > loaded.step:
        print_line(
            f"{run.name}: going back from step {newest_step} to step {loaded.step}, and on from there; "
            "later checkpoints are replaced when their step comes"
        )
    elif run.info["state"] == "finished":
        print_line(
            f"{run.name}: finished after step {loaded.step} already; "
            "it goes on only where a changed key asks for more steps"
        )
    else:
        print_line(f"{run.name}: going on after step {loaded.step}")


def print_length(done: int, total: int, print_line: PrintLine) -> None:
    """Print that a resumed run is as long as, or longer than, its config now asks for."""
    if done > total:
        print_line(f"the run is {total:,} steps long now, and {done:,} are done: none is left to train")


def print_difference(difference: Difference, print_line: PrintLine) -> None:
    """Print a difference to the run when it stopped, and its effect."""
    meaning = {
        Effect.HARMLESS: "harmless",
        Effect.ROUNDING: "sums may round differently: not byte-identical to a run never stopped",
        Effect.SCHEDULE: "another training from here on, as you asked",
    }
    print_line(f"changed: {difference} ({meaning[difference.effect]})")


def print_result(result: Result, print_line: PrintLine) -> None:
    """Print how a run ended, in the process that wrote its folder."""
    if result.folder is None:
        return
    print_line(f"{result.state} after step {result.step}")
    lines = summary_lines(result.metrics, result.eval_state)
    if result.final_step is not None:
        has_best = (result.folder / "checkpoints" / "best").is_dir()
        lines += final_lines(result.eval_state, final_step=result.final_step, run=result.folder, has_best=has_best)
    if result.plan is not None:
        lines += comparison_lines(
            result.plan, steps=result.step, seconds=result.seconds, memory_bytes=result.memory_bytes
        )
    for line in lines:
        print_line(line)
    if result.state == "finished":
        print_line(f"try it: llmtune generate {result.folder} 'your question'")


def eval_lines(evaluations: EvalState) -> list[str]:
    """Return the first and the last evaluation side by side, as far as they were made."""
    lines = []
    first, last = evaluations.first_nll, evaluations.last_nll
    if first is not None and last is not None:
        is_known = evaluations.best_value is not None
        name = "" if evaluations.best_by == "eval_mean_nll" else f" {evaluations.best_by}"
        best = f"; best{name} {evaluations.best_value:.4f} after step {evaluations.best_step}" if is_known else ""
        lines.append(f"held-out loss {first:.4f} -> {last:.4f} {evaluations.loss_unit}{best}")
    count, first_exact, last_exact = evaluations.num_answers, evaluations.first_exact, evaluations.last_exact
    if count and first_exact is not None and last_exact is not None:
        lines.append(
            f"held-out answers exactly right: {first_exact} of {count} before, "
            f"{last_exact} of {count} after ({last_exact / count:.0%})"
        )
    return lines


def final_lines(evaluations: EvalState, *, final_step: int, run: Path, has_best: bool) -> list[str]:
    """Return which model became the result where it is not the last one, and how far it is from the best.

    final_step: updates behind `final/`. has_best: whether checkpoints/best was kept.
    """
    best, last, trained = evaluations.best_value, evaluations.last_value, evaluations.best_trained_value
    if best is None or trained is None or last is None:
        return []
    metric, is_last = evaluations.best_by, final_step == evaluations.last_step
    value, lines = last if is_last else trained, []
    if not is_last:
        lines.append(f"final is the model after step {final_step}, the best by {metric} ({trained:.4f})")
    elif trained != last:
        use = f"; use it with `llmtune generate {run} --checkpoint best`" if has_best else ""
        step = evaluations.best_trained_step
        lines.append(f"final is worse than the best model by {abs(last - trained):.4f} ({metric}, step {step}){use}")
    if evaluations.best_step == 0 and value != best:
        lines.append(
            f"warning: the model before training was better than final by {abs(value - best):.4f} ({metric}): "
            "try a lower training.learning_rate, or more rows"
        )
    return lines


def summary_lines(metrics: Mapping[str, Any], evaluations: EvalState) -> list[str]:
    """Return how a run ended, in a few lines."""
    loss = metrics.get("train_mean_nll", metrics.get("train_loss"))
    lines = [] if loss is None else [f"last training loss {loss:.4f} {evaluations.loss_unit}"]
    accuracy, margin = metrics.get("eval_accuracy"), metrics.get("eval_rewards_margin")
    if accuracy is not None and margin is not None:
        lines.append(f"held-out pairs told apart: {accuracy:.0%}, mean margin {margin:.4f}")
    of_sets = {
        key.removeprefix("eval_").removesuffix("_mean_nll"): value
        for key, value in metrics.items()
        if key.startswith("eval_") and key.endswith("_mean_nll") and key != "eval_mean_nll"
    }
    by_set = ", ".join(f"{printable(name)} {value:.4f}" for name, value in of_sets.items())
    return [*lines, *eval_lines(evaluations), *([f"held-out loss by source: {by_set}"] if by_set else [])]
