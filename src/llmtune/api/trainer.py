"""A run whose loop is in the caller's hands: read each step, save, evaluate, change the rate, or stop and resume."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from llmtune.api.callbacks import CALLBACK_METHODS, UserCallbacks, check_callbacks
from llmtune.api.display import Display, progress_html
from llmtune.api.display import print_line as print_to_notebook
from llmtune.api.metrics import Metric, Stop, UserMetrics, Values
from llmtune.api.rows import FormattingFunc, GivenRows, Rows
from llmtune.common.environment import is_offline
from llmtune.common.text import PrintLine
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.engine.loop import StepResult
from llmtune.engine.own_loss import LossFunction
from llmtune.errors import UsageError
from llmtune.evaluation.generate import Answer, Prompt, generate
from llmtune.evaluation.sampling import Sampling
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from llmtune.training.progress import Result
from llmtune.training.training_run import TrainingRun
from llmtune.watch.report.curve import Curve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Trainer", "train", "train_single_model"]


class Trainer:
    """One run of `config`, which begins at the first call of a method; nothing is loaded or written before.

    The run is open until `steps` ends or `close` is called: it holds the lock of its folder and its trackers. A loop
    that is left (`break`, an exception, the end of a `with` block) saves the run at that step and closes it.
    Evaluating, saving and generating change no weight, no gradient and no random generator (N12).

    config: the result of `load_config`, or its argument: a preset, a file or a run's folder.
    train_dataset, eval_dataset: rows in memory, instead of those of `data.train` and `data.eval`: mappings in any
    format of docs/data.md, as a list or a `datasets.Dataset`. They are written to a file beside the runs when the run
    begins.
    formatting_func: makes a row of each of them, or None to leave it out.
    metrics: functions of a step, or objects with `on_step(step)`, whose values are added to the step's line (see
    `llmtune.api.metrics`); the method `on_step` of a subclass is one more. They cannot change the run, and end it only
    by returning `Stop(reason)`.
    loss: a function of your own that is minimized: `loss(log_probs, weights)` gets the log-probabilities of the trained
    tokens of a micro-batch and their weights, [N] each, and returns the sum of their losses. It is divided by the
    trained tokens of the whole window. Held-out rows keep the usual loss.
    callbacks: objects with `on_evaluate(step, metrics)` or `on_save(step, folder)` (see `llmtune.api.callbacks`); these
    methods of a subclass are one more.
    no_cuda, offline, trust_remote_code: as the flags of `llmtune train`; offline follows HF_HUB_OFFLINE and
    LLMTUNE_OFFLINE when None.
    print_line: receives every line for the user; by default they go to stderr, in a notebook to the cell's output.

    Raises ConfigError where a config cannot be read, UsageError for rows or callbacks that are none.
    """

    def __init__(
        self,
        config: ResolvedConfig | str | Path,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        formatting_func: FormattingFunc | None = None,
        loss: LossFunction | None = None,
        metrics: Iterable[Metric] = (),
        callbacks: Iterable[object] = (),
        no_cuda: bool = False,
        offline: bool | None = None,
        trust_remote_code: bool = False,
        print_line: PrintLine = print_to_notebook,
    ) -> None:
        resolved = config if isinstance(config, ResolvedConfig) else load_config(str(config))
        self.config = resolved
        """The config as it was resolved; `session.config` also has the values that llmtune chose."""
        self.curve = Curve(resolved.name)
        """The losses so far; a notebook shows them as a picture."""
        self._options = Options(no_cuda, is_offline() if offline is None else offline, trust_remote_code, loss=loss)
        self._rows = GivenRows(train_dataset, eval_dataset, formatting_func)
        self._rows.check()
        self._metrics = tuple(metrics)
        self._callbacks = (*callbacks, *([self] if _has_callbacks(type(self)) else []))
        check_callbacks(self._callbacks)
        self._print_line = print_line
        self._stop = StopRequest()
        # Opened late: making a trainer in a notebook must neither load a model nor lock a folder.
        self._open: Callable[[], TrainingRun] = self._open_new
        self._session: TrainingRun | None = None
        self._user_metrics: UserMetrics | None = None
        self._user_callbacks: UserCallbacks | None = None
        self._running: Callable[[], Generator[StepResult, None, None] | None] = lambda: None
        self._ended = False

    @classmethod
    def resume(cls, run: str | Path, *, allow_changes: bool = False, **keywords: Any) -> Self:
        """Return a trainer that resumes a run (its folder or name) from its newest valid checkpoint.

        allow_changes: resume even if the config has changed such that it is another training from here on.
        keywords: as for a new trainer, without rows: a run goes on with those it was begun with.
        Raises UsageError for rows, ConfigError when the config of the folder cannot be read; the first call of a method
        raises CheckpointError when no checkpoint can be used.
        """
        # A folder as given wins over the name of a run.
        folder = Path(run) if (Path(run) / "config.yaml").is_file() else Path("runs") / run
        rows = ("train_dataset", "eval_dataset", "formatting_func")
        given = [name for name in rows if keywords.get(name) is not None]
        if given:
            fix = "leave them out: the run's folder names the rows it was begun with"
            raise UsageError(f"a run that goes on takes no {', '.join(given)}", where="Trainer.resume", fix=fix)
        trainer = cls(load_config(str(folder / "config.yaml"), environ={}), **keywords)

        def open_again() -> TrainingRun:
            resolved, earlier = training.find_run(str(folder), allow_changes=allow_changes)
            return training.open_run(
                resolved, trainer._options, trainer._stop, print_line=trainer._print_line, earlier=earlier
            )

        trainer._open = open_again
        trainer.curve = Curve(folder.name)
        return trainer

    def steps(self) -> Iterator[StepResult]:
        """Train, and yield each step after its update, its evaluation and its checkpoint.

        Leaving the loop saves the run at that step and closes it; `Trainer.resume` or `llmtune resume` continues it. A
        signal (Ctrl-C, a notebook's stop button) that arrives while a step is computed stops the run after it, saved,
        with StoppedBySignal. Raises the errors of `train`, and UsageError where the run is under way or has ended.
        """
        if self._ended or self._running() is not None:
            how = "has ended" if self._ended else "is under way"
            again = "go on with `Trainer.resume(trainer.result().folder)`"
            fix = again if self._ended else "leave its loop, or call `close()`, first"
            raise UsageError(f"this run {how}", where="Trainer.steps", fix=fix)
        self.session  # noqa: B018 - opened here, so that a problem is raised by this call and not by the first `next`
        steps = self._steps()
        self._running = weakref.ref(steps)  # weak, because a generator closes only when nobody else holds it
        return steps

    def train(self) -> Result:
        """Train to the end and return the result. Raises the errors of `steps`."""
        for _ in self.steps():
            pass
        return self.result()

    def on_step(self, step: StepResult) -> Values | Stop | None:
        """Return values for the step's line, `Stop(reason)` or None; for subclasses."""

    def on_evaluate(self, step: int, metrics: dict[str, Any]) -> Stop | None:
        """Look at an evaluation after `step` updates, and return `Stop(reason)` or None; for subclasses."""

    def on_save(self, step: int, folder: Path) -> Stop | None:
        """Look at a folder that was written after `step` updates, and return `Stop(reason)` or None; for subclasses."""

    def save(self) -> None:
        """Commit a checkpoint of this step, unless it is saved already or the run has ended (saved)."""
        if not self._ended:
            self.session.save()

    def evaluate(self) -> dict[str, Any]:
        """Return the metrics on held-out rows now; empty without such rows.

        `eval_mean_nll` (nats per trained token), `eval_perplexity`, `eval_bits_per_byte`, `eval_num_loss_tokens`.
        Several processes share the rows, and each must call it; after the end each evaluates all rows by itself. Raises
        UsageError after the end where each holds a part of the weights or of a row.
        """
        with self._handling_signals():
            session = self.session
            if self._ended:
                if session.config.distributed.sequence_parallel > 1 or session.setup.strategy.is_sharded:
                    raise _parted("evaluate")
                return session.evaluator.evaluate(session.state.step, session.state.epoch, full=False)[1]
            metrics = session.evaluate()
        self._note_heldout()
        return metrics

    def generate(
        self, *prompts: Prompt, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0, **sampling: Any
    ) -> list[Answer]:
        """Return answers of the model as it is now to prompts, which are rendered as in training.

        prompts: questions, or lists of messages; a text to be continued is wrapped in `TextPrompt`.
        temperature: 0 takes the most probable token each time.
        sampling: `top_k`, `top_p`, `repetition_penalty` and `stop`, as fields of `evaluation.sampling.Sampling`.
        Processes that hold parts of the weights must all ask the same. Raises DataError for a prompt that leaves no
        room in the model's longest sequence, ConfigError where they ask differently, UsageError after their end.
        """
        session, how = self.session, Sampling(temperature=temperature, seed=seed, **sampling)
        strategy = session.setup.strategy
        if strategy.is_sharded:
            if self._ended:
                raise _parted("generate")
            asked = {"what is asked": repr((prompts, max_new_tokens, how))}
            session.setup.devices.check_alike(asked, fix="ask the same in every process: all compute each answer")
        with session.setup.precision.autocast():
            return strategy.run(
                generate,
                session.setup.model,
                session.prepared.tokenizer.tokenizer,
                session.prepared.renderer,
                prompts,
                max_new_tokens=max_new_tokens,
                sampling=how,
            )

    def result(self) -> Result:
        """Return the model, tokenizer, metrics and folder as they are now."""
        return self.session.result()

    def close(self) -> None:
        """Save and close the run; its `steps` end. A second call does nothing."""
        if self._session is None or self._ended:
            return
        running = self._running()
        # Closing the generator saves the run at its step, as leaving the loop does.
        if running is not None:
            running.close()
        if not self._ended:  # opened by another method than `steps`
            self._session.close()
            self._end()

    @property
    def session(self) -> TrainingRun:
        """The open run, with everything this process holds of it; the first access opens it."""
        if self._session is None:
            with self._handling_signals():
                self._session = self._open()
            has_own_metric = type(self).on_step is not Trainer.on_step
            metrics = [*self._metrics, *([self.on_step] if has_own_metric else [])]
            device = self._session.setup.devices.device
            self._user_metrics = UserMetrics(metrics, device=device, print_line=self._print_line)
            if metrics:
                self._session.measure = self._user_metrics
            self._user_callbacks = UserCallbacks(self._callbacks, device=device, print_line=self._print_line)
            if len(self._user_callbacks):
                self._session.on_evaluate = self._user_callbacks.on_evaluate
                self._session.checkpointer.on_save = self._user_callbacks.on_save
            self.curve = self._curve_so_far(self._session)
        return self._session

    @property
    def model(self) -> Any:
        """The transformers causal LM (inside peft's wrapper when an adapter is trained)."""
        return self.session.setup.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run."""
        return self.session.prepared.tokenizer.tokenizer

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step.

        It can be set to a number, or to a function of the number of updates made so far, until this trainer ends; a
        resumed run follows its config again.
        """
        return self.session.learning_rate(self.session.state.step)

    @learning_rate.setter
    def learning_rate(self, rate: float | Callable[[int], float]) -> None:
        self.session.learning_rate = rate if callable(rate) else lambda _updates: rate

    def _steps(self) -> Generator[StepResult, None, None]:
        session = self.session
        steps = session.steps()
        display = Display(self._repr_html_)
        try:
            while True:
                with self._handling_signals():
                    step = next(steps, None)
                if step is None:
                    break
                self.curve.add(step.metrics())
                self._note_heldout()
                display.refresh()
                try:
                    yield step
                except GeneratorExit:
                    self._must_stop(leaves=True)  # the others stop at this step too
                    raise
                if self._must_stop():
                    break
        finally:
            with self._handling_signals():
                steps.close()  # type: ignore[attr-defined]
            self._end()
            display.refresh(now=True)

    def _open_new(self) -> TrainingRun:
        self.config = self._rows.into(self.config, self._print_line)
        return training.open_run(self.config, self._options, self._stop, print_line=self._print_line)

    def _must_stop(self, *, leaves: bool = False) -> bool:
        """Whether a metric or callback of any process returned `Stop`, or one `leaves` its loop: all stop alike."""
        # Asked also where this process has none of them: another one may have, and waits for the answer of all.
        stop = next((user.stop for user in (self._user_metrics, self._user_callbacks) if user and user.stop), None)
        with self._handling_signals():  # it may wait for another process
            (asking,) = self.session.setup.devices.sum(float(leaves or stop is not None))
        if leaves or not asking:
            return leaves
        reason = stop.reason if stop else "asked for by another process"
        self.session.print_line(f"stopped: {reason}; `llmtune resume` goes on")
        return True

    def _end(self) -> None:
        self._note_heldout()
        self.session.evaluator.stop_recording()
        self._ended = True

    def _curve_so_far(self, session: TrainingRun) -> Curve:
        """Return the curve of the steps before this process, so that the picture of a resumed run is complete."""
        if session.run is None or not (session.run.path / "metrics.jsonl").is_file():
            return self.curve
        return Curve.of_run(session.run.path, last_step=session.state.step)

    def _note_heldout(self) -> None:
        last_step = self.session.evaluator.eval_state.last_step
        values = {name: value for name, value in self.session.metrics.items() if name.startswith("eval_")}
        if last_step is not None and values:
            self.curve.add({"step": last_step, **values})

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Make signals stop requests while a step is computed; in the caller's code they keep their usual effect."""
        with self._stop:
            yield

    def _repr_html_(self) -> str:
        """Return the state, the progress and the charts for a notebook."""
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


def _has_callbacks(trainer: type[Trainer]) -> bool:
    return any(getattr(trainer, name) is not getattr(Trainer, name) for name in CALLBACK_METHODS)


def train(config: ResolvedConfig | str | Path, *, metrics: Iterable[Metric] = (), **keywords: Any) -> Result:
    """Train a new run to its end and return its model, tokenizer, metrics and folder.

    keywords: as for `Trainer`.
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

    max_samples: largest number of training rows; the config's when None, as the next two.
    project_name: for trackers that have projects.
    output_dir: folder of the run's folder.
    keywords: as for `Trainer`.
    Raises the errors of `train`.
    """
    values = {
        "model.name": model_name,
        "data.max_samples": max_samples,
        "tracking.project": project_name,
        "run.output_dir": None if output_dir is None else str(output_dir),
    }
    config = load_config(config_type, overrides={key: value for key, value in values.items() if value is not None})
    trainer = Trainer(config, **keywords)
    return trainer, trainer.train().metrics


def _parted(method: str) -> UsageError:
    """The error of a method after the end of a run, whose processes can only compute it together."""
    fix = f"call it in the loop over `steps`, or `llmtune {method} RUN` afterwards"
    return UsageError("the processes of this run parted at its end: none can compute alone", f"Trainer.{method}", fix)
