"""Full tuning in less memory: each weight moves, and its gradient is dropped, as soon as that gradient is complete.

In a window of one micro-batch there is then never more than a gradient or two at a time. With several micro-batches gradients are sums,
which exist from the first one on; they go one by one in the last backward pass.

What moves is exactly what an ordinary update moves: no rule here looks at two weights at once, so the order does not matter (N15). What
does need all gradients before the first weight moves is refused: clipping, fp16's loss scale, histograms, a sum over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmtune.config.schema import Config
from llmtune.training.optim import Optimizer
from llmtune.training.update import set_learning_rate

__all__ = ["StepInBackward", "saves_uncut"]

HELD_OF_A_BLOCK = 1.5
"""Bytes that a recomputed block's input takes, as a multiple of the tensor's own: by the plan, gaps of the allocator included."""


def saves_uncut(config: Config, *, window_tokens: int, shape: Any, gradient_bytes: int) -> bool:
    """Whether windows take less memory whole than cut into micro-batches, whose summed gradients exist from the first one on.

    Only where a window is one micro-batch by the config and blocks are recomputed, so that a token keeps one float32 vector a block.
    Without that it keeps twelve times as much, and cutting saves more than all gradients take. `shape`: the model's transformers config.
    """
    recomputes = config.model.gradient_checkpointing in (True, "offload")
    if not (config.training.step_in_backward and recomputes and config.training.gradient_accumulation_steps == 1):
        return False
    text = shape.get_text_config()
    return bool(HELD_OF_A_BLOCK * window_tokens * text.num_hidden_layers * text.hidden_size * 4 <= gradient_bytes)


class StepInBackward:
    """The update whose every weight moves in the backward pass that completes its gradient.

    The loss is known before that pass: where it is not finite no weight moves, and the window is skipped as ever. A gradient that is not
    finite under a finite loss is noticed when weights have moved (`has_begun`); such a window cannot be skipped, so the run ends there,
    unsaved. Checking each gradient before its own weight moves would only leave other half-moved weights, at one wait for the device each.
    The norm is that of `torch.nn.utils.get_total_norm` over the same gradients, bit for bit, gathered as they pass.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], optimizer: Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._places = {
            parameter: (part, group) for part in optimizer.parts for group in part.param_groups for parameter in group["params"]
        }
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._is_finite = True
        self.has_begun = False

    def before_last_backward(self, losses: Sequence[torch.Tensor], rate: float) -> None:
        """Wait for the losses, then have every gradient that this backward pass completes applied (or, for a bad loss, dropped) at once."""
        self._is_finite = bool(torch.stack(list(losses)).double().sum().isfinite())
        set_learning_rate(self._optimizer, rate)
        self._hooks = [one.register_post_accumulate_grad_hook(self._take) for one in self._parameters]

    def grad_norm(self) -> torch.Tensor:
        """Norm of all gradients that passed, and of those that earlier micro-batches left and the last one had no part in."""
        self._unhook()
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._norms[parameter] = _norm([parameter.grad])
        norms = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
        return _norm(norms) if norms else torch.zeros((), device=self._parameters[0].device)

    def apply(self, rate: float) -> None:
        """Move the weights whose gradient the last micro-batch had no part in."""
        set_learning_rate(self._optimizer, rate)
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._move(parameter)

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
            self._move(parameter)
        parameter.grad = None

    def _move(self, parameter: torch.nn.Parameter) -> None:
        """One step of the optimizer's part that moves this parameter, shown nothing but it: its group's rules and its state as always."""
        part, group = self._places[parameter]
        groups = part.param_groups
        part.param_groups = [{**group, "params": [parameter]}]
        try:
            Optimizer(part).step()
        finally:
            part.param_groups = groups

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm(tensors)
