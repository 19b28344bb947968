"""The training loop.

Its invariant: **a yield is a step boundary**. Gradients are clear, `state` counts exactly the updates applied and the
windows consumed, and a checkpoint written there is complete.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from llmtune.data.dataset.batches import Window
from llmtune.engine.choose_device import peak_memory_bytes
from llmtune.engine.devices import Devices
from llmtune.engine.objective import Objective
from llmtune.engine.precision import Precision
from llmtune.engine.state import TrainingState
from llmtune.engine.update import Update
from llmtune.errors import DivergedError

__all__ = [
    "StepResult",
    "UpdateCheck",
    "describe_rows",
    "gather_values",
    "half_updated",
    "non_finite_parameters",
    "rows_of_non_finite_losses",
    "too_many_skipped",
    "train_steps",
]


@dataclass(frozen=True)
class StepResult:
    """The result of one window: an update, or (`skipped`) the rows for which none was made."""

    step: int
    """Updates applied so far."""
    epoch: float
    """Epochs consumed."""
    progress: float
    """Part of the planned windows consumed, in (0, 1]; step / total steps when none was skipped."""
    mean_loss: float
    """Loss per trained token over the whole window and all devices, before the update, in the objective's unit."""
    loss_name: str
    """Name of that mean in the metrics, with `train_` before it."""
    learning_rate: float
    """Rate of this update; of the update that was not made, when skipped."""
    grad_norm: float
    """Norm of the window's gradient over all devices, before clipping."""
    num_tokens: int
    """Real tokens of the window, over all devices."""
    num_loss_tokens: float
    """Sum of weights of the window, over all devices."""
    num_sequences: int
    """Examples of the window, over all devices."""
    rows_digest: str
    """Digest of the window's rows in their order, over all devices: equal in runs that saw the same rows."""
    step_seconds: float
    """From the end of the step before (or the return from its yield) to this one's."""
    memory_bytes: int
    """Most memory held so far (see `peak_memory_bytes`)."""
    reason: str | None = None
    """Why nothing was applied: the loss or the gradients were not finite."""
    sources: tuple[str, ...] = ()
    """Rows of a skipped window over all devices: those of the micro-batches whose loss is not finite, or else all."""
    further: Mapping[str, float] = field(default_factory=dict)
    """Further means over the window that the objective measures, by their names in the metrics."""
    mfu: float | None = None
    """Part of the device's peak arithmetic rate that the model's own work took, where the peak is known."""

    @property
    def train_mean_nll(self) -> float:
        """The mean loss under the name it has in supervised fine-tuning."""
        return self.mean_loss

    @property
    def skipped(self) -> bool:
        """Whether the window was consumed and nothing applied."""
        return self.reason is not None

    def metrics(self) -> dict[str, object]:
        """Give the line for trackers; values that are not finite are None, and skipped windows have further keys."""
        line: dict[str, object] = {
            "step": self.step,
            "epoch": self.epoch,
            "progress": self.progress,
            f"train_{self.loss_name}": _finite_or_none(self.mean_loss),
            "learning_rate": self.learning_rate,
            "grad_norm": _finite_or_none(self.grad_norm),
            "num_tokens": self.num_tokens,
            "num_loss_tokens": self.num_loss_tokens,
            "num_sequences": self.num_sequences,
            "rows_digest": self.rows_digest,
            "tokens_per_second": self.num_tokens / self.step_seconds,
            "loss_tokens_per_second": self.num_loss_tokens / self.step_seconds,
            "step_seconds": self.step_seconds,
            "memory_bytes": self.memory_bytes,
            **{name: _finite_or_none(value) for name, value in self.further.items()},
        }
        if self.mfu is not None:
            line["mfu"] = self.mfu
        if self.skipped:
            line |= {"skipped": True, "reason": self.reason, "sources": list(self.sources)}
        return line


