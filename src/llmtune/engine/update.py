"""The update of a window: sum its gradients over the devices, clip them, step the optimizer.

`StepAfterBackward` moves all weights at once, after the last backward pass. `StepInBackward` needs less memory in full
tuning: each weight moves, and its gradient is dropped, as soon as that gradient is complete (LOMO, arXiv:2306.09782,
with any optimizer). In a window of one micro-batch there is then never more than a gradient or two at a time. With
several micro-batches gradients are sums, which exist from the first one on; they go one by one in the last backward
pass. It moves exactly what an ordinary update moves: no rule here looks at two weights at once, so the order does not
matter (N15). What needs all gradients before the first weight moves is refused with it: clipping, fp16's loss scale,
histograms, a sum over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Protocol

import torch
from transformers import PreTrainedConfig

from llmtune.common.decisions import Decision
from llmtune.config.schema import Config
from llmtune.data.dataset.batches import BatchPlan
from llmtune.engine.optim import LR_SCALE, AnyOptimizer, Optimizer
from llmtune.engine.precision import Precision

__all__ = [
    "StepAfterBackward",
    "StepInBackward",
    "Update",
    "choose_windows",
    "set_learning_rate",
    "whole_window_is_smaller",
]


class Update(Protocol):
    """The calls that the loop makes in every window, in this order; `clear` also once before the first window."""

    @property
    def has_begun(self) -> bool:
        """Whether this window has moved a weight already, so that it cannot be skipped any more."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's part of the loss, shape [], to the window's: g = g + d loss / d w."""
        ...

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """Prepare for the backward pass that completes the window's gradients.

        `losses`: loss sums of all its micro-batches, of shape [] each. `rate`: learning rate of its update.
        """
        ...

    def finish_gradients(self) -> torch.Tensor:
        """Complete the window's gradient: summed over all devices and clipped (arXiv:1211.5063), as far as it is held.

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
    """Sum the gradients over all devices (`sum_gradients`), clip them, and move all weights at once."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: AnyOptimizer,
        precision: Precision,
        sum_gradients: Callable[[Sequence[torch.nn.Parameter]], None],
        *,
        max_grad_norm: float | None,
    ) -> None:
        self._parameters, self._optimizer, self._precision = parameters, optimizer, precision
        self._sum_gradients, self._max_grad_norm = sum_gradients, max_grad_norm

    has_begun = False

    backward = methodcaller("backward")
    """Run the backward pass of a loss of shape []."""

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """Do nothing: no weight moves before all gradients are summed. `losses` are scalars, shape [] each."""

    def finish_gradients(self) -> torch.Tensor:
        """Sum over all devices, divide by the loss scale, clip (arXiv:1211.5063).

        Returns the norm before clipping, shape [].
        """
        # Summed before clipping: the norm is that of the whole window.
        self._sum_gradients(self._parameters)
        return self._precision.clip(self._parameters, self._max_grad_norm)

    def apply(self, rate: float) -> None:
        """Step the optimizer once at this learning rate."""
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()

    def clear(self) -> None:
        """Drop all gradients."""
        # To None and not to zero: zeros would be read, added to and kept.
        self._optimizer.zero_grad(set_to_none=True)


