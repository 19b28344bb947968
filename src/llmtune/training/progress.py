"""What a run prints: the rows read, the choices made and their reasons, how it ended; by one of its processes alone."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune import durable
from llmtune.common.decisions import Decision
from llmtune.common.text import Fact, PrintLine, printable
from llmtune.data.dataset.row_result import STATUSES
from llmtune.engine.devices import Devices
from llmtune.engine.masters import MasterOptimizer
from llmtune.engine.sharded_tensors import local_part
from llmtune.errors import MachineError, Problem
from llmtune.models.parameters import base_model_of, find_score_head
from llmtune.plan.summary import Plan, comparison_facts, start_facts
from llmtune.prepare import Prepared
from llmtune.runs.checkpoint import LoadedCheckpoint
from llmtune.runs.folder import RunFolder
from llmtune.runs.identity import Difference, Effect
from llmtune.tracking.screen import Screen
from llmtune.training.build import TrainingSetup
from llmtune.training.evaluator import EvalState

__all__ = [
    "RankPrinter",
    "Result",
    "final_facts",
    "measured_bytes",
    "next_commands",
    "print_difference",
    "print_length",
    "print_preflight",
    "print_result",
    "print_resume",
    "print_setup",
    "tokenizing_progress",
]


@dataclass(frozen=True)
class Result:
    """The outcome of a training."""

    folder: Path | None
    """The run folder; None in processes that write nothing."""
    state: str
    """`finished`, or `stopped` (saved, to be resumed)."""
    step: int
    """Updates applied."""
    metrics: dict[str, Any]
    """The last training line, and the newest value of every evaluation metric."""
    eval_state: EvalState
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    final_step: int | None = None
    """Updates behind the model in `final/`, which may be the best and not the last; None where there is none."""
    plan: Plan | None = None
    """The plan of this run; None for one that was resumed."""
    unchanged_reason: str | None = None
    """Why the steps made now have changed no weight; None where they have."""
    seconds: float = 0.0
    """Time spent in steps."""
    tokens: int = 0
    """Real tokens trained on."""
    memory_bytes: int = 0
    """Most memory held (see `peak_memory_bytes`)."""


def measured_bytes(setup: TrainingSetup) -> dict[str, int]:
    """Bytes of weights, adapter and optimizer state that this process holds, under the plan's names for them."""
    weights = _bytes([*map(setup.strategy.part, setup.model.parameters()), *setup.model.buffers()])
    adapter = _bytes(map(setup.strategy.part, setup.parameters.values())) if setup.is_adapted else 0
    states = (state for part in setup.optimizer.parts for state in part.state.values())
    masters = setup.parameters.values() if isinstance(setup.optimizer, MasterOptimizer) else ()
    moments = (local_part(value) for state in states for value in state.values() if isinstance(value, Tensor))
    return {"weights": weights - adapter, "adapter": adapter, "optimizer": _bytes(masters) + _bytes(moments)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Sum of their sizes, each stored tensor counted once: tied weights share one."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


PROGRESS_EVERY_S = 2.0


class RankPrinter:
    """Prints the lines of the main process; those of the others go to `logs/rank-N.log` in the run's folder.

    What the others have to say before there is a folder is written when it is opened, and lost when it never is.
    screen: lays out what the main process says; plain lines when None.
    """

    def __init__(self, devices: Devices, print_line: PrintLine, screen: Screen | None = None) -> None:
        self._rank, self._print_line = devices.rank, print_line
        self.screen = screen if devices.rank == 0 else None
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
    prepared: Prepared, config_name: str, device_decisions: Iterable[Decision], plan: Plan, printer: RankPrinter
) -> None:
    """Print what is known before the model is loaded: rows, exact steps, memory, and last every choice made so far.

    The choices made while the model is built follow as lines of the same list (`print_setup`).
    """
    decisions = [*device_decisions, *prepared.decisions]
    facts = [*_data_facts(prepared), *start_facts(plan)]
    if printer.screen is not None:
        printer.screen.title(prepared.source.short_name, config_name)
        printer.screen.facts(facts)
        printer.screen.decisions("chosen for you", decisions)
        return
    for line in (*facts, "chosen for you:", *(f"  {decision}" for decision in decisions)):
        printer(str(line))


