"""N15 for the fused RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from llmtune.kernels.patch_model import patch_model


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
    assert patch_model(norm, "cpu")["RMS norm"] == 1
    for found, wanted in zip(run(norm, x, grad), expected, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < bound


def test_a_norm_of_another_kind_is_left_alone(build_model: Callable[..., Any]) -> None:
    """Gemma multiplies by 1 + w, before it rounds."""
    assert patch_model(build_model("gemma3"), "cpu")["RMS norm"] == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_before_products_round_for_them_and_others_do_not(
    build_model: Callable[..., Any], autocast: bool
) -> None:
    """Forward numbers are those of layers that round for themselves; the norms of single heads feed no product and stay
    float32.
    """
    model = build_model("qwen3")
    seen: dict[str, torch.dtype] = {}
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = model(ids).logits
        patch_model(model, "cpu")
        for name, module in model.named_modules():
            if "norm" in name.rpartition(".")[2]:
                module.register_forward_hook(
                    lambda _, __, output, name=name: seen.update({name.rpartition(".")[2]: output.dtype})
                )
        found = model(ids).logits
    narrow = torch.bfloat16 if autocast else torch.float32
    assert seen == {
        "input_layernorm": narrow,
        "post_attention_layernorm": narrow,
        "q_norm": torch.float32,
        "k_norm": torch.float32,
        "norm": torch.float32,
    }
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < (1e-6 if not autocast else 4e-3)


def test_a_mixture_of_experts_keeps_the_type_it_adds_up_in() -> None:
    block = torch.nn.ModuleDict({"input_layernorm": MixtralRMSNorm(64)})
    assert patch_model(block, "cpu")["RMS norm"] == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block["input_layernorm"](torch.randn(3, 64)).dtype == torch.float32


def test_a_narrow_gradient_is_widened_before_it_is_used() -> None:
    """N15 under autocast, also where the backward pass runs in it: gradients of a float32 norm with rounded output,
    relative to float64.
    """
    norm, x, grad = problem(torch.float32)
    expected = run(norm.double(), x.double(), grad.bfloat16().double())
    block = torch.nn.ModuleDict({"input_layernorm": norm.float()})
    patch_model(block, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, grad_x, grad_weight = run(block["input_layernorm"], x, grad.bfloat16())  # type: ignore[arg-type]
    assert output.dtype == torch.bfloat16
    for found, wanted in ((grad_x, expected[1]), (grad_weight, expected[2])):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6