def set_learning_rate(optimizer: AnyOptimizer, rate: float) -> None:
    """Give every group of parameters this learning rate, times the group's own factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(LR_SCALE, 1.0)


BLOCK_INPUT_OVERHEAD = 1.5
"""Bytes that a recomputed block's input takes, as a multiple of the tensor's own: by the plan, gaps of the allocator
included.
"""


def whole_window_is_smaller(
    config: Config, *, window_tokens: int, shape: PreTrainedConfig, gradient_bytes: int
) -> bool:
    """Whether windows take less memory whole than cut into micro-batches with their summed gradients.

    1.5 x tokens x blocks x width x 4 bytes <= gradient_bytes. Only where a window is one micro-batch by the config and
    blocks are recomputed, so that a token saves one float32 vector a block. Without that it saves twelve times as much,
    and cutting saves more than all gradients take.
    """
    training = config.training
    if not (training.step_in_backward and config.model.recomputes and training.gradient_accumulation_steps == 1):
        return False
    text = shape.get_text_config()
    return bool(BLOCK_INPUT_OVERHEAD * window_tokens * text.num_hidden_layers * text.hidden_size * 4 <= gradient_bytes)


def choose_windows(
    windows: Callable[[int | None], BatchPlan],
    limit: int | None,
    config: Config,
    *,
    shape: PreTrainedConfig,
    gradient_bytes: Callable[[], int],
) -> tuple[BatchPlan, list[Decision]]:
    """Make the windows, cut as the engine prefers, unless all gradients would exist at once only because of that.

    windows: makes them with micro-batches of at most that many tokens. limit: the engine's `max_group_tokens`. shape,
    gradient_bytes: see `whole_window_is_smaller`.
    """
    # Cut first, because only the cut windows say how long the longest of them is.
    batches = windows(limit)
    if not config.training.step_in_backward:
        return batches, []
    key, count, tokens = (
        "training.step_in_backward.windows",
        config.training.gradient_accumulation_steps,
        batches.most_window_tokens,
    )
    if count > 1:
        return batches, [
            Decision(key, "cut", f"{count} micro-batches each, whose gradients are summed: all exist together")
        ]
    if limit is None or tokens <= limit:
        return batches, [Decision(key, "whole", "one micro-batch each, so gradients never exist together")]
    if whole_window_is_smaller(config, window_tokens=tokens, shape=shape, gradient_bytes=gradient_bytes()):
        reason = f"what blocks keep of up to {tokens:,} tokens is less than the gradients that cutting holds"
        return windows(None), [Decision(key, "whole", reason)]
    reason = (
        f"up to {tokens:,} tokens each are run {limit:,} at a time, so all gradients exist together: "
        "whole they would take more"
    )
    return batches, [Decision(key, "cut", reason)]


class StepInBackward:
    """The update whose every weight moves in the backward pass that completes its gradient.

    The loss is known before that pass: where it is not finite no weight moves, and the window is skipped as ever. A
    gradient that is not finite under a finite loss is noticed when weights have moved (`has_begun`); such a window
    cannot be skipped, so the run ends there, unsaved. Checking each gradient before its own weight moves would only
    leave other half-moved weights, at one wait for the device each. The norm is that of `torch.nn.utils.get_total_norm`
    over the same gradients, bit for bit, gathered as they pass.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], optimizer: Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._is_finite = True
        self.has_begun = False

    backward = methodcaller("backward")
    """Run the backward pass of a loss of shape []."""

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """Apply every gradient as soon as it is complete, or drop it where a loss is not finite (arXiv:2306.09782).

        `losses`: scalars, shape [] each. Waits for them.
        """
        # Asked before the first weight moves: afterwards the window could no longer be skipped.
        self._is_finite = bool(torch.stack(list(losses)).double().sum().isfinite())
        set_learning_rate(self._optimizer, rate)
        # Only now: in the micro-batches before, gradients are summed and no weight may move.
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self._parameters]

    def finish_gradients(self) -> torch.Tensor:
        """Give the norm of the window's gradient, shape []: ||g|| = sqrt(sum_i ||g_i||^2) over the parameters i.

        Those whose gradient the last micro-batch had no part in are counted here; the hooks counted the others.
        """
        self._unhook()
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._norms[parameter] = _norm([parameter.grad])
        # In the order of the parameters, not of the backward pass: a sum in another order rounds otherwise.
        norms = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
        return _norm(norms) if norms else torch.zeros((), device=self._parameters[0].device)

    def apply(self, rate: float) -> None:
        """Move the weights whose gradient the last micro-batch had no part in."""
        set_learning_rate(self._optimizer, rate)
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._optimizer.step_only(parameter)

    def clear(self) -> None:
        """Drop what is left of the window."""
        self._unhook()
        self._optimizer.zero_grad(set_to_none=True)
        self._norms.clear()
        self.has_begun = False

    def _take(self, parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = _norm([parameter.grad])
        if self._is_finite:
            self.has_begun = True
            self._optimizer.step_only(parameter)
        parameter.grad = None  # before the next one is made: this is the memory that is saved

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm(tensors)
