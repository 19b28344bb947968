"""What the engine and the plan switch together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gradient_helpers import adapted
from llmtune.config.schema import AdapterConfig
from llmtune.kernels.patch_model import patch_model, undo_patches


@pytest.mark.parametrize(
    ("name", "device_type", "norms"), [("llama", "cpu", 5), ("llama", "cuda", 5), ("qwen3", "cpu", 9)]
)
def test_everything_that_is_fused_is_told_and_undone(
    build_model: Callable[..., Any], name: str, device_type: str, norms: int
) -> None:
    model = adapted(build_model(name), AdapterConfig(method="lora", r=4)).get_base_model()
    before, weights = [type(module) for module in model.modules()], list(model.state_dict())
    assert patch_model(model, device_type) == Counter({"LoRA": 14, "SwiGLU": 2, "RMS norm": norms})
    kinds = Counter(type(module).__name__ for module in model.modules())
    family = type(model).__name__.removesuffix("ForCausalLM")
    assert (kinds["FusedLinear"], kinds[f"Fused{family}MLP"], kinds[f"Fused{family}RMSNorm"]) == (14, 2, norms)
    assert list(model.state_dict()) == weights
    undo_patches(model)
    assert [type(module) for module in model.modules()] == before
    assert not any("rounds_output" in vars(module) or "group" in vars(module) for module in model.modules())