def _data_facts(prepared: Prepared) -> list[Fact]:
    data = prepared.data
    facts = [Fact("model", prepared.source.name)]
    for part, counts in data.ledger.summary().items():
        statuses = ", ".join(f"{counts[status]:,} {status.replace('_', ' ')}" for status in STATUSES if counts[status])
        answers = f"; {counts['answers']:,} answers, {counts['trained_answers']:,} trained" if counts["answers"] else ""
        if "pairs" in counts:
            answers = f"; {counts['pairs']:,} pairs of answers"
        facts.append(Fact(part, f"{counts['input']:,} rows: {statuses}{answers}"))
    facts += [Fact("note", line) for line in (*data.ledger.training_warnings(), *data.ledger.unused_fields())]
    batches = prepared.batch_plan()
    tokens, weights = batches.tokens_of_epoch()
    of_epoch = f"{tokens:,} tokens an epoch, {weights:,.0f} of them trained"
    return [*facts, Fact("plan", f"{batches.total_steps:,} steps, {batches.steps_per_epoch:,} an epoch; {of_epoch}")]


def print_setup(setup: TrainingSetup, tracker_decisions: Iterable[Decision], printer: RankPrinter) -> None:
    """Print the choices made while model, engine and optimizer were built."""
    decisions, counts = [*setup.decisions, *tracker_decisions], setup.counts
    fact = Fact("training", f"{counts.trained:,} of {counts.total:,} parameters")
    if printer.screen is not None:
        printer.screen.decisions("", decisions)
        printer.screen.end_of_decisions()
        printer.screen.facts([fact])
        return
    for line in (*(f"  {decision}" for decision in decisions), fact):
        printer(str(line))


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
        print_line(f"{run.name}: going back from step {newest_step} to step {loaded.step}, and on from there")
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


def print_result(result: Result, print_line: PrintLine, screen: Screen | None = None) -> None:
    """Print how a run ended, and what to do next, in the process that wrote its folder."""
    if result.folder is None:
        return
    facts = [
        Fact("result", f"{result.state} after step {result.step}", plain=f"{result.state} after step {result.step}")
    ]
    facts += summary_facts(result.metrics, result.eval_state)
    if result.final_step is not None:
        has_best = (result.folder / "checkpoints" / "best").is_dir()
        facts += final_facts(result.eval_state, final_step=result.final_step, run=result.folder, has_best=has_best)
    if result.unchanged_reason is not None:
        facts.append(Fact("warning:", f"the steps made now have changed no weight: {result.unchanged_reason}"))
    if result.plan is not None:
        facts += comparison_facts(
            result.plan, steps=result.step, seconds=result.seconds, memory_bytes=result.memory_bytes
        )
    gives_scores = find_score_head(base_model_of(result.model)) is not None
    commands = next_commands(result.folder, result.state, gives_scores=gives_scores)
    if screen is not None:
        screen.title(result.folder.name)
        screen.facts([*facts, Fact("run", printable(result.folder))])
        screen.commands("next", commands)
        return
    for fact in facts:
        print_line(str(fact))
    if result.state == "finished":
        print_line(f"try it: {commands[0][1]}")


def next_commands(folder: Path, state: str, *, gives_scores: bool = False) -> list[tuple[str, str]]:
    """Return what to do with a run that ended so: each purpose with a command that can be copied.

    gives_scores: of a model that answers nothing.

    >>> next_commands(Path("runs/a b"), "stopped")
    [('resume', "llmtune resume 'runs/a b'")]
    """
    here = Path.cwd()
    run = shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
    if state != "finished":
        return [("resume", f"llmtune resume {run}")]
    is_adapter = (folder / "final" / "adapter_config.json").is_file()
    answers = [
        ("ask", f"llmtune generate {run} 'your question'"),
        ("talk", f"llmtune chat {run}"),
        ("compare", f"llmtune compare {run}"),
    ]
    scores = [("judge", f"llmtune predict {run} --data rows.jsonl"), ("compare", f"llmtune compare {run} --held-out")]
    return [
        *(scores if gives_scores else answers),
        ("look", f"llmtune dashboard {run}"),
        ("report", f"llmtune report {run}"),
        *([("merge", f"llmtune merge-lora {run} -o merged")] if is_adapter else []),
    ]


