"""What the engine and the plan switch together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gradient_helpers import adapted
from llmtune.config.schema import AdapterConfig
from llmtune.models.fused import fuse, unfuse


@pytest.mark.parametrize(("device_type", "norms"), [("cpu", 5), ("cuda", 0)])
def test_everything_that_is_fused_is_told_and_undone(build_model: Callable[..., Any], device_type: str, norms: int) -> None:
    model = adapted(build_model("llama"), AdapterConfig(method="lora", r=4)).get_base_model()
    before = [type(module) for module in model.modules()]
    assert fuse(model, device_type) == 14
    kinds = Counter(type(module).__name__ for module in model.modules())
    assert (kinds["FusedLinear"], kinds["FusedLlamaMLP"], kinds["FusedLlamaRMSNorm"]) == (14, 2, norms)
    unfuse(model)
    assert [type(module) for module in model.modules()] == before
