"""Switch dropout off in a model that must give the same numbers twice."""

from __future__ import annotations

from torch import nn

__all__ = ["switch_off_dropout"]

RATES = ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "dropout_p", "drop")
"""Attributes in which modules of transformers hold a rate as a number, beside modules of torch."""


def switch_off_dropout(model: nn.Module) -> int:
    """Set every rate of dropout in the model to 0, for good; returns how many were above 0.

    Its modules stay in training mode, which recomputation of blocks asks for.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            changed += module.p > 0
            module.p = 0.0
        for name in RATES:
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                changed += 1
    return changed
