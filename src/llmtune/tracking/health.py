"""Health checks of a training: what looks wrong in the lines of its record, and what a colleague would try.

`HealthMonitor` takes the lines of metrics.jsonl one by one, in the run as in `llmtune health`, and returns events. It
only reads numbers that were logged anyway, so a run is the same with and without it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["CHECKS", "Check", "HealthEvent", "HealthMonitor", "History"]

RECENT = 50
"""Lines that a value is compared with."""
LONG = 200
"""Lines after which a loss must have moved."""
FEWEST = 20
"""Lines before anything can be called unusual."""

NO_RATE = 1e-12
"""A step of this rate is lost in the rounding of any float32 above 1e-5."""

HealthEvent: TypeAlias = dict[str, object]
"""A line of events.jsonl: step, kind, level, message, advice."""


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


@dataclass
class History:
    """The numbers that checks look at; lists hold the values before the line that is looked at."""

    line: Mapping[str, object] = field(default_factory=dict)
    """The line itself."""
    losses: deque[float] = field(default_factory=_recent)
    """Training losses, the newest last."""
    tokens: deque[float] = field(default_factory=_recent)
    """Trained tokens of the same steps."""
    norms: deque[float] = field(default_factory=_recent)
    speeds: deque[float] = field(default_factory=_recent)
    rates: deque[float] = field(default_factory=_recent)
    advantages: deque[float] = field(default_factory=_recent)
    """Of runs that learn from rewards: shares of the answers that are better or worse than others to their prompt."""
    utilization: deque[float] = field(default_factory=_recent)
    lines: int = 0
    """Training lines so far."""
    first_loss: float | None = None
    """Mean loss of the first lines."""
    first_norm: float | None = None
    """Median gradient norm of the first lines."""
    best_loss: float = math.inf
    """Smallest mean of `RECENT` losses so far."""
    best_speed: float = 0.0
    """Largest median of `RECENT` speeds so far."""
    heldout: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, held-out loss, mean training loss then) of each evaluation."""

    @property
    def step(self) -> int:
        """Step of the line."""
        step = self.line.get("step")
        return step if isinstance(step, int) else 0

    @property
    def progress(self) -> float:
        """Part of the training that is done."""
        return _number(self.line.get("progress")) or 0.0

    @property
    def loss(self) -> float | None:
        """Training loss of the line; None where rewards are learned from: its course says nothing there."""
        return None if "reward" in self.line else _number(self.line.get("train_mean_nll", self.line.get("train_loss")))

    @property
    def norm(self) -> float | None:
        """Gradient norm of the line."""
        return _number(self.line.get("grad_norm"))

    def recent_losses(self, count: int) -> list[float]:
        """The newest `count` losses before the line."""
        return list(self.losses)[-count:]

    def keep(self) -> None:
        """Add the line's numbers to the lists, after it was looked at."""
        if self.line.get("skipped"):
            return
        self.lines += 1
        named = {"grad_norm": self.norms, "tokens_per_second": self.speeds, "num_loss_tokens": self.tokens}
        named |= {"learning_rate": self.rates, "mfu": self.utilization, "with_advantage": self.advantages}
        for name, values in named.items():
            if (value := _number(self.line.get(name))) is not None:
                values.append(value)
        if self.loss is not None:
            self.losses.append(self.loss)
        if self.lines == FEWEST and self.norms and self.losses:  # with rewards a gradient of 0 has another cause
            self.first_norm, self.first_loss = median(self.norms), fmean(self.losses)
        if len(self.losses) >= RECENT:
            self.best_loss = min(self.best_loss, fmean(self.recent_losses(RECENT)))
        if len(self.speeds) == RECENT:
            self.best_speed = max(self.best_speed, median(self.speeds))


class Check(NamedTuple):
    """One row of `CHECKS`."""

    kind: str
    level: Literal["warning", "error"]
    test: Callable[[History], str | None]
    """Returns what was seen, with its numbers; None where nothing is wrong."""
    advice: str
    is_evaluation: bool = False
    """Whether it looks at evaluations instead of training lines."""


