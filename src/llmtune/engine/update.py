"""How the gradients of a window become one update.

The ordinary way: once they are all there, and then all weights at once.

The other way is in `step_in_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from llmtune.engine.devices import Devices
from llmtune.engine.precision import Precision

__all__ = ["StepAfterBackward", "Stepper", "Update", "set_learning_rate"]


class Stepper(Protocol):
    """What an update needs of an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self) -> object:
        """Apply the gradients."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        ...


class Update(Protocol):
    """What the loop asks for in every window, in this order; `clear` also once before the first."""

    @property
    def has_begun(self) -> bool:
        """Whether this window has moved a weight already, so that it cannot be skipped any more."""
        ...

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """The next backward pass completes the window's gradients. `losses`: loss sums of all its micro-batches.

        `rate`: of its update.
        """
        ...

    def reduce_and_clip(self) -> torch.Tensor:
        """Complete the window's gradient over all devices and clip it.

        Returns its norm before clipping, shape [], without waiting for the device.
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
        optimizer: Stepper,
        precision: Precision,
        devices: Devices,
        *,
        max_grad_norm: float | None,
    ) -> None:
        self._parameters, self._optimizer, self._precision, self._devices = parameters, optimizer, precision, devices
        self._max_grad_norm = max_grad_norm

    has_begun = False

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """Nothing is done before gradients are whole."""

    def reduce_and_clip(self) -> torch.Tensor:
        """Sum over all devices, take the loss scale out, clip; returns the norm before clipping."""
        self._devices.sync_gradients(self._parameters)
        return self._precision.clip(self._parameters, self._max_grad_norm)

    def apply(self, rate: float) -> None:
        """One step of the optimizer at this rate."""
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()

    def clear(self) -> None:
        """Drop all gradients."""
        self._optimizer.zero_grad(set_to_none=True)


def set_learning_rate(optimizer: Stepper, rate: float) -> None:
    """Give every group of parameters this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
