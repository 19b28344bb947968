"""What is looked at while a run trains: held-out loss, exact answers, samples, the best so far, and when to stop early.

Everything here happens at a step boundary and leaves weights, gradients and random generators as they were (promise
N12).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmtune.data.dataset.batches import eval_batches
from llmtune.engine.loop import StepResult
from llmtune.evaluation.exact_match import count_exact_answers
from llmtune.evaluation.generate import generate
from llmtune.evaluation.heldout import evaluate, trained_bytes
from llmtune.prepare import Prepared
from llmtune.tracking.jsonl import RunRecord
from llmtune.tracking.queue import TrackerQueue
from llmtune.tracking.watch import HistogramWatch
from llmtune.training.build import TrainingSetup

__all__ = ["EvalState", "Evaluator"]


@dataclass
class EvalState:
    """What evaluations have shown so far; part of every checkpoint."""

    best_nll: float | None = None
    """Lowest held-out loss, nats per trained token."""
    best_step: int | None = None
    last_step: int | None = None
    """Step of the newest evaluation."""
    first_nll: float | None = None
    first_exact: int | None = None
    last_nll: float | None = None
    last_exact: int | None = None
    num_answers: int | None = None
    """Held-out answers that exact match was counted over."""
    evaluations_without_improvement: int = 0


class Evaluator:
    """Evaluates, records and tells; knows nothing of checkpoints and decides nothing about the loop."""

    def __init__(
        self, prepared: Prepared, setup: TrainingSetup, record: RunRecord | None, trackers: TrackerQueue
    ) -> None:
        self._prepared = prepared
        self._assembled = setup
        self._record = record
        self._trackers = trackers
        self._config = prepared.config
        self._heldout_bytes: float | None = None
        self._watch: HistogramWatch | None = None
        self.outlook = EvalState()

    def begin(self, step: int) -> None:
        """Start to watch gradients where the config asks for it; `step` updates were made before."""
        kind = self._config.tracking.watch
        if kind:
            first, every = self._assembled.optimizer.parts[0], self._config.tracking.every_steps
            self._watch = HistogramWatch(first, self._assembled.parameters, kind, every_steps=every, start_step=step)

    def end(self) -> None:
        """Stop to watch gradients."""
        if self._watch is not None:
            self._watch.close()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state()` gave."""
        self.outlook = EvalState(**state)

    def state(self) -> dict[str, Any]:
        """The outlook as plain numbers."""
        return asdict(self.outlook)

    def close(self) -> None:
        """Record and tell nothing from here on: the run is let go, its model may still be looked at."""
        self._record, self._trackers = None, TrackerQueue([])

    def note(self, result: StepResult, further: Mapping[str, Any] | None = None) -> None:
        """Record one training step, `further` values in its line.

        Trackers hear of every `tracking.every_steps`-th and of skipped ones.
        """
        histograms = self._watch.take() if self._watch is not None else {}
        if result.step % self._config.tracking.every_steps and not result.skipped and result.progress < 1:
            return
        line = {**(further or {}), **result.metrics()}
        self._write(result.step, line)
        if histograms:
            self._trackers.histograms(result.step, histograms)

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether step `step` ends with an evaluation; the end of the training always does, once."""
        every = self._config.evaluation.every_steps
        return self.outlook.last_step != step and (last or (every is not None and step % every == 0))

    def look(self, step: int, epoch: float, *, full: bool) -> tuple[bool, dict[str, Any]]:
        """Evaluate after `step` steps; `full` adds exact match.

        Returns whether this is the best so far, and the metrics.
        """
        metrics: dict[str, Any] = {}
        self.outlook.last_step = step
        improved = False
        if self._prepared.data.eval is not None and len(self._prepared.data.eval):
            metrics |= self._heldout()
            improved = self._judge(step, metrics["eval_mean_nll"])
            if full and self._config.evaluation.exact_match:
                metrics |= self._exact_answers()
        if metrics:
            self._write(step, {"epoch": epoch, **metrics})
        if self._config.evaluation.prompts:
            self._samples(step)
        return improved, metrics

    @property
    def should_stop_early(self) -> bool:
        """Whether the held-out loss has not improved for `early_stopping_patience` evaluations."""
        patience = self._config.evaluation.early_stopping_patience
        return patience is not None and self.outlook.evaluations_without_improvement >= patience

    def _heldout(self) -> dict[str, Any]:
        heldout, setup = self._prepared.data.eval, self._assembled
        assert heldout is not None
        tokenizer = self._prepared.tokenizer.tokenizer
        if self._heldout_bytes is None:
            self._heldout_bytes = trained_bytes(heldout, tokenizer)
        assert isinstance(self._config.training.batch_size, int)
        batches = eval_batches(
            heldout,
            batch_size=self._config.evaluation.batch_size or self._config.training.batch_size,
            layout=setup.engine.layout,
            pad_id=tokenizer.pad_token_id or 0,
            max_group_tokens=setup.engine.max_group_tokens,
            world_size=setup.devices.world_size,
            rank=setup.devices.rank,
        )
        with setup.precision.autocast():
            return evaluate(
                setup.engine.nll_sum,
                batches,
                model=setup.model,
                total_bytes=self._heldout_bytes,
                sum_over_devices=lambda number: setup.devices.sum(number)[0],
            )

    def _judge(self, step: int, nll: float) -> bool:
        """Keep the books of the best loss.

        Only a fall by more than the threshold counts as improvement for early stopping.
        """
        outlook = self.outlook
        outlook.last_nll = nll
        if outlook.first_nll is None:
            outlook.first_nll = nll
        best = outlook.best_nll
        if not math.isfinite(nll):
            outlook.evaluations_without_improvement += 1
            return False
        falls_enough = best is None or nll < best - self._config.evaluation.early_stopping_threshold
        outlook.evaluations_without_improvement = 0 if falls_enough else outlook.evaluations_without_improvement + 1
        if best is None or nll < best:
            outlook.best_nll, outlook.best_step = nll, step
            return True
        return False

    def _exact_answers(self) -> dict[str, Any]:
        heldout = self._prepared.data.eval
        assert heldout is not None
        with self._assembled.precision.autocast():
            count = count_exact_answers(
                self._assembled.model,
                self._prepared.tokenizer.tokenizer,
                heldout,
                stop_token_ids=self._prepared.renderer.stop_token_ids,
                pad_id=self._prepared.tokenizer.tokenizer.pad_token_id or 0,
                max_new_tokens=self._config.evaluation.max_new_tokens,
            )
        outlook = self.outlook
        outlook.num_answers, outlook.last_exact = count.answers, count.exact
        if outlook.first_exact is None:
            outlook.first_exact = count.exact
        return {"eval_exact_answers": count.exact, "eval_num_answers": count.answers}

    def _samples(self, step: int) -> None:
        prompts: Sequence[str] = self._config.evaluation.prompts
        with self._assembled.precision.autocast():
            answers = generate(
                self._assembled.model,
                self._prepared.tokenizer.tokenizer,
                self._prepared.renderer,
                prompts,
                max_new_tokens=self._config.evaluation.max_new_tokens,
            )
        rows = [{"prompt": answer.prompt, "text": answer.text} for answer in answers]
        if self._record is not None:
            self._record.samples(step, rows)
        self._trackers.samples(step, rows)

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._record is not None:
            self._record.log(step, metrics)
        self._trackers.log(step, metrics)
