"""The update of a window: sum its gradients over the devices, clip them, step the optimizer.

`StepAfterBackward` moves all weights at once, after the last backward pass; `step_in_backward` has the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from llmtune.engine.devices import Devices
from llmtune.engine.optim import LR_SCALE, Optimizer
from llmtune.engine.precision import Precision

__all__ = ["StepAfterBackward", "Update", "set_learning_rate"]


class Update(Protocol):
    """The calls that the loop makes in every window, in this order; `clear` also once before the first window."""

    @property
    def has_begun(self) -> bool:
        """Whether this window has moved a weight already, so that it cannot be skipped any more."""
        ...

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """Prepare for the backward pass that completes the window's gradients.

        `losses`: loss sums of all its micro-batches, float32 [] each. `rate`: learning rate of its update.
        """
        ...

    def reduce_and_clip(self) -> torch.Tensor:
        """Sum the window's gradient over all devices and clip it (arXiv:1211.5063).

        Returns its norm before clipping, ||g|| = sqrt(sum_i g_i^2), shape [], without waiting for the device.
        """
        ...

    def apply(self, rate: float) -> None:
        """Move every weight that has not moved yet."""
        ...

    def clear(self) -> None:
        """Drop all gradients."""
        ...


class StepAfterBackward:
    """Sum the gradients over all devices, clip them, and let the optimizer move all weights at once."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: Optimizer,
        precision: Precision,
        devices: Devices,
        *,
        max_grad_norm: float | None,
    ) -> None:
        self._parameters, self._optimizer, self._precision, self._devices = parameters, optimizer, precision, devices
        self._max_grad_norm = max_grad_norm

    has_begun = False

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """Do nothing: no weight moves before all gradients are summed. `losses` are scalars, shape [] each."""

    def reduce_and_clip(self) -> torch.Tensor:
        """Sum over all devices, divide by the loss scale, clip; returns the norm before clipping, shape []."""
        # Summed before clipping: the norm is that of the whole window.
        self._devices.sync_gradients(self._parameters)
        return self._precision.clip(self._parameters, self._max_grad_norm)

    def apply(self, rate: float) -> None:
        """Step the optimizer once at this learning rate."""
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()

    def clear(self) -> None:
        """Drop all gradients."""
        self._optimizer.zero_grad(set_to_none=True)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group of parameters this learning rate, times the group's own factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(LR_SCALE, 1.0)
