"""N15 for frozen weights that are laid out beforehand: no bit of a loss or a gradient changes, and nothing stays
behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gradient_helpers import adapted, loss_and_gradients
from llmtune.config.schema import AdapterConfig, Config, ModelConfig, TrainingConfig
from llmtune.data.dataset.micro_batch import MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine import forward
from llmtune.engine.forward import build_engine, cannot_prepack
from llmtune.kernels import weight_prepack
from llmtune.kernels.patch_model import unfuse
from llmtune.kernels.weight_prepack import Prepacked
from llmtune.models.quantization import disable_cpu_repacking, quantization_config

Build = Callable[..., Any]
CPU = torch.device("cpu")
LORA = AdapterConfig(method="lora", r=4, alpha=8)
PACKED = Config(adapter=LORA, model=ModelConfig(weights_prepack=True))

needs_bf16 = pytest.mark.skipif(not weight_prepack.can_prepack(), reason="this CPU does not multiply bf16 natively")


def engine_of(model: Any, precision: Any, config: Config = PACKED) -> Any:
    return build_engine(model, config=config, device=CPU, precision=precision)


def told(forward: Any) -> Any:
    return next(one for one in forward.decisions if one.key == "model.weights_prepack")


def kept_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "_prepacked" in vars(module)]


@needs_bf16
@pytest.mark.parametrize("is_held_in_bf16", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi", "gemma3", "cohere"])
def test_the_same_loss_and_gradients_bit_by_bit(
    name: str, is_held_in_bf16: bool, build_model: Build, arithmetic: Build, flat: MicroBatch
) -> None:
    """N15: weights that are held transposed, with biases, in float32; heads tied and not."""
    half = arithmetic(bf16=True)

    def found_with(config: Config) -> tuple[Any, Any]:
        model = adapted(build_model(name).to(torch.bfloat16 if is_held_in_bf16 else torch.float32), LORA)
        forward = engine_of(model, half, config)
        with half.autocast():
            return loss_and_gradients(model, lambda: forward.nll_sum(flat)), kept_in(model)

    (loss, gradients), kept = found_with(PACKED)
    (plain_loss, plain_gradients), none = found_with(Config(adapter=LORA, model=ModelConfig(weights_prepack=False)))
    assert loss == plain_loss
    assert all(torch.equal(gradients[one], plain_gradients[one]) for one in plain_gradients | gradients)
    assert none == []
    assert any(one.endswith("head") for one in kept)
    assert len(kept) == {"gpt2": 8, "phi": 12}.get(name, 14) + 1


@needs_bf16
def test_on_a_4bit_base_too(
    tiny_model_folder: Path, arithmetic: Build, make_examples: Callable[..., list[Example]]
) -> None:
    """N15: dequantized once, in both layouts; the same bits as dequantized at each use."""
    half, results = arithmetic(bf16=True), []
    batch = make_micro_batch(make_examples(vocabulary=400), "flat", 0)
    for wanted in (True, False):
        quantized = quantization_config("4bit", torch.bfloat16)
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=quantized)
        disable_cpu_repacking(base)
        model = adapted(base, LORA)
        forward = engine_of(model, half, Config(adapter=LORA, model=ModelConfig(weights_prepack=wanted)))
        assert len(kept_in(model)) == (15 if wanted else 0)
        with half.autocast():
            results.append(loss_and_gradients(model, lambda forward=forward: forward.nll_sum(batch)))
    (loss, gradients), (plain_loss, plain_gradients) = results
    assert loss == plain_loss
    assert all(torch.equal(gradients[one], plain_gradients[one]) for one in plain_gradients)


@needs_bf16
def test_the_kept_layouts_are_what_is_multiplied(build_model: Build, arithmetic: Build, flat: MicroBatch) -> None:
    """Equality above would hold for layouts that nobody reads: with those of doubled weights, loss and gradients are
    others.
    """
    half = arithmetic(bf16=True)
    model = adapted(build_model("llama").bfloat16(), LORA)
    forward = engine_of(model, half)

    def found() -> tuple[Any, Any]:
        with half.autocast():
            return loss_and_gradients(model, lambda: forward.nll_sum(flat))

    first, gradients = found()
    down = model.get_base_model().model.layers[1].mlp.down_proj.get_base_layer()
    head = model.get_base_model().lm_head
    for layer in (down, head):
        own = vars(layer)["_prepacked"]
        doubled = Prepacked(layer.weight * 2)
        vars(layer)["_prepacked"] = doubled
        assert found()[0] != first
        vars(layer)["_prepacked"] = half_doubled(own, doubled)
        loss, changed = found()
        assert loss == first
        assert not all(torch.equal(changed[one], gradients[one]) for one in gradients)
        vars(layer)["_prepacked"] = own


def half_doubled(own: Prepacked, doubled: Prepacked) -> Prepacked:
    """The layout for inputs of one, that for gradients of the other."""
    mixed = object.__new__(Prepacked)
    mixed._for_inputs, mixed._for_gradients = own._for_inputs, doubled._for_gradients
    return mixed


@needs_bf16
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 60), (33, 47), (256, 256), (1, 8)])
def test_products_are_the_plain_ones_for_any_shape_and_any_strides(outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight_NK, bias_N = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    packed = Prepacked(weight_NK)
    for tokens in (1, 2, 17, 64, 500):
        x_TK, onto_TK = torch.randn(2, tokens, inputs).bfloat16()
        grad_TN = torch.randn(outputs, tokens).bfloat16().t()
        assert torch.equal(packed.linear(x_TK, bias_N), functional.linear(x_TK, weight_NK, bias_N))
        assert torch.equal(packed.linear(x_TK), functional.linear(x_TK, weight_NK))
        assert torch.equal(packed.input_gradient(grad_TN), grad_TN @ weight_NK)
        before = onto_TK.clone()
        assert torch.equal(packed.input_gradient(grad_TN, onto_TK), torch.addmm(onto_TK, grad_TN, weight_NK))
        assert torch.equal(onto_TK, before)


@needs_bf16
@pytest.mark.parametrize(
    ("which", "is_added"), [("linear", False), ("input_gradient", False), ("input_gradient", True)]
)
def test_where_a_bit_differs_nothing_is_kept_and_it_is_said(
    which: str, is_added: bool, monkeypatch: pytest.MonkeyPatch, build_model: Build, arithmetic: Build
) -> None:
    real = getattr(Prepacked, which)

    def off_by_a_bit(self: Prepacked, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        found = real(self, x, onto)
        if x.shape in ((37, 80), (37, 97)) and is_added == (
            onto is not None
        ):  # to down_proj, from gate_proj, up_proj and the head
            found[-1, -1] += 0.25
        return found

    monkeypatch.setattr(Prepacked, which, off_by_a_bit)
    model = adapted(build_model("llama").bfloat16(), LORA)
    decision = told(engine_of(model, arithmetic(bf16=True)))
    assert decision.value is False
    assert "differs from the plain one" in decision.reason
    assert kept_in(model) == []


@needs_bf16
def test_only_what_stays_is_made_outside_the_heap(
    monkeypatch: pytest.MonkeyPatch, build_model: Build, arithmetic: Build
) -> None:
    """What is made on the way and gone again would take fresh pages each time: a second of the start of a real model."""  # noqa: E501
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            made.append(function.__name__)
            return function(*arguments, **(named or {}))

    monkeypatch.setattr(forward, "outside_the_heap", Watch)
    model = adapted(build_model("llama").bfloat16(), LORA)
    engine_of(model, arithmetic(bf16=True))
    assert made == ["clone.default"] * 2 * len(kept_in(model)) != []


@needs_bf16
def test_nothing_is_kept_of_an_engine_that_is_undone_and_a_copy_shares(build_model: Build, arithmetic: Build) -> None:
    model = adapted(build_model("llama").bfloat16(), LORA)
    names = list(model.state_dict())
    engine_of(model, arithmetic(bf16=True))
    assert list(model.state_dict()) == names
    layer = model.get_base_model().lm_head
    assert vars(copy.deepcopy(layer))["_prepacked"] is vars(layer)["_prepacked"]
    unfuse(model.get_base_model())
    assert kept_in(model) == []


@needs_bf16
def test_another_arithmetic_than_theirs_takes_the_plain_weights(
    build_model: Build, arithmetic: Build, padded: MicroBatch
) -> None:
    """Layouts are kept for bf16; the same model called in float32 computes as if there were none."""
    model = adapted(build_model("llama"), LORA).eval()
    with torch.no_grad():
        engine_of(model, arithmetic(bf16=True))
        found = model(padded.input_ids).logits
        assert kept_in(model)
        weight_prepack.drop_prepacked(model)
        assert torch.equal(found, model(padded.input_ids).logits)


@needs_bf16
def test_a_head_that_is_trained_in_place_keeps_its_own_product(build_model: Build, arithmetic: Build) -> None:
    model = adapted(build_model("llama").bfloat16(), LORA)
    model.get_base_model().lm_head.weight.requires_grad_()
    engine_of(model, arithmetic(bf16=True))
    assert len(kept_in(model)) == 14


@needs_bf16
def test_a_head_that_is_trained_and_layers_without_lora_keep_their_own_product(
    build_model: Build, arithmetic: Build
) -> None:
    some = AdapterConfig(method="lora", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = adapted(build_model("llama").bfloat16(), some)
    engine_of(model, arithmetic(bf16=True), Config(adapter=some, model=ModelConfig(weights_prepack=True)))
    assert [one.split(".")[-2] for one in kept_in(model)] == ["q_proj", "q_proj"]


def test_in_float32_nothing_is_laid_out(build_model: Build, arithmetic: Build) -> None:
    model = adapted(build_model("llama"), LORA)
    decision = told(engine_of(model, arithmetic()))
    assert (decision.value, decision.reason, kept_in(model)) == (False, "the arithmetic is not bf16", [])


@pytest.mark.parametrize(
    ("config", "device", "dtype", "reason"),
    [
        (Config(adapter=LORA), "cuda", torch.bfloat16, "only a CPU's kernels"),
        (Config(), "cpu", torch.bfloat16, "adapter.method: none"),
        (Config(adapter=AdapterConfig(method="lora", dropout=0.1)), "cpu", torch.bfloat16, "dropout"),
        (Config(adapter=AdapterConfig(method="lora", dora=True)), "cpu", torch.bfloat16, "DoRA"),
        (Config(adapter=LORA, model=ModelConfig(quantization="8bit")), "cpu", torch.bfloat16, "8-bit"),
        (Config(adapter=LORA, training=TrainingConfig(engine="plain")), "cpu", torch.bfloat16, "flat engine"),
        (Config(adapter=LORA, training=TrainingConfig(compile=True)), "cpu", torch.bfloat16, "compiled"),
        (Config(adapter=LORA), "cpu", None, "not bf16"),
    ],
)
def test_why_it_cannot_be(
    config: Config, device: str, dtype: torch.dtype | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason in str(cannot_prepack(config, device, dtype))
    monkeypatch.setattr(weight_prepack, "can_prepack", lambda: True)
    assert cannot_prepack(Config(adapter=LORA), "cpu", torch.bfloat16) is None
    monkeypatch.setattr(weight_prepack, "can_prepack", lambda: False)
    assert "no native bf16" in str(cannot_prepack(Config(adapter=LORA), "cpu", torch.bfloat16))
