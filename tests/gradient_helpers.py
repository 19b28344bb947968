"""What equality tests of fast paths compare: the loss and the gradients of a model, with an adapter that does
something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmtune.adapters.attach import attach_adapter
from llmtune.config.schema import AdapterConfig


def loss_and_gradients(model: Any, loss: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = loss()
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of all gradients' difference over their norm."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return float((apart / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5)


def adapted(model: Any, config: AdapterConfig | None) -> Any:
    """The model, with an adapter whose B matrices are not zero (so that A has gradients too) when one is asked for."""
    if config is None:
        return model
    model, _ = attach_adapter(model, config, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()