def train_steps(
    *,
    objective: Objective,
    update: Update,
    windows: Iterable[Window],
    learning_rate: Callable[[int], float],
    precision: Precision,
    state: TrainingState,
    devices: Devices,
    max_skipped_steps: int,
    mfu: Callable[[float], float] | None = None,
) -> Iterator[StepResult]:
    """Train on each window and yield its result; every yield is a safe place to stop.

    `learning_rate(n)`: rate of the update after n applied ones. `windows`: those after `state.windows`. A window whose
    loss or gradient norm is not finite is yielded as skipped, with its rows, and never applied. Raises DivergedError
    beyond `max_skipped_steps` of them, overflows of the fp16 scale not counted, and at once where the update had begun.
    """
    update.clear()
    started = time.perf_counter()
    for window in windows:
        totals = devices.count(window.loss_weight, window.num_tokens, window.num_sequences)  # before any backward pass
        divisor = _divisor(objective, window, devices, totals[0])
        rate = learning_rate(state.step)
        losses: list[torch.Tensor] = []
        rows: list[tuple[str, ...]] = []
        for batch in window.micro_batches:
            with precision.autocast():
                batch_loss = objective.loss_sum(batch)
            losses.append(batch_loss.detach())  # .item() here would wait for the device on every micro-batch
            rows.append(batch.sources)
            if len(losses) == len(window.micro_batches):
                update.before_last_backward(losses, rate)
            loss = batch_loss / divisor  # the scale is a second rounding, so only fp16 has it
            update.backward(loss * precision.scale if precision.scale != 1.0 else loss)

        loss_sum, grad_norm = _read(losses, update.finish_gradients(), devices)
        mean_loss = loss_sum / divisor
        reason = _why_not(objective.name, mean_loss, grad_norm)  # the same on every process, before the optimizer moves
        bad_rows, reason = ((), None) if reason is None else _blame(reason, losses, rows, window, devices)
        if reason is None:
            update.apply(rate)
        elif update.has_begun:
            raise half_updated(reason, bad_rows, step=state.step)
        update.clear()
        overflow = precision.advance(applied=reason is None, loss_is_finite=math.isfinite(loss_sum))
        state.advance(window.epoch, *totals, applied=reason is None, overflow=overflow)
        if state.skipped_steps > max_skipped_steps:
            raise too_many_skipped(reason or "", bad_rows, state.step, state.skipped_steps, budget=max_skipped_steps)

        yield StepResult(
            mean_loss=mean_loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            reason=reason,
            sources=bad_rows,
            **_measure(objective, window, totals, state, time.perf_counter() - started, devices, mfu),
        )
        started = time.perf_counter()


class _Measures(TypedDict):
    loss_name: str
    further: Mapping[str, float]
    step: int
    epoch: float
    progress: float
    num_tokens: int
    num_loss_tokens: float
    num_sequences: int
    rows_digest: str
    step_seconds: float
    memory_bytes: int
    mfu: float | None


def _measure(
    objective: Objective,
    window: Window,
    totals: tuple[float, ...],
    state: TrainingState,
    seconds: float,
    devices: Devices,
    mfu: Callable[[float], float] | None,
) -> _Measures:
    """Give the fields of a result that count and measure; `totals` as `devices.count` gave them."""
    loss_weight, tokens, sequences = totals
    return {
        "loss_name": objective.name,
        "further": objective.measure(devices) if objective.measure is not None else {},
        "step": state.step,
        "epoch": window.epoch,
        "progress": window.progress,
        "num_tokens": int(tokens),
        "num_loss_tokens": loss_weight,
        "num_sequences": int(sequences),
        "rows_digest": window.rows_digest,
        "step_seconds": seconds,
        "memory_bytes": peak_memory_bytes(devices.device),
        "mfu": mfu(tokens / seconds) if mfu else None,
    }


def _divisor(objective: Objective, window: Window, devices: Devices, loss_weight: float) -> float:
    """Give what a window's loss is divided by, counted over all devices; `loss_weight`: its sum of weights."""
    count = loss_weight if objective.begin_window is None else objective.begin_window(window, devices)
    return count or 1.0  # a window without trained tokens has no loss to divide


def _read(losses: list[torch.Tensor], norm: torch.Tensor, devices: Devices) -> tuple[float, float]:
    """Give the window's loss over all devices and the gradient norm; the one wait for the device in a step."""
    if losses:
        own_sum = torch.stack(losses).double().sum()
    else:  # a window with fewer micro-batches than processes
        own_sum = torch.zeros((), dtype=torch.float64, device=devices.device)
    # Both in one tensor: on a CUDA device each `tolist` would wait for the stream.
    with devices.waiting():  # on a GPU the sum is waited for here
        loss_sum, grad_norm = torch.stack([devices.sum_tensor(own_sum), norm.double().to(own_sum.device)]).tolist()
    return loss_sum, grad_norm


def _why_not(name: str, mean_loss: float, grad_norm: float) -> str | None:
    """Give the reason why a window must not be applied, or None."""
    if not math.isfinite(mean_loss):
        return f"train_{name} is {mean_loss}"
    return None if math.isfinite(grad_norm) else f"grad_norm is {grad_norm}"


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


ROWS_NAMED = 8
"""Rows that a message names before it only counts."""


