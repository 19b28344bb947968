"""A run folder as data to show: series of metrics with gaps, evaluations by data set, samples, events, facts.

Everything is read as it is, also while the run writes it: a line cut short waits for the next reading, and a file that
is missing, unreadable or wrong leaves its part empty.

    data = RunData(Path("runs/NAME"))
    while data.refresh():                    # reads only what is new
        loss = data.metrics["train_mean_nll"].smoothed(0.9)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmtune import durable
from llmtune.common.records import flat_items
from llmtune.watch.log_reader import LogReader
from llmtune.watch.series import Series

__all__ = ["Event", "RunData", "Sample", "SkippedStep"]

_OF_SET = re.compile(r"eval_(.+)_mean_nll")
"""The held-out loss of one data set of several."""

LOSS_METRICS = ("train_mean_nll", "train_loss")
"""Names of the training loss, the first that a run has; `train_loss` where answers are compared."""


class Event(NamedTuple):
    """A line of events.jsonl: something about the training that deserves attention."""

    step: int
    kind: str
    """Name of the check in the table of health checks, such as `loss_spike`."""
    level: Literal["warning", "error"]
    message: str
    """What was seen, with its numbers."""
    advice: str
    """What a colleague would try."""


class SkippedStep(NamedTuple):
    """A window whose loss or gradients were not finite, so that nothing was applied."""

    step: int
    """Updates applied before it."""
    reason: str
    sources: tuple[str, ...]
    """Rows that may have caused it."""


class Sample(NamedTuple):
    """An answer of the model while it was trained."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class _Logs:
    metrics: LogReader
    samples: LogReader
    events: LogReader
    system: LogReader
    ledger: LogReader


