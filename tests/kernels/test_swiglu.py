"""N15 for the fused SwiGLU product: the library's numbers, bit by bit, with one tensor less kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereMLP
from transformers.models.granite.modeling_granite import GraniteMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.olmo.modeling_olmo import OlmoMLP
from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.smollm3.modeling_smollm3 import SmolLM3MLP

from llmtune.kernels.patch_model import patch_model
from llmtune.kernels.swiglu import FEED_FORWARDS

CLASSES = [CohereMLP, GraniteMLP, LlamaMLP, MistralMLP, OlmoMLP, Olmo2MLP, Qwen2MLP, Qwen3MLP, SmolLM3MLP]


def feed_forward(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__ == "LlamaMLP")


def run(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(output.detach().cos())
    assert x.grad is not None
    return [
        output.detach(),
        x.grad,
        *(weight.grad.clone() for weight in module.parameters() if weight.grad is not None),
    ]


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_the_fused_product_is_the_librarys_bit_by_bit(
    build_model: Callable[..., Any], device: str, dtype: torch.dtype, autocast: bool
) -> None:
    """N15: outputs, the input's gradient and every weight's."""
    torch.manual_seed(0)
    module = feed_forward(build_model("llama")).to(device, dtype)
    x = 2 * torch.randn(3, 50, module.gate_proj.in_features, dtype=dtype).to(device)  # type: ignore[union-attr]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        expected = run(module, x)
        assert patch_model(module, device)["SwiGLU"] == 1
        found = run(module, x)
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_gate_and_up_are_all_that_is_kept(build_model: Callable[..., Any]) -> None:
    module = feed_forward(build_model("llama"))
    x = torch.randn(1, 40, module.gate_proj.in_features)  # type: ignore[union-attr]

    def kept_wide_tensors() -> int:
        kept = set()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[-1] == module.gate_proj.out_features and tensor.numel() == 40 * tensor.shape[-1]:  # type: ignore[union-attr]
                kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = module(x)
        count = len(kept)
        del output
        return count

    assert kept_wide_tensors() == 4  # gate, silu(gate), up and the product
    patch_model(module, "cpu")
    assert kept_wide_tensors() == 3


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_taken_over_computes_exactly_this(kind: Any) -> None:
    """The bodies of their forward functions are compared with what stands in for them: a new release of the library may
    change one.
    """
    assert kind.__name__ in FEED_FORWARDS
    body = "".join(inspect.getsource(kind.forward).split(":", 1)[1].split())
    assert body in (
        "down_proj=self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))returndown_proj",
        "returnself.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))",
    )


def test_no_class_is_left_untested() -> None:
    assert {kind.__name__ for kind in CLASSES} == FEED_FORWARDS


def test_another_activation_is_left_alone(build_model: Callable[..., Any]) -> None:
    assert patch_model(build_model("gemma3"), "cpu")["SwiGLU"] == 0
    model = build_model("llama")
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.act_fn = nn.GELU()
    assert patch_model(model, "cpu")["SwiGLU"] == 0
