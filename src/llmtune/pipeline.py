"""The whole story of a run: prepare, assemble, train step by step, watch, save, stop or finish, and go on again.

The loop yields after every optimizer update and this file decides, in a plain `for`, what happens then. Every yield is a step boundary, so
whatever is done there (evaluate, save, stop) loses nothing and changes nothing (promises N12, P2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune import keeping, reporting
from llmtune.assembly import Assembled, assemble, open_devices
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.errors import DivergedError, StoppedBySignal
from llmtune.keeping import Keeper
from llmtune.observation import Observer, Outlook
from llmtune.preparation import Options, Prepared, prepare
from llmtune.runs import checkpoint as checkpoints
from llmtune.runs import identity
from llmtune.runs.folder import RunFolder, resolve_run
from llmtune.runs.signals import StopRequest
from llmtune.tracking.choose import choose_trackers, keeps_record
from llmtune.tracking.jsonl import RunRecord
from llmtune.tracking.queue import TrackerQueue
from llmtune.training.devices import Devices
from llmtune.training.loop import StepResult, train_steps
from llmtune.training.state import TrainingState, capture, restore

__all__ = ["Result", "preflight", "resume", "train"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a training left behind."""

    folder: Path
    """The run folder."""
    state: str
    """`finished`, or `stopped` (saved, to be resumed)."""
    step: int
    """Updates applied."""
    metrics: dict[str, Any]
    """The last training line, and the newest value of every evaluation metric."""
    outlook: Outlook
    model: Any
    tokenizer: Any


def preflight(resolved: ResolvedConfig, options: Options, *, say: Say) -> tuple[Prepared, Devices]:
    """Everything that can go wrong before a model is loaded, first; says what was read, found and chosen."""
    for note in resolved.notes:
        say(note)
    devices, decisions = open_devices(resolved.config, options)
    prepared = prepare(resolved, options, progress=reporting.tokenizing_progress(say))
    reporting.say_preflight(prepared, decisions, say)
    return prepared, devices


def train(resolved: ResolvedConfig, options: Options | None = None, *, say: Say = reporting.silent) -> Result:
    """Train a new run from its first step to its end, or to the signal that stops it; raises what the rooms raise."""
    options = options or Options()
    with StopRequest() as stop:
        with stop.interrupting():
            prepared, devices = preflight(resolved, options, say=say)
            assembled = assemble(prepared, options, devices)
            run = keeping.create(resolved, prepared, assembled) if devices.is_main else None
        return _Session(resolved, prepared, assembled, run, stop, say).go()


def resume(
    name: str | None,
    *,
    overrides: Sequence[str] = (),
    options: Options | None = None,
    allow_changes: bool = False,
    checkpoint: Path | None = None,
    say: Say = reporting.silent,
) -> Result:
    """Go on with a run (a folder, a name, or None for the newest unfinished one) from its newest valid checkpoint.

    What differs from the stopped run is said before the first step, and refused where it would make it another training (unless
    `allow_changes`) or where the checkpoint no longer fits. Raises CheckpointError when nothing can be used.
    """
    options = options or Options()
    with StopRequest() as stop:
        with stop.interrupting():
            folder = checkpoint.parent.parent if checkpoint else resolve_run(name, _output_dir(overrides))
            resolved = load_config(str(folder / keeping.CONFIG_FILE), overrides=overrides)
            run = RunFolder.open(folder)
            try:
                loaded, problems = keeping.find_checkpoint(run, checkpoint)
                reporting.say_resume(run, loaded, problems, say)
                tokenizer_folder = run.path / keeping.TOKENIZER_FOLDER
                prepared, devices = preflight_again(resolved, options, tokenizer_folder if tokenizer_folder.is_dir() else None, say)
                assembled = assemble(prepared, options, devices)
                now = keeping.identity_of(prepared, assembled)
                differences = identity.compare(run.info["identity"], now)
                for one in identity.refuse_changes(differences, where=str(run.path), allow_changes=allow_changes):
                    reporting.say_difference(one, say)
            except BaseException:
                run.close()
                raise
        session = _Session(resolved, prepared, assembled, run, stop, say)
        session.restore(loaded)
        return session.go()


def _output_dir(overrides: Sequence[str]) -> str:
    """Where runs are looked for by name: `run.output_dir` as overridden or by default; other overrides are for the run that is found."""
    only = [one for one in overrides if one.startswith("run.output_dir=")]
    return load_config(None, overrides=only).config.run.output_dir


def preflight_again(resolved: ResolvedConfig, options: Options, tokenizer_folder: Path | None, say: Say) -> tuple[Prepared, Devices]:
    """The preflight of a resumed run: quiet about choices that were said when it began."""
    devices, _ = open_devices(resolved.config, options)
    return prepare(resolved, options, tokenizer_folder=tokenizer_folder, progress=reporting.tokenizing_progress(say)), devices


