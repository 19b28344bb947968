"""Full tuning in bf16: the model is held in bf16, and the optimizer moves float32 masters of its weights.

An update of a weight is smaller than bf16 can add to it, so sums are kept in float32 (arXiv:1710.03740): the masters,
and their gradients over the micro-batches of a window. After each update the masters are rounded into the model. No
weight is rounded again in a micro-batch then, and what flows between the blocks has 16 bits.

Whatever clips, checks, moves or saves trained weights has the masters for them; only the model has the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from llmtune.engine.optim import Optimizer
from llmtune.models.parameters import trained_parameters

__all__ = ["MasterOptimizer", "make_masters"]


def make_masters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Round a model's trained weights to bf16, of any shape, and return their float32 masters by name.

    w = round(m). Each backward pass adds a weight's gradient to that of its master, in float32. Weights that a
    transformers model keeps in float32 have no master but themselves.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    masters = {}
    for name, weight in trained_parameters(model).items():
        if not kept.isdisjoint(name.split(".")):
            masters[name] = weight
            continue
        masters[name] = nn.Parameter(weight.data.float())
        weight.data = weight.data.to(torch.bfloat16)
        weight.register_post_accumulate_grad_hook(partial(_hand_over, masters[name]))
    return masters


def _hand_over(master: nn.Parameter, weight: torch.Tensor) -> None:
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)


class MasterOptimizer(Optimizer):
    """An optimizer of masters, by the names of the model's weights, that rounds them into the model after each step."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, masters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(*optimizer.parts)
        self.masters = dict(masters)
        weights = trained_parameters(model)
        self._weights = [weights[name] for name in masters]

    def step(self) -> None:
        """Apply the gradients once."""
        super().step()
        self.round_masters()

    @torch.no_grad()
    def round_masters(self) -> None:
        """Give the model its masters rounded to bf16, after they were moved or restored (arXiv:1710.03740)."""
        torch._foreach_copy_([*self._weights], [*self.masters.values()])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model hold the masters themselves, so that it is saved in float32."""
        rounded = [weight.data for weight in self._weights]
        for weight, master in zip(self._weights, self.masters.values(), strict=True):
            weight.data = master.data
        try:
            yield
        finally:
            for weight, data in zip(self._weights, rounded, strict=True):
                weight.data = data
