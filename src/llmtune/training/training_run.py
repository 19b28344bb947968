"""A run while it trains: what one process holds between two steps, and what is decided at each step boundary.

The loop yields after every optimizer update and `TrainingRun` decides, in a plain `for`, what happens then. Every yield
is a step boundary, so whatever is done there (evaluate, save, stop) loses nothing and changes nothing (promises N12,
P2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.common.printing import PrintLine
from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options
from llmtune.engine.allocator import release_free_memory
from llmtune.engine.devices import peak_memory_bytes
from llmtune.engine.divergence import non_finite_parameters
from llmtune.engine.loop import StepResult, train_steps
from llmtune.engine.state import TrainingState, capture, restore
from llmtune.errors import DivergedError, MachineError, StoppedBySignal
from llmtune.models.memory_errors import MEMORY_ERRORS, is_out_of_memory
from llmtune.plan.forecast import Forecaster
from llmtune.plan.out_of_memory import out_of_memory_error, reserve_address_space
from llmtune.plan.summary import Plan
from llmtune.prepare import Prepared
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs.checkpoint import LoadedCheckpoint
from llmtune.runs.folder import RunFolder
from llmtune.runs.run_file import RunState
from llmtune.runs.signals import StopRequest
from llmtune.tracking.choose import keeps_record
from llmtune.tracking.jsonl import RunRecord
from llmtune.tracking.queue import TrackerQueue
from llmtune.tracking.tracker import Tracker
from llmtune.training import checkpointer, run_setup
from llmtune.training.build import TrainingSetup
from llmtune.training.checkpointer import Checkpointer
from llmtune.training.evaluator import EvalState, Evaluator

__all__ = ["Result", "TrainingRun"]


@dataclass(frozen=True)
class Result:
    """What a training left behind."""

    folder: Path | None
    """The run folder; None in processes that write nothing."""
    state: str
    """`finished`, or `stopped` (saved, to be resumed)."""
    step: int
    """Updates applied."""
    metrics: dict[str, Any]
    """The last training line, and the newest value of every evaluation metric."""
    outlook: EvalState
    model: Any
    tokenizer: Any
    plan: Plan | None = None
    """What was planned for this run; None for one that went on."""
    seconds: float = 0.0
    """Time spent in steps."""
    tokens: int = 0
    """Real tokens trained on."""
    memory_bytes: int = 0
    """Most memory held (see `peak_memory_bytes`)."""


class TrainingRun:
    """One process's share of a run."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        prepared: Prepared,
        setup: TrainingSetup,
        run: RunFolder | None,
        trackers: list[Tracker],
        stop: StopRequest,
        print_line: PrintLine,
        *,
        plan: Plan | None = None,
        options: Options | None = None,
    ) -> None:
        self._options, self._reserve = options or Options(), reserve_address_space()
        self.plan, self._seconds, self._tokens = plan, 0.0, 0
        self.prepared, self.setup, self.run, self.stop, self.print_line = prepared, setup, run, stop, print_line
        self.config = setup.config
        self.learning_rate = setup.learning_rate
        """Rate as a function of the updates made; may be replaced between two steps."""
        self.measure: Callable[[StepResult], Mapping[str, Any]] | None = None
        """Further values of a step, for its line (the Python API's metrics); plain numbers, and never able to raise."""
        self.state = TrainingState()
        self.metrics: dict[str, Any] = {}
        self.outcome: RunState = "running"
        self.record = RunRecord(run.path) if run is not None and keeps_record(self.config.tracking) else None
        self.trackers = TrackerQueue(trackers if run is not None else [], print_line=print_line)
        self.observer = Evaluator(prepared, setup, self.record, self.trackers)
        self.keeper = Checkpointer(run, prepared, setup, print_line) if run is not None else None
        self._config_name = resolved.name
        self._saved_windows = -1

    def restore(self, loaded: LoadedCheckpoint | None) -> None:
        """Put everything back as it was at the checkpoint's step boundary, or as it was before step 1 where nothing was
        saved.
        """
        if loaded is None:
            if self.record is not None:
                self.record.rewind({"metrics": 0, "samples": 0})
            return
        checkpointer.restore_weights(self.setup, loaded)
        extra = loaded.snapshot.state["pipeline"]
        restore(
            loaded.snapshot,
            parameters=self.setup.parameters,
            optimizer=self.setup.optimizer,
            precision=self.setup.precision,
            state=self.state,
            devices=self.setup.devices,
        )
        self.observer.restore(extra["outlook"])
        self.metrics = dict(extra["metrics"])
        if self.record is not None:
            self.record.rewind(extra["record"])
        if self.keeper is not None:
            self.keeper.protect(loaded.step)
        self._saved_windows = self.state.windows

    def go(self) -> Result:
        """Train to the end or to a stop."""
        for _ in self.steps():
            pass
        return self.result()

    def steps(self) -> Iterator[StepResult]:
        """Train, and yield each step after what was due at it (evaluation, checkpoint) was done.

        Whatever happens, run.json says how it ended and trackers are let go; a caller who leaves the loop leaves a
        saved, resumable run. Raises DivergedError, StoppedBySignal (saved), MachineError.
        """
        self.outcome = "failed"
        try:
            self._begin()
            self.outcome = yield from self._train()
            self._finish()
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(error) from error
        except DivergedError as error:
            self.outcome = "diverged"
            raise self._naming_what_stands(error) from error
        except StoppedBySignal:
            self.outcome = "stopped"
            raise
        except GeneratorExit:
            self._save_before_leaving()
            raise
        finally:
            self._let_go()

    def leave(self) -> None:
        """Save and let go of a run none of whose steps was asked for."""
        try:
            self._save_before_leaving()
        finally:
            self._let_go()

    def _save_before_leaving(self) -> None:
        """Save a run that its caller leaves.

        Weights that are not finite end it as diverged, as they do everywhere (P10).
        """
        self.outcome = "stopped"
        try:
            if self.state.windows:
                self.save()
        except DivergedError as error:
            self.outcome = "diverged"
            raise self._naming_what_stands(error) from error

    def _naming_what_stands(self, error: DivergedError) -> DivergedError:
        """The same refusal with the last good checkpoint in it."""
        saved = self._newest_saved()
        stands = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved before"
        first = error.problems[0]
        return DivergedError(first.problem, first.where, f"{first.fix}; {stands}")

    def _newest_saved(self) -> Path | None:
        """The folder of the last checkpoint by step; None before the first, and in processes that write nothing."""
        saved = checkpoints.all_checkpoints(self.run) if self.run is not None else []
        return saved[-1].path if saved else None

    def result(self) -> Result:
        """What the training left behind so far."""
        return Result(
            folder=self.run.path if self.run is not None else None,
            state=self.outcome,
            step=self.state.step,
            metrics=self.metrics,
            outlook=self.observer.outlook,
            model=self.setup.model,
            tokenizer=self.prepared.tokenizer.tokenizer,
            plan=self.plan,
            seconds=self._seconds,
            tokens=self._tokens,
            memory_bytes=peak_memory_bytes(self.setup.devices.device),
        )

    def evaluate(self, *, full: bool = False) -> dict[str, Any]:
        """Evaluate now, record it, and keep a new best at once.

        `full` counts exact answers where the config asks for them.
        """
        release_free_memory()
        improved, metrics = self.observer.look(self.state.step, self.state.epoch, full=full)
        release_free_memory()
        self.metrics |= metrics
        if improved and self.state.step and self.keeper is not None and self.config.checkpoint.keep_best:
            self._refuse_non_finite_weights()
            self.keeper.keep_best(metrics, self.state.step)
        return metrics

    def save(self) -> None:
        """Commit a checkpoint of this step boundary; a disk that refuses costs the save, never the run (P7)."""
        if self._saved_windows == self.state.windows:
            return
        self._refuse_non_finite_weights()
        snapshot = capture(
            parameters=self.setup.parameters,
            optimizer=self.setup.optimizer,
            precision=self.setup.precision,
            state=self.state,
            devices=self.setup.devices,
        )
        extra: Mapping[str, Any] = {
            "outlook": self.observer.state(),
            "metrics": self.metrics,
            "record": self.record.position() if self.record is not None else {"metrics": 0, "samples": 0},
        }
        if self.keeper is not None:
            saved = self.keeper.save(
                self.state.step, replace(snapshot, state={**snapshot.state, "pipeline": extra}), self.record
            )
            self._saved_windows = self.state.windows if saved else -1
        self.setup.devices.barrier()

    def _begin(self) -> None:
        """Tell everyone, and look at the untouched model."""
        if self.run is not None:
            self.run.update(state="running", total_steps=self.setup.batches.total_steps)
            self.trackers.start(
                run_setup.run_info(self.run, self._config_name, self.prepared, self.setup, self.state.step)
            )
            self.observer.begin(self.state.step)
        if self.state.windows == 0 and self.config.evaluation.before_training:
            self.evaluate(full=True)

    def _train(self) -> Generator[StepResult, None, RunState]:
        """The loop, and what is decided after each step. Returns `finished` or `stopped`."""
        setup, config = self.setup, self.config
        deadline = time.monotonic() + 60 * config.training.max_minutes if config.training.max_minutes else None
        if self.observer.should_stop_early:
            return "finished"
        for result in train_steps(
            nll_sum=setup.nll_sum,
            update=setup.update,
            windows=setup.batches.windows(self.state.windows),
            learning_rate=self._rate,
            precision=setup.precision,
            state=self.state,
            devices=setup.devices,
            max_skipped_steps=config.training.max_skipped_steps,
            mfu=setup.mfu,
        ):
            self._note(result)
            last = self.state.windows == setup.batches.total_steps
            if self.observer.is_due(result.step, last=last) and not result.skipped:
                self.evaluate(full=last)
            early = not last and self.observer.should_stop_early
            late = deadline is not None and time.monotonic() > deadline and not last
            asked = (
                self.stop.is_requested
            )  # read once: a signal that arrives during this save is answered after the next step
            if early or late or last or asked or self._save_is_due(result):
                self.save()
            if asked:
                self.stop.raise_if_requested(saved=f"saved after step {result.step}")
            yield result
            if early:
                self.print_line(
                    f"stopped early: no improvement in {config.evaluation.early_stopping_patience} evaluations"
                )
                return "finished"
            if late:
                self.print_line(f"stopped after {config.training.max_minutes} minutes; `llmtune resume` goes on")
                return "stopped"
        return "finished"

    def _out_of_memory(self, error: BaseException) -> MachineError:
        """The refusal for memory that is used up, after letting go of the gradients; the newest checkpoint stands."""
        if self._reserve is not None:
            self._reserve.close()
        self.setup.optimizer.zero_grad(set_to_none=True)
        saved = self._newest_saved()
        return out_of_memory_error(
            error,
            Forecaster.for_this_machine(self.prepared, self._options, self.setup.devices),
            doing=f"in step {self.state.step + 1}",
            where=str(self.run.path) if self.run is not None else None,
            saved=saved.name if saved else None,
        )

    def _rate(self, step: int) -> float:
        return self.learning_rate(step)  # looked up at each step, because it may be replaced between two

    def _note(self, result: StepResult) -> None:
        self._seconds, self._tokens = self._seconds + result.step_seconds, self._tokens + result.num_tokens
        further = self.measure(result) if self.measure is not None else {}
        self.metrics |= {**further, **result.metrics()}
        self.observer.note(result, further)
        if result.skipped:
            self.print_line(f"step {result.step + 1} skipped: {result.reason}; rows: {', '.join(result.sources)}")

    def _refuse_non_finite_weights(self) -> None:
        """Raise DivergedError where an update has made a weight infinite or NaN: it never becomes best or resumable
        (P10).
        """
        broken = non_finite_parameters(self.setup.parameters)
        if broken:
            raise DivergedError(
                f"{len(broken)} weights are no longer finite after step {self.state.step}, {broken[0]} first; this step is not saved",
                where=str(self.run.path) if self.run is not None else None,
                fix="start again with a lower training.learning_rate",
            )

    def _save_is_due(self, result: StepResult) -> bool:
        every = self.config.checkpoint.every_steps or self.setup.batches.steps_per_epoch
        return result.step % every == 0 and not result.skipped

    def _finish(self) -> None:
        """Write what the user takes away, and be honest about a disk that never took the last save."""
        if self.keeper is None:
            return
        if self.outcome == "finished":
            self.keeper.write_final(self.metrics, self.state.step)
        self.keeper.raise_if_unsaved()

    def _let_go(self) -> None:
        """Let trackers, files and the run go.

        A disk that refuses is said, and is the run's outcome only where nothing worse happened.
        """
        if self._reserve is not None:
            self._reserve.close()
        self.observer.end()
        self.trackers.finish(self.outcome)
        refusals: list[MachineError] = []
        run, closing = self.run, []
        if self.record is not None:
            closing.append(self.record.close)
        if run is not None:
            closing.append(lambda: run.update(state=self.outcome, step=self.state.step))
        for close in closing:
            try:
                close()
            except MachineError as error:
                self.print_line(f"warning: {error}")
                refusals.append(error)
        if run is not None:
            run.close()
        self.setup.devices.close()
        if refusals and self.outcome == "finished":
            raise refusals[0]
