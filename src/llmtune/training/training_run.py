"""A run while it trains: its steps, and what is decided at each step boundary.

The loop yields after every optimizer update, and `TrainingRun.steps` decides in a plain `for` what happens then. A
yield is a step boundary: to evaluate, save or stop there loses nothing and changes nothing (N12, P2). Every decision is
the same in all processes of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from llmtune.common.text import PrintLine
from llmtune.engine.allocator import release_free_memory
from llmtune.engine.choose_device import peak_memory_bytes
from llmtune.engine.loop import StepResult, UpdateCheck, non_finite_parameters, train_steps
from llmtune.engine.schedule import interval, is_due
from llmtune.engine.state import TrainingState, capture, restore
from llmtune.errors import DivergedError, MachineError, StoppedBySignal, UsageError
from llmtune.evaluation.scores import Score
from llmtune.plan.forecast import Forecaster
from llmtune.plan.out_of_memory import Circumstances, out_of_memory_refused
from llmtune.plan.summary import Plan
from llmtune.runs.checkpoint import LoadedCheckpoint
from llmtune.runs.folder import RunFolder
from llmtune.runs.run_file import RunState
from llmtune.runs.signals import StopRequest
from llmtune.tracking.jsonl import RunRecord
from llmtune.tracking.queue import TrackerQueue, keeps_record
from llmtune.tracking.tracker import Tracker
from llmtune.training import checkpointer, run_setup
from llmtune.training.build import TrainingSetup
from llmtune.training.checkpointer import Checkpointer
from llmtune.training.evaluator import Evaluator
from llmtune.training.progress import Result, measured_bytes

__all__ = ["Result", "TrainingRun"]


class TrainingRun:
    """One process's share of a run.

    `run`: the folder, in the process that writes it. `forecaster`: plans this run, for the message when memory is used
    up. `plan`: of a new run.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        run: RunFolder | None,
        *,
        config_name: str,
        trackers: Sequence[Tracker],
        stop: StopRequest,
        print_line: PrintLine,
        forecaster: Forecaster,
        plan: Plan | None = None,
        score: Score | None = None,
    ) -> None:
        self.setup, self.run, self.stop, self.print_line, self.plan = setup, run, stop, print_line, plan
        self.config, self.prepared, self.devices = setup.config, setup.prepared, setup.devices
        self.learning_rate = setup.learning_rate
        """Rate of the next update as a function of the updates made; may be replaced between two steps."""
        self.measure: Callable[[StepResult], Mapping[str, Any]] | None = None
        """Further values of a step for its line (the Python API's metrics): plain numbers; must never raise."""
        self.on_evaluate: Callable[[int, Mapping[str, Any]], None] | None = None
        """Called with step and metrics after an evaluation; must never raise."""
        self.state = TrainingState()
        self.metrics: dict[str, Any] = {}
        self.outcome: RunState = "running"
        keeps = keeps_record(self.config.tracking)
        self.record = RunRecord(run.path, print_line) if run is not None and keeps else None
        self.trackers = TrackerQueue(trackers if run is not None else [], print_line=print_line)
        self.evaluator = Evaluator(setup, self.record, self.trackers, score)
        self.checkpointer = Checkpointer(run, setup, print_line)
        self._config_name, self._forecaster = config_name, forecaster
        self.final_step: int | None = None
        """Updates behind the model in `final/`; None while there is none."""
        self._seconds, self._tokens = 0.0, 0
        self._saved_windows = -1
        self._update_check: UpdateCheck | None = None

    def restore(self, loaded: LoadedCheckpoint | None) -> None:
        """Restore the checkpoint's step boundary, or the state before step 1 where nothing was saved."""
        # The run was stopped before its first checkpoint: lines that it wrote are of steps that will be made again.
        if loaded is None:
            if self.record is not None:
                self.record.rewind({"metrics": 0, "samples": 0})
            return
        checkpointer.restore_weights(self.setup, loaded)
        restore(
            loaded.snapshot,
            parameters=self.setup.parameters,
            optimizer=self.setup.optimizer,
            precision=self.setup.precision,
            state=self.state,
            devices=self.devices,
        )
        saved = loaded.snapshot.state["pipeline"]
        self.evaluator.restore(saved["outlook"])
        if self.setup.rollouts is not None:
            self.setup.rollouts.restore(saved["rollouts"])
        self.metrics = dict(saved["metrics"])
        if self.record is not None:
            self.record.rewind(saved["record"])
        # A run gone wrong after a resume can be resumed from there once more.
        self.checkpointer.go_on_from(loaded)
        self.checkpointer.leave_later(loaded.step)
        self._saved_windows = self.state.windows

    def steps(self) -> Iterator[StepResult]:
        """Train, and yield each step after what was due at it (evaluation, checkpoint) was done.

        Whatever happens, run.json records how it ended and trackers are closed; a caller who leaves the loop leaves a
        saved, resumable run. Raises DivergedError, StoppedBySignal (saved), MachineError, RankLostError.
        """
        setup, config = self.setup, self.config
        printed_once = self.devices.errors_printed_once()
        with self._ending_recorded(), printed_once, self._saved_when_left(), self._memory_errors_refused():
            self._begin()
            self._update_check = UpdateCheck(setup.held_parts(), self.devices)
            deadline = time.monotonic() + 60 * (config.training.max_minutes or math.inf)
            outcome: RunState = "finished"
            for result in train_steps(
                objective=setup.objective,
                update=setup.update,
                windows=() if self.evaluator.should_stop_early else setup.windows(self.state.windows),
                learning_rate=self._rate,
                precision=setup.precision,
                state=self.state,
                devices=setup.devices,
                max_skipped_steps=config.training.max_skipped_steps,
                mfu=setup.mfu,
            ):
                self.devices.end_start()
                with self.devices.busy():  # evaluation, save, and the code of whoever asked for the step
                    ending = self._end_step(result, deadline)
                    yield result
                if ending is not None:
                    outcome, why = ending
                    self.print_line(why)
                    break
            self.outcome = outcome
            if outcome == "finished":
                self._save_final(is_early=self.evaluator.should_stop_early)
            self.checkpointer.raise_if_unsaved()

    def _end_step(self, result: StepResult, deadline: float) -> tuple[RunState, str] | None:
        """Do what is due at the end of a step; how and why the training ends there, or None where it goes on.

        Raises StoppedBySignal after the save.
        """
        self._log_step(result)
        self._check_update(result)
        last = self.state.windows == self.setup.batches.total_steps
        if self.evaluator.is_due(result.step, last=last) and not result.skipped:
            self.evaluate(full=last)
        # Asked once: a signal that arrives during this save is answered after the next step.
        signal_number, late, early = self._agree_on_stopping(deadline)
        early, late = early and not last, late and not last
        if early or late or last or signal_number or self._save_is_due(result):
            self.save()
        if signal_number:
            raise self._stopped_by(signal_number)
        if early:
            patience = self.config.evaluation.early_stopping_patience
            return "finished", f"stopped early: no improvement in {patience} evaluations"
        if late:
            return "stopped", f"stopped after {self.config.training.max_minutes} minutes; `llmtune resume` goes on"
        return None

    def close(self) -> None:
        """Save and close a run of which no step was asked for; `steps` closes it by itself."""
        with self._ending_recorded():
            self._save_before_leaving("stopped")

    def evaluate(self, *, full: bool = False) -> dict[str, Any]:
        """Evaluate now, write the metrics, and keep a new best model at once.

        `full` also counts exact answers where the config asks for them.
        """
        release_free_memory()
        # Evaluation makes tensors of other shapes, which cannot reuse the gaps of training, and the other way round.
        is_best, metrics = self.evaluator.evaluate(self.state.step, self.state.epoch, full=full)
        release_free_memory()
        self.metrics |= metrics
        # Before step 1 the best model is the one that the user already has.
        if is_best and self.state.step and self.config.checkpoint.keep_best:
            self._refuse_non_finite_weights()
            self.checkpointer.save_best(metrics, self.state.step)
        if self.on_evaluate is not None and metrics:
            self.on_evaluate(self.state.step, metrics)
        return metrics

    def save(self) -> None:
        """Commit a checkpoint of this step boundary; a disk that refuses costs the save, never the run (P7)."""
        # A boundary may be saved for two reasons: a checkpoint is due, and then the caller leaves the loop there.
        if self._saved_windows == self.state.windows:
            return
        self._refuse_non_finite_weights()
        snapshot = capture(
            parameters=self.setup.parameters,
            optimizer=self.setup.optimizer,
            precision=self.setup.precision,
            state=self.state,
            devices=self.devices,
            keep=self.devices.is_main,
        )
        pipeline = {
            "outlook": self.evaluator.state(),
            "metrics": self.metrics,
            "record": self.record.position() if self.record is not None else {"metrics": 0, "samples": 0},
            "rollouts": self.setup.rollouts.state() if self.setup.rollouts is not None else {},
        }
        snapshot = replace(snapshot, state={**snapshot.state, "pipeline": pipeline})
        saved = self.checkpointer.save(self.state.step, snapshot, self.record)
        # After a refused save the next reason to save tries again.
        self._saved_windows = self.state.windows if saved else -1

    def _save_final(self, *, is_early: bool) -> None:
        """Write the result of the run: the last model, or the best where `checkpoint.final` says so."""
        wants_best = self.config.checkpoint.final == "best" or (self.config.checkpoint.final == "auto" and is_early)
        best_step = self.evaluator.eval_state.best_trained_step
        # The model of this very step is written as it is; so is the last one where no best model was kept.
        has_best = wants_best and best_step not in (None, self.state.step) and self.checkpointer.has_best(best_step)
        self.checkpointer.save_final(self.metrics, self.state.step, from_best=has_best)
        self.final_step = best_step if has_best else self.state.step

    def result(self) -> Result:
        """The outcome so far."""
        return Result(
            folder=self.run.path if self.run is not None else None,
            state=self.outcome,
            step=self.state.step,
            metrics=self.metrics,
            eval_state=self.evaluator.eval_state,
            final_step=self.final_step,
            model=self.setup.model,
            tokenizer=self.prepared.tokenizer.tokenizer,
            plan=self.plan,
            unchanged_reason=self._update_check.unchanged_reason if self._update_check is not None else None,
            seconds=self._seconds,
            tokens=self._tokens,
            memory_bytes=peak_memory_bytes(self.devices.device),
        )

    def _begin(self) -> None:
        """Start the trackers, and evaluate the untouched model."""
        self.devices.on_main(self._start_recording)
        if self.state.windows == 0 and self.config.evaluation.before_training:
            self.evaluate(full=True)

    def _start_recording(self) -> None:
        assert self.run is not None, "the main process has the folder"
        # Before the first step, so that whoever looks at the folder sees a run at work.
        self.run.update(state="running", total_steps=self.setup.batches.total_steps)
        self.trackers.start(run_setup.run_info(self.run, self._config_name, self.setup, self.state.step))
        self.evaluator.start_watching(self.state.step)

    def _agree_on_stopping(self, deadline: float) -> tuple[int, bool, bool]:
        """Give the number of a signal to stop for (0: none), whether time is up, and whether to stop early.

        A signal may have reached one process only, and each has its own clock: they must not part at a step boundary.
        """
        # The largest of each is `any`, and of the signals one that really came.
        number, late, early = self.devices.largest(
            self.stop.signal_number or 0, time.monotonic() > deadline, self.evaluator.should_stop_early
        )
        return int(number), bool(late), bool(early)

    def _stopped_by(self, signal_number: int) -> StoppedBySignal:
        self.stop.request(signal_number)  # in the processes that it did not reach
        is_saved = self._saved_windows == self.state.windows  # a disk may have refused
        error = self.stop.error(f"{'saved' if is_saved else 'nothing could be saved'} after step {self.state.step}")
        error.is_reported = not self.devices.is_main
        return error

    def _rate(self, step: int) -> float:
        return self.learning_rate(step)  # looked up at each step, because it may be replaced between two

    def _log_step(self, result: StepResult) -> None:
        self._seconds, self._tokens = self._seconds + result.step_seconds, self._tokens + result.num_tokens
        measured = self.measure(result) if self.measure is not None else {}
        self.metrics |= {**measured, **result.metrics()}
        self.evaluator.log_step(result, measured)
        if result.skipped:
            self.print_line(f"step {result.step + 1} skipped: {result.reason}; rows: {', '.join(result.sources)}")

    def _check_update(self, result: StepResult) -> None:
        """Say at the first step that was to change weights that it has changed none."""
        assert self._update_check is not None, "made before the first step"
        said = self._update_check.unchanged_reason
        self._update_check.check(result)
        if said is None and self._update_check.unchanged_reason is not None:
            self.print_line(f"warning: step {result.step} has changed no weight: {self._update_check.unchanged_reason}")

    def _save_is_due(self, result: StepResult) -> bool:
        batches, checkpoint = self.setup.batches, self.config.checkpoint
        every = interval(
            checkpoint.every_steps,
            checkpoint.every_epochs,
            total_steps=batches.total_steps,
            steps_per_epoch=batches.steps_per_epoch,
        )
        return is_due(result.step, every or batches.steps_per_epoch) and not result.skipped

    def _refuse_non_finite_weights(self) -> None:
        """Raise DivergedError where a weight is infinite or NaN: such weights never become best or resumable (P10)."""
        broken = non_finite_parameters(self.setup.held_parts(), self.devices)
        if broken:
            count = f"{len(broken)} weights are no longer finite after step {self.state.step}"
            raise DivergedError(
                f"{count}, {broken[0]} first; this step is not saved",
                where=str(self.run.path) if self.run is not None else None,
                fix="start again with a lower training.learning_rate",
            )

    @contextmanager
    def _ending_recorded(self) -> Iterator[None]:
        """Record how the body ended, and close everything."""
        self.outcome = "failed"
        try:
            yield
        except DivergedError as error:
            self.outcome = "diverged"
            raise self._with_last_checkpoint(error) from error
        except StoppedBySignal:
            self.outcome = "stopped"
            raise
        finally:
            self._cleanup()

    @contextmanager
    def _saved_when_left(self) -> Iterator[None]:
        """Save where the caller leaves the loop in the body, or a reward or score of the user's own fails."""
        try:
            yield
        except GeneratorExit:
            self._save_before_leaving("stopped")
            raise
        except UsageError as error:
            # A save needs all processes: not where one has failed alone.
            if self.devices.world_size == 1 or error.is_reported is not None:
                self._save_before_leaving("failed")
            raise

    def _save_before_leaving(self, outcome: RunState) -> None:
        if self.state.windows:
            self.save()
        self.outcome = outcome

    def _with_last_checkpoint(self, error: DivergedError) -> DivergedError:
        """The same error with the last good checkpoint in it."""
        saved = self.checkpointer.newest
        last = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved before"
        problem, where, fix = error.problems[0]
        named = DivergedError(problem, where, f"{fix}; {last}")
        named.is_reported = not self.devices.is_main  # every process diverges at the same step
        return named

    def _memory_errors_refused(self) -> AbstractContextManager[None]:
        def circumstances() -> Circumstances:
            self.setup.optimizer.zero_grad(set_to_none=True)  # the search for a way out takes memory too
            saved = self.checkpointer.newest
            # In a process that has no folder of the run to write in, the checkpoint tells where that is.
            folder = saved.parents[1] if saved else self.run.path if self.run else None
            where = str(folder) if folder else None
            return Circumstances(f"in step {self.state.step + 1}", where, saved.name if saved else None)

        return out_of_memory_refused(self._forecaster, circumstances)

    def _cleanup(self) -> None:
        """Close trackers, files and the run; a disk that refuses ends only a run to which nothing worse happened."""
        self.evaluator.stop_watching()
        self.trackers.finish(self.outcome)
        run, closers, refusals = self.run, [], []
        if self.record is not None:
            closers.append(self.record.close)
        if run is not None:
            parts = measured_bytes(self.setup)
            closers.append(lambda: run.update(state=self.outcome, step=self.state.step, measured_bytes=parts))
        # Each is tried: a full disk must not keep the others open.
        for close in closers:
            try:
                close()
            except MachineError as error:
                self.print_line(f"warning: {error}")
                refusals.append(error)
        if run is not None:
            run.close()
        # A launcher kills the other processes as soon as one has ended, the main one in the middle of its last write.
        self.devices.close(wait_for_main=self.outcome != "failed")
        if refusals and self.outcome == "finished":
            raise refusals[0]
