"""The trained parameters of a model, their number, and the model inside peft's wrapper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["base_model_of", "count_parameters", "trained_parameters"]


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", model) if get_base_model is None else get_base_model()


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that training changes, by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of entries of all parameters, tied ones once; a packed 4-bit weight counts its entries."""
    return sum(_entries(parameter) for parameter in model.parameters())


def _entries(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # set by bitsandbytes on a 4-bit weight
    return int(math.prod(state.shape)) if state is not None else parameter.numel()
