"""N15 for fused LoRA layers: peft's own outputs and gradients, and peft's own layer wherever the arithmetic is another."""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gradient_helpers import adapted, difference, loss_and_gradients
from llmtune.adapters.write import adapter_state_and_config
from llmtune.config.schema import AdapterConfig, Config
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.forward import build_engine
from llmtune.engine.objective import plain_nll_sum
from llmtune.kernels.patch_model import patch_model, undo_patches
from llmtune.models.quantization import disable_cpu_repacking, quantization_config

Build = Callable[..., Any]
LORA = AdapterConfig(method="lora", r=4, alpha=8)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "phi3", "gpt2"])
def test_fused_adapters_repeat_peft(
    name: str, rslora: bool, build_model: Build, arithmetic: Build, flat: MicroBatch, padded: MicroBatch
) -> None:
    """N15: loss 1e-6, every gradient together 1e-5 relative, float32; nothing frozen gets a gradient."""
    config = replace(LORA, rslora=rslora)
    plain, model = adapted(build_model(name), config), adapted(build_model(name), config)
    engine = build_engine(model, config=Config(), device=torch.device("cpu"), precision=arithmetic())
    assert "adapter" in [decision.key.split(".")[0] for decision in engine.decisions]
    expected = loss_and_gradients(plain, lambda: plain_nll_sum(plain, padded))
    found = loss_and_gradients(model, lambda: engine.nll_sum(flat))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert all("lora_" in one for one in found[1])
    assert difference(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_bf16_fused_adapters_are_as_close_to_float32_as_peft(
    name: str, build_model: Build, arithmetic: Build, flat: MicroBatch, padded: MicroBatch
) -> None:
    """N15 in bf16 with a bf16 base: gradients no further from float32 (on the same rounded weights) than 1.2 times
    peft's own.
    """
    models = [adapted(build_model(name).bfloat16(), LORA) for _ in range(2)]
    exact = adapted(build_model(name).bfloat16(), LORA).float()
    half = arithmetic(bf16=True)
    engine = build_engine(models[0], config=Config(), device=torch.device("cpu"), precision=half)
    truth = loss_and_gradients(exact, lambda: plain_nll_sum(exact, padded))
    with half.autocast():
        peft = loss_and_gradients(models[1], lambda: plain_nll_sum(models[1], padded))
        found = loss_and_gradients(models[0], lambda: engine.nll_sum(flat))
    assert found[0] == pytest.approx(truth[0], rel=5e-3)
    assert difference(found[1], truth[1]) < 1.2 * difference(peft[1], truth[1])


@pytest.mark.parametrize("config", [replace(LORA, dropout=0.1), replace(LORA, dora=True)])
def test_dropout_and_dora_keep_the_layer_of_peft(config: AdapterConfig, build_model: Build) -> None:
    assert patch_model(adapted(build_model("llama"), config), "cuda")["LoRA"] == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_on_a_4bit_base_repeat_peft(
    bf16: bool, tiny_model_folder: Path, arithmetic: Build, make_examples: Callable[..., list[Example]]
) -> None:
    """N15 for QLoRA: the same dequantized weights, in float32 within 1e-6 and 1e-5; in bf16 loss 5e-3, gradients 3e-2
    of peft's own.
    """
    compute = torch.bfloat16 if bf16 else torch.float32
    models = []
    for _ in range(2):
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tiny_model_folder, quantization_config=quantization_config("4bit", compute)
        )
        disable_cpu_repacking(base)
        models.append(adapted(base, LORA))
    precision = arithmetic(bf16=bf16)
    engine = build_engine(models[0], config=Config(), device=torch.device("cpu"), precision=precision)
    assert "fused: 14 LoRA layers" in " ".join(str(decision) for decision in engine.decisions)
    examples = make_examples(vocabulary=400)
    with precision.autocast():
        expected = loss_and_gradients(
            models[1], lambda: plain_nll_sum(models[1], make_micro_batch(examples, "padded", 0))
        )
        found = loss_and_gradients(models[0], lambda: engine.nll_sum(make_micro_batch(examples, "flat", 0)))
    assert found[0] == pytest.approx(expected[0], rel=5e-3 if bf16 else 1e-6)
    assert difference(found[1], expected[1]) < (3e-2 if bf16 else 1e-5)


def test_a_disabled_adapter_gives_the_base_model_back(build_model: Build, padded: MicroBatch) -> None:
    base, model = build_model("llama"), adapted(build_model("llama"), LORA)
    patch_model(model, "cuda")
    with model.disable_adapter():
        assert torch.equal(model(padded.input_ids).logits, base(padded.input_ids).logits)
    assert not torch.equal(model(padded.input_ids).logits, base(padded.input_ids).logits)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_disabled_adapter_gives_the_bits_of_an_update_of_0(
    build_model: Build, arithmetic: Build, padded: MicroBatch, bf16: bool
) -> None:
    """A new adapter's model is its own reference: preference losses then begin at exactly no difference."""
    model = adapted(build_model("llama"), LORA)
    patch_model(model.base_model.model, "cpu")
    with torch.no_grad(), arithmetic(bf16=bf16).autocast():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
        enabled = model(padded.input_ids).logits
        with model.disable_adapter():
            disabled = model(padded.input_ids).logits
    assert torch.equal(enabled, disabled)


def test_taking_layers_over_changes_no_name_and_can_be_undone(build_model: Build) -> None:
    model = adapted(build_model("llama"), LORA)
    before, classes = adapter_state_and_config(model), [type(module) for module in model.modules()]
    assert patch_model(model, "cuda")["LoRA"] == 14
    after = adapter_state_and_config(model)
    assert list(before[0]) == list(after[0])
    assert before[1] == after[1]
    undo_patches(model)
    assert [type(module) for module in model.modules()] == classes


def test_shared_inputs_leave_nothing_waiting(build_model: Build, padded: MicroBatch) -> None:
    """Outputs computed for a neighbour are picked up in the same pass: memory does not hold them till the next one."""
    model = adapted(build_model("llama"), LORA)
    patch_model(model, "cuda")
    model(padded.input_ids)
    groups = {id(module.group): module.group for module in model.modules() if "group" in vars(module)}
    assert sorted(len(group.members) for group in groups.values()) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert all(group._input is None and not group._pending for group in groups.values())


def test_a_layer_called_alone_answers_alone(build_model: Build) -> None:
    model = adapted(build_model("llama"), LORA)
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 5, 48)
    expected = [attention.v_proj(x), attention.v_proj(2 * x)]
    patch_model(model, "cuda")
    for found, wanted in zip([attention.v_proj(x), attention.v_proj(2 * x)], expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
