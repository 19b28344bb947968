"""The interface of trackers, which receive plain numbers and strings of a run and cannot change it.

The values are copies and arrive on a thread of the tracker; a model, an optimizer or a tensor never does.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

__all__ = ["Histogram", "Metrics", "RunInfo", "Sample", "Tracker", "gradient_flow", "grouped_name"]

Metrics: TypeAlias = Mapping[str, object]
"""Metrics of a step by name: JSON values, nearly all of them numbers."""

Sample: TypeAlias = Mapping[str, object]
"""An answer of the model: its `prompt` and its `text`."""


@dataclass(frozen=True)
class RunInfo:
    """The facts about a run before its first step, as plain data without secrets."""

    name: str
    """Name of the run and of its folder."""

    folder: Path
    """The run folder; a tracker writes only in its subfolder of the tracker's name."""

    total_steps: int
    """Steps of the complete training."""

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

    config: Mapping[str, object] = field(default_factory=dict)
    """The resolved config as nested plain values."""

    parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameter counts: `total` and `trained`."""

    architecture: Mapping[str, object] = field(default_factory=dict)
    """Shape of the model: class, layers, width, heads, vocabulary."""

    modules: Mapping[str, int] = field(default_factory=dict)
    """Trained parameters by the module that they belong to."""

    origins: Mapping[str, str] = field(default_factory=dict)
    """Where each value of the config came from, by dotted key."""

    ledger: Mapping[str, object] = field(default_factory=dict)
    """What became of the rows: counts by side and status, reasons, tokens."""

    graph: bytes | None = None
    """The model's operations as a serialized GraphDef of TensorBoard, where `tracking.graph` asks for it."""


class Histogram(NamedTuple):
    """The distribution of one tensor's values: `counts` has one entry less than `edges`."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    norm: float
    """Euclidean norm of the finite values."""


class Tracker(Protocol):
    """Five methods, called in this order on one thread: start, any number of log / samples / histograms, finish.

    A method may raise: the tracker is then switched off with one line, and the run goes on.
    """

    name: str

    def start(self, info: RunInfo) -> None:
        """Open the tracker. May take long (a login, a connection); steps wait in the queue meanwhile."""
        ...

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step: a training line, or an evaluation line whose keys start with `eval_`."""
        ...

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Record the answers of the model after `step` steps."""
        ...

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Record distributions of gradients or weights, by tensor name."""
        ...

    def finish(self, state: str) -> None:
        """Write everything pending and close. `state` of the run: finished, stopped, failed or diverged."""
        ...


BLOCK = re.compile(r"(?:.*\.)?([^.]+\.\d+)\.")
"""A parameter's block: the list of blocks and the number in it."""


def gradient_flow(histograms: Mapping[str, Histogram]) -> dict[str, float]:
    """Return the Euclidean norm of the gradients of each block, and of each module outside of the blocks.

    >>> row = Histogram((1,), (0.0, 1.0), norm=3.0)
    >>> gradient_flow({"gradients/model.layers.0.mlp.up_proj.weight": row, "gradients/model.norm.weight": row})
    {'gradient_flow/layers.0': 3.0, 'gradient_flow/norm': 3.0}
    """
    squares: dict[str, float] = defaultdict(float)
    for name, row in histograms.items():
        kind, _, parameter = name.partition("/")
        if kind == "gradients":
            block = BLOCK.match(parameter)
            module = block[1] if block else (parameter.rpartition(".")[0] or parameter).rpartition(".")[2]
            squares[f"gradient_flow/{module}"] += row.norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


def grouped_name(metric: str) -> str:
    """Return the name of a metric in trackers that group by a leading path.

    >>> grouped_name("train_mean_nll"), grouped_name("eval_perplexity"), grouped_name("learning_rate")
    ('train/mean_nll', 'eval/perplexity', 'train/learning_rate')
    """
    for group in ("train", "eval"):
        if metric.startswith(f"{group}_"):
            return f"{group}/{metric.removeprefix(group + '_')}"
    return f"train/{metric}"