class HealthMonitor:
    """Runs all checks on each line; a finding that lasts is reported once, and again after a quiet stretch."""

    def __init__(self) -> None:
        self._history = History()
        self._last_seen: dict[str, int] = {}

    def see(self, line: Mapping[str, object]) -> list[HealthEvent]:
        """Look at the next line of metrics.jsonl and return the events it gives rise to."""
        history = self._history
        history.line = line
        is_evaluation = any(key in line for key in ("eval_mean_nll", "eval_loss"))
        if not is_evaluation and "learning_rate" not in line:
            return []
        if is_evaluation:
            loss = _number(line.get("eval_mean_nll", line.get("eval_loss")))
            trained = fmean(history.recent_losses(RECENT)) if history.losses else math.inf
            if loss is not None:
                history.heldout.append((history.step, loss, trained))
        events: list[HealthEvent] = [
            {"step": history.step, "kind": check.kind, "level": check.level, "message": seen, "advice": check.advice}
            for check in CHECKS
            if check.is_evaluation == is_evaluation and (seen := self._new(check)) is not None
        ]
        if not is_evaluation:
            history.keep()
        return events

    def see_all(self, lines: Iterable[Mapping[str, object]]) -> list[HealthEvent]:
        """The events of many lines."""
        return [event for line in lines for event in self.see(line)]

    def _new(self, check: Check) -> str | None:
        """What a check sees, unless it saw the same within the last `RECENT` lines (evaluations: at the last one)."""
        seen = check.test(self._history)
        if seen is None:
            return None
        now = len(self._history.heldout) if check.is_evaluation else self._history.lines
        before, self._last_seen[check.kind] = self._last_seen.get(check.kind), now
        quiet = 1 if check.is_evaluation else RECENT
        return None if before is not None and now - before <= quiet else seen