class _Session:
    """One process's share of a run: what it holds between two steps."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        prepared: Prepared,
        assembled: Assembled,
        run: RunFolder | None,
        stop: StopRequest,
        say: Say,
    ) -> None:
        self.prepared, self.assembled, self.run, self.stop, self.say = prepared, assembled, run, stop, say
        self.config = assembled.config
        self.state = TrainingState()
        self.metrics: dict[str, Any] = {}
        explicit = resolved.origins["tracking.trackers"].kind != "default"
        trackers, decisions = choose_trackers(self.config.tracking, explicit=explicit)
        reporting.say_assembled(assembled, decisions, say)
        self.record = RunRecord(run.path) if run is not None and keeps_record(self.config.tracking) else None
        self.trackers = TrackerQueue(trackers if run is not None else [], say=say)
        self.observer = Observer(prepared, assembled, self.record, self.trackers)
        self.keeper = Keeper(run, prepared, assembled, say) if run is not None else None
        self.config_name = resolved.name

    def restore(self, loaded: checkpoints.LoadedCheckpoint | None) -> None:
        """Put everything back as it was at the checkpoint's step boundary, or as it was before step 1 where nothing was saved."""
        if loaded is None:
            if self.record is not None:
                self.record.rewind({"metrics": 0, "samples": 0})
            return
        keeping.restore_weights(self.assembled, loaded.path)
        extra = loaded.snapshot.state["pipeline"]
        restore(
            loaded.snapshot,
            parameters=self.assembled.parameters,
            optimizer=self.assembled.optimizer,
            precision=self.assembled.precision,
            state=self.state,
        )
        self.observer.restore(extra["outlook"])
        self.metrics = dict(extra["metrics"])
        if self.record is not None:
            self.record.rewind(extra["record"])

    def go(self) -> Result:
        """Train to the end or to a stop; whatever happens, run.json says how it ended and trackers are let go."""
        outcome = "failed"
        try:
            self._begin()
            outcome = self._train()
            self._finish(outcome)
        except DivergedError:
            outcome = "diverged"
            raise
        except StoppedBySignal:
            outcome = "stopped"
            raise
        finally:
            self.trackers.finish(outcome)
            if self.record is not None:
                self.record.close()
            if self.run is not None:
                self.run.update(state=outcome, step=self.state.step)
                self.run.close()
            self.assembled.devices.close()
        assert self.run is not None
        return Result(
            folder=self.run.path,
            state=outcome,
            step=self.state.step,
            metrics=self.metrics,
            outlook=self.observer.outlook,
            model=self.assembled.model,
            tokenizer=self.prepared.tokenizer.tokenizer,
        )

    def _begin(self) -> None:
        """Tell everyone, and look at the untouched model."""
        if self.run is not None:
            self.run.update(state="running", total_steps=self.assembled.batches.total_steps)
            self.trackers.start(keeping.run_info(self.run, self.config_name, self.prepared, self.assembled, self.state.step))
        if self.state.windows == 0 and self.config.evaluation.before_training:
            self._look(full=True)

    def _train(self) -> str:
        """The loop, and what is decided after each step. Returns `finished` or `stopped`."""
        assembled, config = self.assembled, self.config
        deadline = time.monotonic() + 60 * config.training.max_minutes if config.training.max_minutes else None
        if self.observer.should_stop_early:
            return "finished"
        for result in train_steps(
            nll_sum=assembled.nll_sum,
            parameters=list(assembled.parameters.values()),
            optimizer=assembled.optimizer,
            windows=assembled.batches.windows(self.state.windows),
            learning_rate=assembled.learning_rate,
            precision=assembled.precision,
            state=self.state,
            max_grad_norm=config.training.max_grad_norm,
            devices=assembled.devices,
            max_skipped_steps=config.training.max_skipped_steps,
        ):
            self._note(result)
            last = self.state.windows == assembled.batches.total_steps
            if self.observer.is_due(result.step, last=last) and not result.skipped:
                self._look(full=last)
            early = not last and self.observer.should_stop_early
            asked = self.stop.is_requested
            late = deadline is not None and time.monotonic() > deadline and not last
            if early or asked or late or last or self._save_is_due(result):
                self._save()
            if early:
                self.say(
                    f"stopped early after step {result.step}: no improvement in {config.evaluation.early_stopping_patience} evaluations"
                )
                return "finished"
            if asked:
                self.stop.refuse_to_go_on(saved=f"saved after step {result.step}")
            if late:
                self.say(f"stopped after {config.training.max_minutes} minutes, saved after step {result.step}; `llmtune resume` goes on")
                return "stopped"
        return "finished"

    def _note(self, result: StepResult) -> None:
        self.metrics |= result.metrics()
        self.observer.note(result)
        if result.skipped:
            self.say(f"step {result.step + 1} skipped: {result.reason}; rows: {', '.join(result.sources)}")

    def _look(self, *, full: bool) -> None:
        """Evaluate now; a new best is kept at once."""
        improved, metrics = self.observer.look(self.state.step, self.state.epoch, full=full)
        self.metrics |= metrics
        if improved and self.state.step and self.keeper is not None and self.config.checkpoint.keep_best:
            self.keeper.keep_best(metrics, self.state.step)

    def _save_is_due(self, result: StepResult) -> bool:
        every = self.config.checkpoint.every_steps or self.assembled.batches.steps_per_epoch
        return result.step % every == 0 and not result.skipped

    def _save(self) -> None:
        """Commit a checkpoint of this step boundary; a disk that refuses costs the save, never the run (P7)."""
        if self.record is not None:
            self.record.sync()
        snapshot = capture(
            parameters=self.assembled.parameters,
            optimizer=self.assembled.optimizer,
            precision=self.assembled.precision,
            state=self.state,
        )
        extra: Mapping[str, Any] = {
            "outlook": self.observer.state(),
            "metrics": self.metrics,
            "record": self.record.position() if self.record is not None else {"metrics": 0, "samples": 0},
        }
        if self.keeper is not None:
            self.keeper.save(self.state.step, replace(snapshot, state={**snapshot.state, "pipeline": extra}))
        self.assembled.devices.barrier()

    def _finish(self, outcome: str) -> None:
        """Write what the user takes away, and be honest about a disk that never took the last save."""
        if self.keeper is None:
            return
        if outcome == "finished":
            self.keeper.write_final(self.metrics, self.state.step)
        self.keeper.be_sure()
