"""Histograms of gradients and weights for trackers that take them (`tracking.watch`).

A gradient is complete at one moment only: between the backward passes of a step it is a partial sum, and after the step
it is gone. The optimizer's hook before a step sees it then, clipped and summed over all processes. The hook only reads,
and only in steps that will be logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from llmtune.tracking.tracker import Histogram

__all__ = ["HistogramWatch", "histogram_of"]

BINS = 64


class HistogramWatch:
    """Counts histograms in every `every_steps`-th step; `take` returns them once, `close` removes the hook.

    optimizer: where several step together, the first of them: every gradient is complete then, and no weight has moved.
    kind: `gradients`, or `all` for gradients and weights (as they are before the step).
    start_step: steps that were made before.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
        kind: Literal["gradients", "all"],
        *,
        every_steps: int,
        start_step: int = 0,
    ) -> None:
        self._parameters = dict(parameters)
        self._kind = kind
        self._every_steps = every_steps
        self._step = start_step
        self._histograms: dict[str, Histogram] = {}
        self._hook = optimizer.register_step_pre_hook(self._count)

    def take(self) -> dict[str, Histogram]:
        """Return the histograms of the last step and forget them; empty for a step that is not logged."""
        histograms, self._histograms = self._histograms, {}
        return histograms

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()

    def _count(self, *_: object) -> None:
        self._step += 1
        if self._step % self._every_steps:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._histograms[f"gradients/{name}"] = histogram_of(parameter.grad)
            if self._kind == "all":
                self._histograms[f"weights/{name}"] = histogram_of(parameter)


def histogram_of(values: Tensor) -> Histogram:
    """Return `BINS` counts of the finite values between the smallest and the largest of them; values of any shape.

    Of equal width: width = (largest - smallest) / BINS.

    >>> sum(histogram_of(torch.tensor([0.0, 1.0, 2.0, float("inf")])).counts)
    3
    """
    finite = values.detach().float().flatten()
    finite = finite[torch.isfinite(finite)]
    if finite.numel() == 0:
        return Histogram((0,) * BINS, tuple(float(edge) for edge in range(BINS + 1)), norm=0.0)
    norm = float(torch.linalg.vector_norm(finite))
    low, high = (float(bound) for bound in torch.aminmax(finite))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(finite, bins=BINS, min=low, max=high)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    return Histogram(tuple(int(count) for count in counts.tolist()), tuple(edges.tolist()), norm)
