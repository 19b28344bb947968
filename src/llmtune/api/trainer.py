"""A run whose loop belongs to the caller: look at each step, save, evaluate, change the rate, or leave it saved and
resumable.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmtune.api.curve import Curve
from llmtune.api.display import Display, progress_html
from llmtune.api.display import print_line as say_here
from llmtune.api.metrics import Measures, Metric, Stop, Values
from llmtune.common.offline import is_offline
from llmtune.common.printing import PrintLine
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.engine.loop import StepResult
from llmtune.errors import UsageError
from llmtune.evaluation.generate import Answer, Prompt, generate
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from llmtune.training.training_run import Result, TrainingRun

__all__ = ["Trainer", "train", "train_single_model"]


class Trainer:
    """One run of `config`; nothing is loaded or written before the first thing is asked of it.

    config: what `load_config` returns, or a name for it: a preset, a file or a run's folder. Raises ConfigError as that
    does.

    metrics: functions of a step, or objects with `on_step(step)`, whose values stand beside ours in the step's line
    (see `llmtune.api.metrics`); a subclass's own `on_step` is one more. They cannot change the run, and end it only by
    returning `Stop(reason)`. no_cuda, offline, trust_remote_code: as the flags of `llmtune train`; offline follows
    HF_HUB_OFFLINE and LLMTUNE_OFFLINE when not given. print_line: receives one line for each thing worth saying; when
    not given it goes to stderr, in a notebook to the cell's output.

    Used in a `with` block, the run is let go, saved, at its end, whatever happens inside.
    """

    def __init__(
        self,
        config: ResolvedConfig | str | Path,
        *,
        metrics: Iterable[Metric] = (),
        no_cuda: bool = False,
        offline: bool | None = None,
        trust_remote_code: bool = False,
        print_line: PrintLine = say_here,
    ) -> None:
        resolved = config if isinstance(config, ResolvedConfig) else load_config(str(config))
        self.config = resolved
        """The config as it was resolved; `session.config` has what was chosen filled in."""
        self.curve = Curve(title=resolved.name)
        """The losses so far; a notebook shows it as a picture."""
        self._options = Options(
            no_cuda=no_cuda, offline=is_offline() if offline is None else offline, trust_remote_code=trust_remote_code
        )
        self._metrics = tuple(metrics)
        self._print_line = print_line
        self._stop = StopRequest()
        self._open: Callable[[], TrainingRun] = lambda: training.open_run(
            resolved, self._options, self._stop, print_line=print_line
        )
        self._session: TrainingRun | None = None
        self._measures: Measures | None = None
        self._running: Callable[[], Generator[StepResult, None, None] | None] = lambda: None
        self._ended = False

    @classmethod
    def resume(cls, run: str | Path, *, allow_changes: bool = False, **keywords: Any) -> Self:
        """Go on with a stopped run (its folder or name) from its newest checkpoint; `keywords` as for a new trainer.

        Raises CheckpointError when nothing can be used, ConfigError when the folder's config cannot be read.
        """
        folder = Path(run) if (Path(run) / "config.yaml").is_file() else Path("runs") / run
        trainer = cls(load_config(str(folder / "config.yaml"), environ={}), **keywords)

        def open_again() -> TrainingRun:
            resolved, earlier = training.find_run(str(folder), allow_changes=allow_changes)
            return training.open_run(
                resolved, trainer._options, trainer._stop, print_line=trainer._print_line, earlier=earlier
            )

        trainer._open = open_again
        trainer.curve = Curve(title=folder.name)
        return trainer

    def steps(self) -> Iterator[StepResult]:
        """Train; each step is yielded after what was due at it (evaluation, checkpoint) was done.

        Leaving the loop saves the run, at the step it was left, and lets it go: `Trainer.resume` or `llmtune resume`
        goes on. A signal (Ctrl-C, the notebook's stop button) that arrives while a step is computed stops the run after
        it, saved, with StoppedBySignal. Raises what `train` raises; UsageError where the run is under way or has ended.
        """
        if self._ended or self._running() is not None:
            how = "has ended" if self._ended else "is under way"
            fix = (
                "go on with `Trainer.resume(trainer.result().folder)`"
                if self._ended
                else "leave its loop, or call `close()`, first"
            )
            raise UsageError(f"this run {how}", where="Trainer.steps", fix=fix)
        self.session  # noqa: B018 - what is wrong with the config is said here, not at the first step
        steps = self._steps()
        self._running = weakref.ref(steps)  # weak: leaving a `for` must close it
        return steps

    def train(self) -> Result:
        """Run all steps and return the result."""
        for _ in self.steps():
            pass
        return self.result()

    def on_step(self, step: StepResult) -> Values | Stop | None:
        """Return values for the step's line, `Stop(reason)` or nothing; for subclasses."""

    def save(self) -> None:
        """Commit a checkpoint of this step; does nothing where it is saved already, or the run was let go (saved)."""
        if not self._ended:
            self.session.save()

    def evaluate(self) -> dict[str, Any]:
        """Return the held-out metrics (`eval_mean_nll`, ... in nats per token) now; empty without held-out rows.

        Changes nothing (N12).
        """
        with self._listening():
            session = self.session
            if self._ended:
                return session.evaluator.evaluate(session.state.step, session.state.epoch, full=False)[1]
            metrics = session.evaluate()
        self._note_heldout()
        return metrics

    def generate(
        self, *prompts: Prompt, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Let the model as it is now answer, rendered as in training; wrap a text to be continued in `TextPrompt`.

        Changes nothing (N12).

        Raises DataError for a prompt that leaves no room in the model's longest sequence.
        """
        session = self.session
        with session.setup.precision.autocast():
            return generate(
                session.setup.model,
                session.prepared.tokenizer.tokenizer,
                session.prepared.renderer,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
            )

    def result(self) -> Result:
        """Return model, tokenizer, metrics and folder, as they are now."""
        return self.session.result()

    def close(self) -> None:
        """Save and let the run go; `steps` ends. Does nothing where it has ended."""
        if self._session is None or self._ended:
            return
        running = self._running()
        if running is not None:
            running.close()
        if not self._ended:  # it was opened, and no step was asked for
            self._session.close()
            self._let_go()

    @property
    def session(self) -> TrainingRun:
        """What the process holds of the run; it is opened by asking."""
        if self._session is None:
            with self._listening():
                self._session = self._open()
            metrics = [*self._metrics, *([self.on_step] if type(self).on_step is not Trainer.on_step else [])]
            self._measures = Measures(metrics, device=self._session.setup.devices.device, print_line=self._print_line)
            if metrics:
                self._session.measure = self._measures
            self.curve = self._curve_so_far(self._session)
        return self._session

    @property
    def model(self) -> Any:
        """The transformers causal LM (inside peft's wrapper when an adapter is trained)."""
        return self.session.setup.model

    @property
    def tokenizer(self) -> Any:
        """The run's tokenizer."""
        return self.session.prepared.tokenizer.tokenizer

    @property
    def learning_rate(self) -> float:
        """Rate of the next step.

        Set a number, or a function of the updates made so far; a resumed run follows its config again.
        """
        return self.session.learning_rate(self.session.state.step)

    @learning_rate.setter
    def learning_rate(self, rate: float | Callable[[int], float]) -> None:
        self.session.learning_rate = rate if callable(rate) else lambda _step: rate

    def _steps(self) -> Generator[StepResult, None, None]:
        session = self.session
        steps = session.steps()
        display = Display(self._repr_html_)
        try:
            while True:
                with self._listening():
                    step = next(steps, None)
                if step is None:
                    break
                self.curve.train.append((step.step, step.train_mean_nll))
                self._note_heldout()
                display.refresh()
                yield step
                if self._must_stop():
                    break
        finally:
            with self._listening():
                steps.close()  # type: ignore[attr-defined]
            self._let_go()
            display.refresh(now=True)

    def _must_stop(self) -> bool:
        """Whether a metric of any process returned `Stop`; every process hears the same answer."""
        assert self._measures is not None
        if not len(self._measures):
            return False
        stop = self._measures.stop
        if not self.session.setup.devices.sum(float(stop is not None))[0]:
            return False
        self.session.print_line(
            f"stopped: {stop.reason if stop else 'asked for by another process'}; `llmtune resume` goes on"
        )
        return True

    def _let_go(self) -> None:
        self._note_heldout()
        self.session.evaluator.stop_recording()
        self._ended = True

    def _curve_so_far(self, session: TrainingRun) -> Curve:
        """Begin where a resumed run's record ends, so that the picture shows the whole run."""
        if session.run is None or not (session.run.path / "metrics.jsonl").is_file():
            return self.curve
        return Curve.of_run(session.run.path, last_step=session.state.step)

    def _note_heldout(self) -> None:
        state = self.session.evaluator.eval_state
        if state.last_nll is None or state.last_step is None:
            return
        if not self.curve.heldout or self.curve.heldout[-1] != (state.last_step, state.last_nll):
            self.curve.heldout.append((state.last_step, state.last_nll))

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals are requests while we compute; in the caller's own code they are what they always are."""
        with self._stop:
            yield

    def _repr_html_(self) -> str:
        """Give the state, the progress and the curve a notebook shows."""
        if self._session is None:
            return progress_html(self.config.name, "not begun", 0, None) + self.curve._repr_html_()
        session = self._session
        name = session.run.name if session.run is not None else self.config.name
        total = session.setup.batches.total_steps
        return (
            progress_html(name, session.outcome if self._ended else "training", session.state.step, total)
            + self.curve._repr_html_()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def train(config: ResolvedConfig | str | Path, *, metrics: Iterable[Metric] = (), **keywords: Any) -> Result:
    """Train a new run to its end and return its model, tokenizer, metrics and folder; `keywords` as for `Trainer`.

    Raises ConfigError, DataError, ModelError, MachineError, DivergedError; StoppedBySignal after saving.
    """
    return Trainer(config, metrics=metrics, **keywords).train()


def train_single_model(
    model_name: str = "custom-tiny",
    config_type: str = "test",
    *,
    max_samples: int | None = None,
    project_name: str | None = None,
    output_dir: str | Path | None = None,
    **keywords: Any,
) -> tuple[Trainer, dict[str, Any]]:
    """Train one model with a preset (or a config file) and return the trainer and its metrics.

    What is None stays as the config says.

    max_samples: most training rows. project_name: for trackers that have projects. `keywords` as for `Trainer`. Raises
    as `train`.
    """
    wanted = {
        "model.name": model_name,
        "data.max_samples": max_samples,
        "tracking.project": project_name,
        "run.output_dir": None if output_dir is None else str(output_dir),
    }
    config = load_config(config_type, overrides={key: value for key, value in wanted.items() if value is not None})
    trainer = Trainer(config, **keywords)
    return trainer, trainer.train().metrics