def eval_facts(evaluations: EvalState) -> list[Fact]:
    """Return the first and the last evaluation side by side, as far as they were made."""
    facts = []
    first, last = evaluations.first_nll, evaluations.last_nll
    if first is not None and last is not None:
        is_known = evaluations.best_value is not None
        name = "" if evaluations.best_by == "eval_mean_nll" else f" {evaluations.best_by}"
        best = f"; best{name} {evaluations.best_value:.4f} after step {evaluations.best_step}" if is_known else ""
        noun = "" if evaluations.loss_unit.endswith("reward") else "loss "
        facts.append(Fact("held-out", f"{noun}{first:.4f} -> {last:.4f} {evaluations.loss_unit}{best}"))
    count, first_exact, last_exact = evaluations.num_answers, evaluations.first_exact, evaluations.last_exact
    if count and first_exact is not None and last_exact is not None:
        before, after = f"{first_exact} of {count} before", f"{last_exact} of {count} after ({last_exact / count:.0%})"
        facts.append(Fact("held-out", f"answers exactly right: {before}, {after}"))
    return facts


def final_facts(evaluations: EvalState, *, final_step: int, run: Path, has_best: bool) -> list[Fact]:
    """Return which model became the result where it is not the last one, and how far it is from the best.

    final_step: updates behind `final/`. has_best: whether checkpoints/best was kept.
    """
    best, last, trained = evaluations.best_value, evaluations.last_value, evaluations.best_trained_value
    if best is None or trained is None or last is None:
        return []
    metric, is_last = evaluations.best_by, final_step == evaluations.last_step
    value, facts = last if is_last else trained, []
    if not is_last:
        line = f"final is the model after step {final_step}, the best by {metric} ({trained:.4f})"
        facts.append(Fact("final", line.removeprefix("final "), plain=line))
    elif trained != last:
        use = f"; use it with `llmtune generate {run} --checkpoint best`" if has_best else ""
        step = evaluations.best_trained_step
        line = f"final is worse than the best model by {abs(last - trained):.4f} ({metric}, step {step}){use}"
        facts.append(Fact("final", line.removeprefix("final "), plain=line))
    if evaluations.best_step == 0 and value != best:
        worse = f"the model before training was better than final by {abs(value - best):.4f} ({metric})"
        facts.append(Fact("warning:", f"{worse}: try a lower training.learning_rate, or more rows"))
    return facts


def summary_facts(metrics: Mapping[str, Any], evaluations: EvalState) -> list[Fact]:
    """Return how a run ended, in a few facts."""
    loss = metrics.get("train_mean_nll", metrics.get("train_loss"))
    facts = []
    if loss is not None:
        last = f"{loss:.4f} {evaluations.loss_unit}"
        facts.append(Fact("training", f"last loss {last}", plain=f"last training loss {last}"))
    if "reward" in metrics:  # the loss of drawn answers is near 0 whatever they are worth
        facts = [Fact("training", f"last mean reward {metrics['reward']:.4f}")]
    accuracy, margin = metrics.get("eval_accuracy"), metrics.get("eval_rewards_margin")
    if accuracy is not None and margin is not None:
        facts.append(Fact("held-out", f"pairs told apart: {accuracy:.0%}, mean margin {margin:.4f}"))
    of_sets = {
        key.removeprefix("eval_").removesuffix("_mean_nll"): value
        for key, value in metrics.items()
        if key.startswith("eval_") and key.endswith("_mean_nll") and key != "eval_mean_nll"
    }
    by_set = ", ".join(f"{printable(name)} {value:.4f}" for name, value in of_sets.items())
    by_source = [Fact("held-out", f"loss by source: {by_set}")] if by_set else []
    return [*facts, *eval_facts(evaluations), *by_source]
