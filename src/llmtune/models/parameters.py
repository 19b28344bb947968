"""A model's trained parameters, their number, the model inside peft's wrapper, and its evaluation mode (N12)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["base_model_of", "count_parameters", "eval_mode", "trained_parameters"]


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", model) if get_base_model is None else get_base_model()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> int:
    """Return the number of entries of all parameters, tied ones once; a packed 4-bit weight counts its entries."""
    return sum(_entries(parameter) for parameter in model.parameters())


def _entries(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # set by bitsandbytes on a 4-bit weight
    return int(math.prod(state.shape)) if state is not None else parameter.numel()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients; restore every module's mode and torch's random state after."""
    # Module by module, because a frozen part may be in evaluation mode while its parent trains.
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
