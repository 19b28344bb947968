"""The parameters of a model: which are trained, and how many there are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["count_parameters", "trained_parameters"]


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: Any) -> int:
    """All parameters, tied ones once; a 4-bit weight counts its entries, not its bytes."""
    return sum(_entries(parameter) for parameter in model.parameters())


def _entries(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(math.prod(state.shape)) if state is not None else int(parameter.numel())
