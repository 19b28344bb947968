"""What a tracker is: a listener that is told about a run and can do nothing to it.

A tracker never sees a model, an optimizer or a tensor: it is given plain numbers and strings, copied, on a thread of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

__all__ = ["Histogram", "RunInfo", "Tracker", "grouped_name"]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker may know about a run before its first step. Everything in it is plain data; no secret ever is."""

    name: str
    """Name of the run and of its folder."""

    folder: Path
    """The run folder; a tracker writes only below the subfolder that carries its own name."""

    total_steps: int
    """Steps the whole training makes."""

    start_step: int = 0
    """Steps made before this process started; above 0 in a resumed run."""

    model: str = ""
    """Name of the model, as the config gives it."""

    config_name: str = ""
    """Name of the preset or of the config file, without its suffix."""

    tags: tuple[str, ...] = ()
    """`run.tags`."""

    notes: str | None = None
    """`run.notes`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config as nested plain values."""

    parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameter counts: `total`, `trained`, and whatever else was counted."""

    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Shape of the model: class, layers, width, heads, vocabulary."""


class Histogram(NamedTuple):
    """How the values of one tensor were spread when a step was made: `counts` has one entry less than `edges`."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]


class Tracker(Protocol):
    """Five methods, called in this order on one thread: start, any number of log / samples / histograms, finish.

    A method may raise: the tracker is then switched off with one line, and the run goes on. Nothing it returns is
    looked at.
    """

    name: str

    def start(self, info: RunInfo) -> None:
        """Get ready. May take long (a login, a connection); steps wait in the tracker's own queue meanwhile."""
        ...

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Note the metrics of a step: a training line, or an evaluation line whose keys start with `eval_`."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note what the model answered after `step` steps: rows with `prompt` and `text`."""
        ...

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Note how gradients or weights were spread, by tensor name."""
        ...

    def finish(self, state: str) -> None:
        """Write what is pending and let go. `state` is the run's: finished, stopped, failed or diverged."""
        ...


def grouped_name(metric: str) -> str:
    """Return the name under which a metric stands in trackers that group by a leading path.

    >>> grouped_name("train_mean_nll"), grouped_name("eval_perplexity"), grouped_name("learning_rate")
    ('train/mean_nll', 'eval/perplexity', 'train/learning_rate')
    """
    for group in ("train", "eval"):
        if metric.startswith(f"{group}_"):
            return f"{group}/{metric.removeprefix(group + '_')}"
    return f"train/{metric}"
