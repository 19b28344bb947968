"""Looking at a model without changing it or anything around it (promise N12)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["eval_mode"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients.

    Afterwards every module's mode and torch's random state are what they were.

    Modes are kept module by module, because a frozen part may be in evaluation mode while its parent trains.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def base_model_of(model: Any) -> Any:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
