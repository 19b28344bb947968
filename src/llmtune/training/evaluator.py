"""Evaluate a run while it trains: held-out loss, exact answers and samples, the best so far, when to stop early.

Everything here happens at a step boundary and leaves weights, gradients and random generators as they were (N12).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmtune.common.records import is_better
from llmtune.data.example import ExampleSet
from llmtune.engine.loop import StepResult
from llmtune.engine.schedule import interval, is_due
from llmtune.errors import ConfigError, UsageError
from llmtune.evaluation.generate import generate
from llmtune.evaluation.heldout import evaluate_examples, evaluate_objective, trained_bytes
from llmtune.evaluation.predictions import Prediction, predict_answers
from llmtune.evaluation.sampling import Sampling
from llmtune.evaluation.scores import Score, mean_score
from llmtune.tracking.jsonl import RunRecord
from llmtune.tracking.queue import TrackerQueue
from llmtune.tracking.tracker import Sample
from llmtune.tracking.watch import HistogramWatch
from llmtune.training.build import TrainingSetup

__all__ = ["EvalState", "Evaluator"]


@dataclass
class EvalState:
    """The evaluations so far, in a few numbers; part of every checkpoint."""

    best_by: str = "eval_mean_nll"
    """Metric of the values below."""
    best_value: float | None = None
    """Best value so far, that of the model before training included."""
    best_step: int | None = None
    best_trained_value: float | None = None
    """Best value after at least one step: that of checkpoints/best."""
    best_trained_step: int | None = None
    last_value: float | None = None
    """Newest value of that metric."""
    last_step: int | None = None
    """Step of the newest evaluation."""
    first_nll: float | None = None
    first_exact: int | None = None
    last_nll: float | None = None
    last_exact: int | None = None
    num_answers: int | None = None
    """Held-out answers that exact match was counted over."""
    evaluations_without_improvement: int = 0
    loss_unit: str = "nats per token"
    """Unit of `first_nll` and `last_nll`: where answers are compared, they are the loss of a pair or of an answer."""


_FORMER_NAMES = {"best_nll": "best_value"}
"""Fields of `EvalState` as earlier checkpoints call them."""

_OF_ANY_METRIC = ("last_step", "first_nll", "first_exact", "last_nll", "last_exact", "num_answers", "loss_unit")
"""Fields of `EvalState` that stay true when `evaluation.best_by` becomes another."""


class Evaluator:
    """Evaluates the model at step boundaries, and writes its numbers and those of each step to record and trackers."""

    def __init__(
        self,
        setup: TrainingSetup,
        record: RunRecord | None,
        trackers: TrackerQueue,
        score: Score | None = None,
    ) -> None:
        """`score` judges the answers to held-out prompts at each evaluation; None judges nothing."""
        self._setup, self._config = setup, setup.config
        self._record, self._trackers, self._score = record, trackers, score
        data = setup.prepared.data.eval
        self._heldout: ExampleSet | None = data if data is not None and len(data) else None
        self._heldout_sets: Mapping[str, ExampleSet] = {} if data is None else data.by_source()
        self._right_answers: ExampleSet | None = None if data is None else data.right_answers()
        self._heldout_bytes: float | None = None
        self._watch: HistogramWatch | None = None
        self._interval = interval(
            self._config.evaluation.every_steps,
            self._config.evaluation.every_epochs,
            total_steps=setup.batches.total_steps,
            steps_per_epoch=setup.batches.steps_per_epoch,
        )
        self.eval_state = self._new_state()

    def start_watching(self, step: int) -> None:
        """Collect histograms of gradients from here on, after `step` updates, where the config asks for them."""
        kind = self._config.tracking.watch
        if kind:
            first, every = self._setup.optimizer.parts[0], self._config.tracking.every_steps
            self._watch = HistogramWatch(first, self._setup.parameters, kind, every_steps=every, start_step=step)

    def stop_watching(self) -> None:
        """Collect no histograms any more."""
        if self._watch is not None:
            self._watch.close()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the state to what `state()` returned."""
        known = {_FORMER_NAMES.get(name, name): value for name, value in state.items()}
        self.eval_state = EvalState(**known)
        best_by = self._config.evaluation.best_by
        if best_by != self.eval_state.best_by:  # values of another metric say nothing about this one
            self.eval_state = replace(
                self._new_state(), **{name: known[name] for name in _OF_ANY_METRIC if name in known}
            )

    def _new_state(self) -> EvalState:
        is_sft = self._config.objective.method == "sft"
        unit = EvalState.loss_unit if is_sft else self._setup.objective.unit
        if self._setup.rollouts is not None:
            unit = "mean reward"
        return EvalState(best_by=self._config.evaluation.best_by, loss_unit=unit)

    def state(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return asdict(self.eval_state)

    def stop_recording(self) -> None:
        """Write nothing any more: the run's files are closed, and its model may still be evaluated."""
        self._record, self._trackers = None, TrackerQueue([])

    def log_step(self, result: StepResult, measured: Mapping[str, Any]) -> None:
        """Write one training step, with the `measured` values in its line.

        Only every `tracking.every_steps`-th step is written, the last one, and those that were skipped.
        """
        histograms = self._watch.take() if self._watch is not None else {}
        if result.step % self._config.tracking.every_steps and not result.skipped and result.progress < 1:
            return
        self._write(result.step, {**measured, **result.metrics()})
        if self._setup.rollouts is not None:
            self._record_samples(result.step, self._setup.rollouts.samples())
        if histograms:
            self._trackers.histograms(result.step, histograms)

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether step `step` ends with an evaluation; the end of the training always does, once."""
        every = self._interval
        return self.eval_state.last_step != step and (last or (every is not None and is_due(step, every)))

    def evaluate(self, step: int, epoch: float, *, full: bool) -> tuple[bool, dict[str, Any]]:
        """Evaluate after `step` updates; `full` also counts exact answers where the config asks for them.

        Returns whether the model is the best of those with at least one step, by `evaluation.best_by`, and the metrics.
        """
        metrics: dict[str, Any] = {}
        self.eval_state.last_step = step
        is_best = False
        if self._heldout is not None:
            metrics |= self._heldout_loss(self._heldout)
            metrics |= self._judged_answers(full=full)
            # On another kind of device an answer may differ, and the processes must not part over what is best.
            metrics = self._setup.devices.from_main(metrics)
            self._count(metrics)
            is_best = self._update_best(step, self._value_of(metrics))
        if metrics:
            self._write(step, {"epoch": epoch, **metrics})
        if self._config.evaluation.prompts:
            self._write_samples(step)
        return is_best, metrics

    @property
    def should_stop_early(self) -> bool:
        """Whether `evaluation.best_by` has not improved for `early_stopping_patience` evaluations."""
        patience = self._config.evaluation.early_stopping_patience
        return patience is not None and self.eval_state.evaluations_without_improvement >= patience

    def _heldout_loss(self, heldout: ExampleSet) -> dict[str, Any]:
        setup, tokenizer = self._setup, self._setup.prepared.tokenizer.tokenizer
        assert isinstance(self._config.training.batch_size, int)
        if setup.rollouts is not None:
            return setup.rollouts.evaluate(heldout)
        if setup.heldout_objective is not None:
            return evaluate_objective(
                setup.model,
                heldout,
                setup.heldout_objective,
                engine=setup.engine,
                precision=setup.precision,
                pad_id=tokenizer.pad_token_id or 0,
                batch_size=self._config.evaluation.batch_size or self._config.training.batch_size,
                devices=setup.devices,
            )
        # Counted once: the rows do not change.
        if self._heldout_bytes is None:
            self._heldout_bytes = trained_bytes(heldout, tokenizer)
        return evaluate_examples(
            setup.model,
            heldout,
            engine=setup.engine,
            precision=setup.precision,
            pad_id=tokenizer.pad_token_id or 0,
            batch_size=self._config.evaluation.batch_size or self._config.training.batch_size,
            total_bytes=self._heldout_bytes,
            devices=setup.devices,
            sets=self._heldout_sets,
        )

    def _count(self, metrics: Mapping[str, Any]) -> None:
        """Note the loss and the exact answers of an evaluation."""
        state = self.eval_state
        # Without an objective of their own, held-out rows have the usual loss, whatever training minimizes.
        objective = self._setup.heldout_objective
        usual = "mean_nll" if self._setup.rollouts is None else "reward"
        state.last_nll = metrics[f"eval_{usual if objective is None else objective.name}"]
        if state.first_nll is None:
            state.first_nll = state.last_nll
        if "eval_exact_answers" in metrics:
            state.last_exact, state.num_answers = metrics["eval_exact_answers"], metrics["eval_num_answers"]
            if state.first_exact is None:
                state.first_exact = state.last_exact

    def _value_of(self, metrics: Mapping[str, Any]) -> float:
        """The metric by which the best model is chosen. Raises ConfigError where this evaluation has no such metric."""
        name = self._config.evaluation.best_by
        if name not in metrics:
            numbers = [key for key, value in metrics.items() if isinstance(value, int | float)]
            nearest = difflib.get_close_matches(name, numbers, n=1, cutoff=0.5) or numbers
            raise ConfigError(
                f"no evaluation of this run gives the metric `{name}`; there are {', '.join(numbers)}",
                where="evaluation.best_by",
                fix=f"set `evaluation.best_by: {nearest[0]}`",
            )
        return float(metrics[name])

    def _update_best(self, step: int, value: float) -> bool:
        """Count the value of an evaluation, and return whether it is the best of those with at least one step."""
        state, config = self.eval_state, self._config.evaluation
        state.last_value = value
        # NaN is neither better nor worse than anything, and would never count as no improvement.
        if not math.isfinite(value):
            state.evaluations_without_improvement += 1
            return False
        best, threshold = state.best_value, config.early_stopping_threshold
        # An improvement by less than the threshold is a new best, and still no reason to go on.
        improves_enough = best is None or is_better(config.best_by, value, best, by=threshold)
        state.evaluations_without_improvement = 0 if improves_enough else state.evaluations_without_improvement + 1
        if best is None or is_better(config.best_by, value, best):
            state.best_value, state.best_step = value, step
        trained_best = state.best_trained_value
        # The untouched model is no result of the training, even where it is better than all.
        if step and (trained_best is None or is_better(config.best_by, value, trained_best)):
            state.best_trained_value, state.best_trained_step = value, step
            return True
        return False

    def _judged_answers(self, *, full: bool) -> dict[str, Any]:
        """Answer the held-out prompts where the config asks for it; `full`: also where only exact answers count."""
        config, prepared = self._config.evaluation, self._setup.prepared
        counts_exact = config.exact_match and (full or config.best_by.startswith("eval_exact"))
        if not counts_exact and self._score is None:
            return {}
        assert self._right_answers is not None, "answers are judged over held-out rows"
        tokenizer = prepared.tokenizer.tokenizer
        with self._setup.precision.autocast():
            predictions = self._setup.strategy.run(
                predict_answers,
                self._setup.model,
                tokenizer,
                self._right_answers,
                stop_token_ids=prepared.renderer.stop_token_ids,
                pad_id=tokenizer.pad_token_id or 0,
                max_new_tokens=config.max_new_tokens,
            )
        metrics: dict[str, Any] = {}
        if counts_exact:
            exact = sum(prediction.is_exact for prediction in predictions)
            metrics |= {"eval_exact_answers": exact, "eval_num_answers": len(predictions)}
        if self._score is not None and predictions:
            metrics["eval_score"] = self._score_on_main(predictions, self._score)
        return metrics

    def _score_on_main(self, predictions: Sequence[Prediction], score: Score) -> float:
        """Judge on the main process alone, as a judge may cost money, or say something else each time.

        Raises UsageError, in all processes, where it fails. The others get NaN.
        """
        value, error, devices = math.nan, None, self._setup.devices
        if devices.rank == 0:  # after the end of a run each process is alone
            try:
                value = mean_score(predictions, score)
            except UsageError as caught:
                error = caught
        devices.agree_on_error(error)
        return value

    def _write_samples(self, step: int) -> None:
        prepared, config = self._setup.prepared, self._config.evaluation
        sampling = Sampling(
            config.repetition_penalty,
            config.temperature,
            config.top_k,
            config.top_p,
            self._config.run.seed,
            config.stop,
        )
        with self._setup.precision.autocast():
            answers = self._setup.strategy.run(
                generate,
                self._setup.model,
                prepared.tokenizer.tokenizer,
                prepared.renderer,
                config.prompts,
                max_new_tokens=config.max_new_tokens,
                sampling=sampling,
            )
        self._record_samples(step, [{"prompt": answer.prompt, "text": answer.text} for answer in answers])

    def _record_samples(self, step: int, rows: Sequence[Sample]) -> None:
        if self._record is not None:
            self._record.samples(step, rows)
        self._trackers.samples(step, rows)

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._record is not None:
            self._record.log(step, metrics)
        self._trackers.log(step, metrics)