class RunData:
    """What a run folder shows; empty until `refresh`.

    The folder may be that of a run at work, a finished or a killed one, or one that is not there (yet).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.info: dict[str, Any] = {}
        """run.json."""
        self.origins: dict[str, str] = {}
        """Where each value of the config came from, by dotted key."""
        self.data: dict[str, Any] = {}
        """data.json: lengths of the examples and a few of them, by side."""
        self.metrics: dict[str, Series] = {}
        """Every number of metrics.jsonl over steps, by its name there; skipped windows are not in them."""
        self.system: dict[str, Series] = {}
        """Every number of system.jsonl over seconds since its first line; nested names are joined with dots."""
        self.skipped: list[SkippedStep] = []
        self.samples: list[Sample] = []
        """In rising order of steps, the prompts of a step in their order."""
        self.events: list[Event] = []
        self.ledger: list[dict[str, Any]] = []
        """Rows that were not simply used, as in ledger.jsonl."""
        self._samples: dict[tuple[int, str], Sample] = {}
        self._started_at: float | None = None
        self._logs = _Logs(**{name: LogReader(self.path / f"{name}.jsonl") for name in _Logs.__dataclass_fields__})
        self._stamps: dict[str, tuple[int, int]] = {}

    def refresh(self) -> bool:
        """Read what is new, and return whether anything was."""
        takers: dict[str, Callable[[list[dict[str, Any]]], None]] = {
            "metrics": self.take_metrics,
            "samples": self._take_samples,
            "events": self.take_events,
            "system": self._take_system,
            "ledger": self.ledger.extend,
        }
        is_new = False
        for file, attribute in (("run.json", "info"), ("origins.json", "origins"), ("data.json", "data")):
            is_new |= self._refresh_json(file, attribute)
        for name, take in takers.items():
            lines, is_restart = getattr(self._logs, name).read()
            if is_restart:
                self._forget(name)
            take(lines)
            is_new |= is_restart or bool(lines)
        return is_new

    @property
    def planned_bytes(self) -> float | None:
        """The planned peak of memory; None where the run has no plan."""
        plan = self.info.get("plan")
        memory = plan.get("memory") if isinstance(plan, dict) else None
        peak = memory.get("peak_bytes") if isinstance(memory, dict) else None
        return float(peak) if isinstance(peak, int | float) else None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def state(self) -> str:
        """As in run.json; `interrupted` where a run was killed, `unknown` without run.json."""
        state = str(self.info.get("state", "unknown"))
        return "interrupted" if state == "running" and not durable.is_locked(self.path / ".lock") else state

    @property
    def step(self) -> int:
        """The newest step in the record; 0 before the first."""
        last = [series.xs[-1] for series in self.metrics.values() if series.xs]
        return int(max(last, default=0))

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole training; None while it is not known."""
        total = self.info.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def loss_metric(self) -> str:
        """Name of the training loss; of a run that learns from rewards, the mean reward (a loss says nothing there)."""
        if "reward" in self.metrics:
            return "reward"
        return next((name for name in LOSS_METRICS if name in self.metrics), LOSS_METRICS[0])

    @property
    def measured(self) -> str:
        """What training changes: `loss`, or `reward`, which is better higher."""
        return "reward" if self.loss_metric == "reward" else "loss"

    @property
    def loss_unit(self) -> str:
        """Unit of the losses of this run."""
        if self.measured == "reward":
            return "mean reward of the drawn answers"
        return "nats per trained token" if self.loss_metric == LOSS_METRICS[0] else "loss of an answer or a pair"

    @property
    def heldout_metric(self) -> str:
        """Name of the held-out loss (or reward) over all held-out rows."""
        if self.measured == "reward":
            return "eval_reward"
        return self.loss_metric.replace("train_", "eval_", 1)

    @property
    def heldout_sets(self) -> dict[str, Series]:
        """Held-out loss over steps: `""` for all rows, then each data set where there are several."""
        every = {"": self.metrics[self.heldout_metric]} if self.heldout_metric in self.metrics else {}
        return every | {
            match[1]: series for name, series in self.metrics.items() if (match := _OF_SET.fullmatch(name)) is not None
        }

    @property
    def config(self) -> dict[str, Any]:
        """The config of the run with every automatic choice filled in, nested."""
        identity = self.info.get("identity")
        config = identity.get("config") if isinstance(identity, dict) else None
        return config if isinstance(config, dict) else {}

    @property
    def flat_config(self) -> dict[str, Any]:
        """The config by dotted key."""
        return dict(flat_items(self.config))

    def eta_seconds(self) -> float | None:
        """Time that the steps left will take at the pace of the newest 50; None where it cannot be said."""
        seconds = [value for value in self.metrics.get("step_seconds", Series()).values[-50:] if not math.isnan(value)]
        if not seconds or self.total_steps is None:
            return None
        return max(self.total_steps - self.step, 0) * sum(seconds) / len(seconds)

    def _forget(self, name: str) -> None:
        if name == "metrics":
            self.metrics, self.skipped = {}, []
        elif name == "samples":
            self._samples, self.samples = {}, []
        elif name == "system":
            self.system, self._started_at = {}, None
        elif name == "events":
            self.events = []
        else:
            self.ledger.clear()

    def _refresh_json(self, file: str, attribute: str) -> bool:
        path = self.path / file
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if self._stamps.get(file) == stamp:
                return False
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        self._stamps[file] = stamp
        setattr(self, attribute, value if isinstance(value, dict) else {})
        return True

    def take_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines of metrics.jsonl, or lines of their kind from elsewhere."""
        for line in lines:
            step = _whole(line.get("step"))
            if step is None:
                continue
            if line.get("skipped"):
                sources = line.get("sources")
                rows = tuple(map(str, sources)) if isinstance(sources, list) else ()
                self.skipped.append(SkippedStep(step, str(line.get("reason", "")), rows))
                continue
            for name, value in line.items():
                if name != "step" and (value is None or _is_number(value)):
                    self.metrics.setdefault(name, Series()).put(step, _float(value))

    def _take_samples(self, lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            step = _whole(line.get("step"))
            if step is not None:
                sample = Sample(step, str(line.get("prompt", "")), str(line.get("text", "")))
                self._samples[step, sample.prompt] = sample
        self.samples = sorted(self._samples.values(), key=lambda sample: sample.step)

    def take_events(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines of events.jsonl."""
        for line in lines:
            step = _whole(line.get("step"))
            if step is not None:
                level: Literal["warning", "error"] = "error" if line.get("level") == "error" else "warning"
                words = (str(line.get(key, "")) for key in ("message", "advice"))
                self.events.append(Event(step, str(line.get("kind", "")), level, *words))

    def _take_system(self, lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            seconds = _float(line["time"]) if _is_number(line.get("time")) else None
            if seconds is None:
                continue
            if self._started_at is None:
                self._started_at = seconds
            for name, value in _numbers(line):
                if name != "time":
                    self.system.setdefault(name, Series()).put(seconds - self._started_at, value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: Any) -> float | None:
    """The number as a float; None for None and for whole numbers beyond the range of floats."""
    try:
        return None if value is None else float(value)
    except OverflowError:
        return None


def _whole(value: object) -> int | None:
    """The number of a step; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _numbers(value: object, name: str = "") -> Iterable[tuple[str, float | None]]:
    """Every number within nested objects and lists, with its dotted name.

    >>> list(_numbers({"time": 1, "devices": [{"use": 0.5}]}))
    [('time', 1.0), ('devices.0.use', 0.5)]
    """
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif _is_number(value):
        yield name, _float(value)
