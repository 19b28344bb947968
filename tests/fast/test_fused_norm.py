"""N15 for the fused RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmtune.models.fused_norm import fuse_norms, unfuse_norms


def problem(dtype: torch.dtype) -> tuple[LlamaRMSNorm, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, mean=1, std=0.3)
    return norm, 3 * torch.randn(2, 50, 64, dtype=dtype), torch.randn(2, 50, 64, dtype=dtype)


def run(norm: LlamaRMSNorm, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    norm.weight.grad = None
    output = norm(x)
    output.backward(grad)
    assert x.grad is not None
    assert norm.weight.grad is not None
    return [output.detach(), x.grad, norm.weight.grad]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_fused_norm_is_the_norm_of_the_library(dtype: torch.dtype, bound: float) -> None:
    """N15: output, input gradient and weight gradient; the bound in bf16 is relative to float64."""
    norm, x, grad = problem(dtype)
    exact, x64, grad64 = norm.double(), x.double(), grad.double()
    expected = run(exact, x64, grad64)
    norm = norm.to(dtype)
    assert fuse_norms(norm) == 1
    for found, wanted in zip(run(norm, x, grad), expected, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < bound


def test_a_norm_of_another_kind_is_left_alone(build_model: Callable[..., Any]) -> None:
    """Gemma multiplies by 1 + w, before it rounds."""
    assert fuse_norms(build_model("gemma3")) == 0


def test_fusing_norms_can_be_undone(build_model: Callable[..., Any]) -> None:
    model = build_model("qwen3")
    classes, names = [type(module) for module in model.modules()], list(model.state_dict())
    assert fuse_norms(model) == 9
    assert list(model.state_dict()) == names
    unfuse_norms(model)
    assert [type(module) for module in model.modules()] == classes