def rows_of_non_finite_losses(losses: Sequence[torch.Tensor], sources: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Give the rows of the micro-batches whose loss is not finite, in order.

    `losses`: one tensor of shape [] for each micro-batch; `sources`: the rows of each. Waits for the device.
    """
    return tuple(
        name for loss, names in zip(losses, sources, strict=True) if not math.isfinite(float(loss)) for name in names
    )


def _blame(
    reason: str, losses: Sequence[torch.Tensor], rows: Sequence[Sequence[str]], window: Window, devices: Devices
) -> tuple[tuple[str, ...], str]:
    """Give the rows of a window that is not applied, as `StepResult.sources`, and the reason with the processes named.

    losses, rows: of this process, as `rows_of_non_finite_losses` takes them; each process must call it.
    """
    # The main process alone writes, and the rows may be another's.
    of_each = gather_values(rows_of_non_finite_losses(losses, rows), devices)
    ranks = [str(rank) for rank, own in enumerate(of_each) if own]
    # A device that is broken is the only one with such losses, whatever its rows.
    where = f" (process{'es' * (len(ranks) > 1)} {', '.join(ranks)})" if ranks and devices.world_size > 1 else ""
    return tuple(dict.fromkeys(itertools.chain(*of_each))) or window.sources, reason + where


def gather_values(value: object, devices: Devices) -> list[Any]:
    """Give the `value`, plain JSON, of every process, by rank; each process must call it."""
    text = json.dumps(value).encode()
    (longest,) = devices.largest(float(len(text)))
    # Padded with spaces, which JSON ignores: processes gather tensors of one shape.
    padded = torch.tensor(list(text.ljust(int(longest))), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist())) for row in devices.gather_rows(padded)]


def describe_rows(rows: Sequence[str]) -> str:
    """Name rows for a message.

    >>> describe_rows(["a.jsonl:3", "a.jsonl:9"])
    'a.jsonl:3, a.jsonl:9'
    """
    named = ", ".join(rows[:ROWS_NAMED])
    return f"{named} and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else named


def too_many_skipped(reason: str, rows: Sequence[str], step: int, skipped: int, *, budget: int) -> DivergedError:
    """Make the error for a training whose budget of skipped windows is spent; `step` counts the updates applied."""
    counts = f"{skipped} windows skipped, {budget} allowed"
    return DivergedError(
        f"{reason} in the window after step {step}: {counts}; rows {describe_rows(rows)}",
        where=f"step {step + 1}",
        fix="look at these rows, lower `training.learning_rate` or lengthen the warm-up; "
        "the weights were not touched by these windows",
    )


def half_updated(reason: str, rows: Sequence[str], *, step: int) -> DivergedError:
    """Make the error for a window that moved some weights before its gradient was seen not to be finite.

    `step` counts whole updates.
    """
    when = f"in the window after step {step}, whose loss is finite"
    return DivergedError(
        f"{reason} {when}: weights have moved by then; rows {describe_rows(rows)}",
        where=f"step {step + 1}",
        fix="look at these rows or lower `training.learning_rate`; "
        "with `training.step_in_backward: false` such a window is skipped",
    )


class UpdateCheck:
    """Checks that steps change weights: a rate may be too small for float32, a gradient nothing but zeros.

    parameters: what this process holds of each, of any shape; looked at twice where the first step moves them. devices:
    the processes that hold the other parts, each of which must make the same calls and gets the same answers.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], devices: Devices) -> None:
        self._parameters, self._devices = parameters, devices
        self._before = _sums_of_bits(parameters)
        self.unchanged_reason: str | None = None
        """Why the steps so far have changed no weight; None where one has, and before a step that was to change one."""
        self._has_moved = False

    def check(self, result: StepResult) -> None:
        """Look at the weights after a step; after the first that has changed one it looks at them no more."""
        if self._has_moved or result.skipped or not result.learning_rate:
            return
        (moved,) = self._devices.largest(_sums_of_bits(self._parameters) != self._before)
        self._has_moved = bool(moved)
        if self._has_moved:
            self.unchanged_reason = None
        elif result.grad_norm > 0:
            self.unchanged_reason = (
                f"with a learning rate of {result.learning_rate:.3g} and a gradient of norm {result.grad_norm:.3g}, "
                "training.learning_rate or training.max_grad_norm is too small, or training.eps too large"
            )
        elif self.unchanged_reason is None:
            self.unchanged_reason = "the gradient is 0"


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""Whole numbers as wide as a weight, by bytes."""


def _sums_of_bits(parameters: Mapping[str, torch.Tensor]) -> list[int]:
    """The sum of the bit patterns of each tensor, of any shape: without a copy of it, where digests need one."""
    values = [value.detach().view(_BITS[value.element_size()]) for value in parameters.values()]
    # One tensor of all answers, as below.
    return torch.stack([value.sum(dtype=torch.int64) for value in values]).tolist() if values else []


def non_finite_parameters(parameters: Mapping[str, torch.Tensor], devices: Devices | None = None) -> list[str]:
    """Give the names of parameters, of any shape, that hold a value that is not finite.

    parameters: what this process holds of each. devices: the processes that hold the other parts, each of which must
    call it and gets the same answer.
    """
    if not parameters:
        return []
    # One tensor of all answers: on a CUDA device each question by itself would wait for the stream.
    bad = torch.stack([(~torch.isfinite(value)).any() for value in parameters.values()]).double()
    counts = (bad if devices is None else devices.sum_tensor(bad)).tolist()
    return [name for name, count in zip(parameters, counts, strict=True) if count]
