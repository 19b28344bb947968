"""The objective that a training minimises, and the next-token loss on the logits of a whole micro-batch.

The loss of a window is a sum over all its examples, on all devices, divided once by the window's number of trained
tokens: never a mean of means, which would depend on how the window is cut into micro-batches.

Shapes: B rows of a micro-batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.data.dataset.packing import Indices
from llmtune.engine.devices import Devices

__all__ = [
    "IGNORED",
    "Objective",
    "WindowRows",
    "next_token_objective",
    "plain_log_probs",
    "plain_nll_sum",
    "weighted_nll_sum",
]

IGNORED = -100
"""Target of a position that is not trained; `cross_entropy` gives it loss 0 and gradient 0, exactly."""


class WindowRows(Protocol):
    """What an objective may know of a window before its first micro-batch; all held-out rows are one window."""

    @property
    def indices(self) -> Indices:
        """Numbers of this process's examples, int64."""
        ...

    @property
    def all_indices(self) -> Indices:
        """Those of all processes, in the order of the window, int64."""
        ...


@dataclass(frozen=True)
class Objective:
    """A loss as the loop sees it: a sum over a micro-batch, and a name and unit for its mean over a window."""

    loss_sum: Callable[[MicroBatch], Tensor]
    """Sum over the examples of a micro-batch, 0-d float32, joined to the graph unless under `no_grad`."""
    name: str
    """The metrics `train_NAME` and `eval_NAME` are means over a window and over the held-out rows."""
    unit: str
    """Unit of those means."""
    begin_window: Callable[[WindowRows, Devices], float] | None = None
    """Called before a window's first micro-batch, in every process; gives what its loss is divided by, counted over all
    devices. None: its number of trained tokens.
    """
    measure: Callable[[Devices], dict[str, float]] | None = None
    """Called after a window's last micro-batch, in every process: further metrics of the window, over all devices."""


def next_token_objective(nll_sum: Callable[[MicroBatch], Tensor]) -> Objective:
    """Make the objective of supervised fine-tuning: the weighted negative log-likelihood of trained tokens.

    `nll_sum`: that sum over a micro-batch, sum_n w_n (-log p_n), in nats, float32 [].
    """
    return Objective(nll_sum, "mean_nll", "nats per trained token")


def plain_nll_sum(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Sum the weighted negative log-likelihoods of a micro-batch by the library's own forward: nats, float32 [].

    nll_sum = sum_n weights[n] * -log softmax(logits)[n]. The batch is moved to the model's device. A flat batch needs a
    model whose attention keeps documents apart by their restarting `position_ids` (transformers >= 5 does so when no
    mask is given).
    """
    batch = batch.to(next(model.parameters()).device)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    )
    return weighted_nll_sum(output.logits, batch.input_ids, batch.weights)


def plain_log_probs(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Log-probability of the trained tokens of each example by the library's own forward: nats, float32 [S].

    log p = sum over t >= 1 of weights[t] * log softmax(logits[t - 1])[ids[t]], the softmax in float32. `batch` is
    padded, one example a row; it is moved to the model's device.
    """
    assert batch.segments is None, "the plain forward tells examples apart by their rows"
    batch = batch.to(next(model.parameters()).device)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    weights_BT = batch.weights[:, 1:]
    targets = batch.input_ids[:, 1:].masked_fill(weights_BT == 0, IGNORED)
    nats = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -(nats.view_as(weights_BT) * weights_BT).sum(dim=1)


def weighted_nll_sum(logits_BTV: Tensor, ids_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Sum the weighted negative log-likelihoods of tokens, in nats, float32 [].

    nll_sum = sum_b sum_{t >= 1} weights[b, t] * -log softmax(logits[b, t - 1])[ids[b, t]]

    Positions of weight 0 are left out, so whatever stands there (NaN too) adds nothing; without any trained token the
    sum is 0, with zero gradients.

    >>> uniform = torch.zeros(1, 3, 4)
    >>> weights = torch.tensor([[0.0, 1.0, 0.5]])
    >>> round(weighted_nll_sum(uniform, torch.tensor([[0, 1, 2]]), weights).item(), 6)  # 1.5 x log 4
    2.079442
    """
    # Masked, and not only multiplied by 0, because 0 x NaN is NaN in the sum and in the gradient.
    weights = weights_BT[:, 1:].flatten()
    targets = ids_BT[:, 1:].flatten().masked_fill(weights == 0, IGNORED)
    logits = logits_BTV[:, :-1].flatten(0, 1).float()
    nats = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return torch.sum(nats * weights)