def _number(value: object) -> float | None:
    """The value as a finite float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


# --- the checks


def _non_finite_loss(now: History) -> str | None:
    reason = str(now.line.get("reason", ""))
    return _skipped(now) if now.line.get("skipped") and not reason.startswith("grad_norm") else None


def _non_finite_gradients(now: History) -> str | None:
    reason = str(now.line.get("reason", ""))
    return _skipped(now) if now.line.get("skipped") and reason.startswith("grad_norm") else None


def _skipped(now: History) -> str:
    sources = now.line.get("sources")
    rows = [str(source) for source in sources] if isinstance(sources, list) else []
    named = f"; rows: {', '.join(rows[:3])}{' and more' if len(rows) > 3 else ''}" if rows else ""
    return f"{now.line.get('reason')}: nothing was applied{named}"


def _loss_spike(now: History) -> str | None:
    loss, earlier = now.loss, now.recent_losses(RECENT)
    if loss is None or len(earlier) < FEWEST:
        return None
    middle = median(earlier)
    spread = 1.4826 * median(abs(value - middle) for value in earlier)  # a standard deviation that outliers do not move
    tokens = _number(now.line.get("num_loss_tokens"))
    # The mean of few tokens is far off where a row or two are harder than the others, in every epoch anew.
    share = min(tokens / median(now.tokens), 1.0) if tokens and now.tokens else 1.0
    is_far = share * (loss - middle) > 8 * (spread + 0.02 * abs(middle)) and loss > max(1.5 * middle, *earlier)
    return f"the loss jumped to {loss:.4g}; the {len(earlier)} before have a median of {middle:.4g}" if is_far else None


def _rising_loss(now: History) -> str | None:
    losses = now.recent_losses(RECENT)
    if len(losses) < RECENT or not math.isfinite(now.best_loss) or now.best_loss <= 0:
        return None
    mean, error = fmean(losses), stdev(losses) / math.sqrt(RECENT)
    if mean > 1.15 * now.best_loss and mean - now.best_loss > 5 * error:
        return f"the mean loss of {RECENT} lines rose from {now.best_loss:.4g} to {mean:.4g}"
    return None


def _plateau(now: History) -> str | None:
    # A loss that fell and stays is a training that is done; one that never fell is one that does not learn.
    if now.lines < LONG or not now.first_loss or now.progress >= 1:
        return None
    mean = fmean(now.recent_losses(RECENT))
    if 0.98 * now.first_loss < mean < 1.1 * now.first_loss:
        return f"the loss has hardly moved in {now.lines} lines: {now.first_loss:.4g} at the start, {mean:.4g} now"
    return None


def _too_low_too_soon(now: History) -> str | None:
    losses = now.recent_losses(10)
    if "train_mean_nll" not in now.line or len(losses) < 10 or now.progress > 0.2:
        return None
    mean = fmean(losses)
    # Short answers that follow from their prompts are learned to 0.05 nats within a fifth, and honestly so.
    if mean < 0.02:
        return f"the loss is {mean:.3g} nats per token after {now.progress:.0%} of the training"
    return None


def _zero_rate(now: History) -> str | None:
    rate, before = _number(now.line.get("learning_rate")), list(now.rates)[-2:]
    # A schedule may end at 0; its last tenth says nothing.
    if rate is None or len(before) < 2 or max(rate, *before) > NO_RATE or now.progress > 0.9:
        return None
    return f"the learning rate is {rate:.3g} since step {now.step - 2}, too small to move a weight: nothing is learned"


def _vanishing(now: History) -> str | None:
    norms = list(now.norms)[-FEWEST:]
    if now.first_norm is None or len(norms) < FEWEST or not any(now.rates):
        return None
    middle = median(norms)
    # Rows that are learned by heart have small gradients too, and a loss near 0.
    is_learned = bool(now.losses) and now.losses[-1] < 0.1
    if middle <= 1e-4 * now.first_norm and not is_learned:
        return f"the median gradient norm is {middle:.3g}; it was {now.first_norm:.3g} at the start"
    return None


def _equal_rewards(now: History) -> str | None:
    newest = list(now.advantages)[-FEWEST:]
    if len(newest) < FEWEST or any(newest):
        return None
    reward = _number(now.line.get("reward"))
    earned = "" if reward is None else f" ({reward:.4g} on average)"
    return f"for {FEWEST} lines all answers to a prompt earned the same reward{earned}: nothing is learned from them"


def _exploding(now: History) -> str | None:
    norm, norms = now.norm, list(now.norms)
    if norm is None or len(norms) < FEWEST + 2:
        return None
    middle = median(norms[:-2])
    # One far step is an unusual row; three in a row are a training that is coming apart.
    if middle > 0 and min(norm, *norms[-2:]) > 10 * middle:
        return f"the gradient norm is {norm:.3g}, above ten times its median of {middle:.3g} for three steps"
    return None


def _over_fitting(now: History) -> str | None:
    if len(now.heldout) < 3:
        return None
    best = min(now.heldout, key=lambda evaluation: evaluation[1])
    after = [evaluation for evaluation in now.heldout if evaluation[0] > best[0]]
    if len(after) < 2 or not all(loss > 1.01 * best[1] for _, loss, _ in after[-2:]):
        return None
    if after[-1][2] >= best[2]:
        return None  # the training loss rose as well: something else is wrong
    return f"held-out loss rose from {best[1]:.4g} at step {best[0]} to {after[-1][1]:.4g}, while training loss fell"


def _slower(now: History) -> str | None:
    if len(now.speeds) < RECENT or not now.best_speed:
        return None
    middle = median(now.speeds)
    if middle < 0.5 * now.best_speed:
        return f"{middle:,.0f} tokens/s are less than half of the {now.best_speed:,.0f} that this run had"
    return None


def _low_use(now: History) -> str | None:
    if len(now.utilization) < RECENT:
        return None
    middle = median(now.utilization)
    if middle < 0.05:
        tokens = _number(now.line.get("num_tokens")) or 0
        cause = "steps are small" if tokens < 4096 else "data or the CPU keep the device waiting"
        return f"the model uses {middle:.1%} of the device's peak rate at {tokens:,.0f} tokens a step: {cause}"
    return None


CHECKS: tuple[Check, ...] = (
    Check(
        "non_finite_loss",
        "error",
        _non_finite_loss,
        "look at the rows named; if they are sound, lower training.learning_rate or train with training.precision=fp32",
    ),
    Check(
        "non_finite_gradients",
        "warning",
        _non_finite_gradients,
        "in fp16 a few at the start are usual, while the loss scale is found; otherwise lower training.learning_rate",
    ),
    Check(
        "loss_spike",
        "warning",
        _loss_spike,
        "one unusual batch is harmless; if spikes repeat, lower training.learning_rate or training.max_grad_norm",
    ),
    Check(
        "rising_loss",
        "error",
        _rising_loss,
        "the run is getting worse: resume from an earlier checkpoint with a third of training.learning_rate",
    ),
    Check(
        "plateau",
        "warning",
        _plateau,
        "try a higher training.learning_rate; check with `llmtune data preview` that the answers are what is trained",
    ),
    Check(
        "too_low_too_soon",
        "warning",
        _too_low_too_soon,
        "answers may stand in the prompts, or rows repeat: `llmtune data preview` shows what is trained",
    ),
    Check(
        "zero_learning_rate",
        "error",
        _zero_rate,
        "check training.lr_schedule, training.warmup_steps and training.learning_rate",
    ),
    Check(
        "vanishing_gradients",
        "warning",
        _vanishing,
        "too high a training.learning_rate drives layers to where nothing moves them; else check what is trained "
        "(adapter.target_modules, model.train_only) and the precision: bf16 beats fp16 here",
    ),
    Check(
        "exploding_gradients",
        "error",
        _exploding,
        "lower training.learning_rate, add warm-up (training.warmup_ratio), keep training.max_grad_norm at 1",
    ),
    Check(
        "over_fitting",
        "warning",
        _over_fitting,
        "checkpoints/best is better; train fewer epochs, add rows, or set evaluation.early_stopping_patience",
        is_evaluation=True,
    ),
    Check(
        "slower",
        "warning",
        _slower,
        "another program may use this machine, or the device throttles: `llmtune gpu-monitor` shows both",
    ),
    Check(
        "equal_rewards",
        "warning",
        _equal_rewards,
        "add a reward that grades (`f1`, `length`, one of your own), draw more answers (objective.num_generations), or "
        "take prompts that are sometimes answered rightly",
    ),
    Check(
        "low_device_use",
        "warning",
        _low_use,
        "raise training.batch_size or pack rows (data.packing); with large steps, look at the CPU's load",
    ),
)
"""Every check. A new one is one row."""
