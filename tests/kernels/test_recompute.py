"""N15 for inputs that are made again in the backward pass: no bit changes, and they are not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradient_helpers import adapted, loss_and_gradients
from llmtune.config.schema import AdapterConfig, Config, ModelConfig
from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.engine.forward import build_engine
from llmtune.kernels import lora, tiled_mlp
from llmtune.kernels.patch_model import patch_model
from llmtune.kernels.recompute import mark_recomputable, recomputation_of
from llmtune.kernels.rms_norm import FusedRmsNorm

Build = Callable[..., Any]
LORA = AdapterConfig(method="lora", r=4, alpha=8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "phi3", "gpt2"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_loss_and_gradients_bit_by_bit(
    name: str,
    base: torch.dtype,
    bf16: bool,
    build_model: Build,
    arithmetic: Build,
    flat: MicroBatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """N15, with models whose norms and products are recomputed, whose norms alone are, and that recompute nothing."""
    precision = arithmetic(bf16=bf16)
    made = []

    def counted(tensor: torch.Tensor) -> Any:
        made.append(recomputation_of(tensor) is not None)
        return recomputation_of(tensor)

    def found() -> Any:
        model = adapted(build_model(name).to(base), LORA)
        engine = build_engine(model, config=Config(adapter=LORA), device=CPU, precision=precision)
        made.clear()
        with precision.autocast():
            return loss_and_gradients(model, lambda: engine.nll_sum(flat))

    monkeypatch.setattr(lora, "recomputation_of", counted)
    loss, gradients = found()
    # each of two blocks: behind either norm, and behind the product; before the first norm nothing wants a gradient
    assert sum(made) == {"llama": 5, "qwen3": 5, "granite": 5, "phi3": 3, "gpt2": 0}[name]
    monkeypatch.setattr(lora, "recomputation_of", lambda _tensor: None)
    kept_loss, kept_gradients = found()
    assert loss == kept_loss
    assert all(torch.equal(gradients[one], kept_gradients[one]) for one in kept_gradients)


def test_an_input_that_the_layer_rounds_is_rounded_again(
    build_model: Build, arithmetic: Build, flat: MicroBatch
) -> None:
    """A norm that stays float32 under autocast (as in a mixture of experts) before layers that multiply in bf16."""
    half, results = arithmetic(bf16=True), []
    for rounds_output in (True, False):
        model = adapted(build_model("llama"), LORA)
        engine = build_engine(model, config=Config(adapter=LORA), device=CPU, precision=half)
        for module in model.modules():
            if isinstance(module, FusedRmsNorm):
                module.rounds_output = rounds_output

        def loss_of(engine: Any = engine) -> torch.Tensor:
            with half.autocast():  # and the backward pass outside, as in a training
                return engine.nll_sum(flat)  # type: ignore[no-any-return]

        results.append(loss_and_gradients(model, loss_of))
    (loss, gradients), (other_loss, other_gradients) = results
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert gradient.dtype == other_gradients[name].dtype == torch.float32
        assert float((gradient - other_gradients[name]).norm() / gradient.norm()) < 2e-2


def test_neither_a_norms_output_nor_the_product_is_kept(build_model: Build) -> None:
    model = adapted(build_model("llama"), LORA).get_base_model()
    block = model.model.layers[0]
    x = torch.randn(1, 40, 48, requires_grad=True)
    inside: dict[str, torch.Tensor] = {}
    block.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: inside.update(product=inputs[0].detach()))
    block.mlp.gate_proj.register_forward_pre_hook(lambda _module, inputs: inside.update(normal=inputs[0].detach()))

    def kept() -> set[str]:
        storages = set()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = block.mlp(block.post_attention_layernorm(x))
        found = {name for name, tensor in inside.items() if tensor.untyped_storage().data_ptr() in storages}
        del output
        return found

    assert kept() == {"product", "normal"}
    patch_model(model, "cpu")
    assert kept() == set()


def test_a_source_that_was_overwritten_is_noticed(build_model: Build) -> None:
    model = adapted(build_model("llama"), LORA).get_base_model()
    patch_model(model, "cpu")
    block, held = model.model.layers[0], []
    block.mlp.gate_proj.register_forward_hook(lambda _module, _inputs, output: held.append(output))
    output = block.mlp(torch.randn(1, 7, 48, requires_grad=True))
    with torch.no_grad():
        held[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_tiles_make_them_again_too(
    build_model: Build, arithmetic: Build, flat: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N15 for rows in tiles: what a tile computes again is itself marked recomputable."""
    monkeypatch.setattr(tiled_mlp, "LEAST_TOKENS", 64)
    precision, results = arithmetic(), []
    for recipe in (recomputation_of, lambda _tensor: None):
        monkeypatch.setattr(lora, "recomputation_of", recipe)
        model = adapted(build_model("llama"), LORA)
        config = Config(adapter=LORA, model=ModelConfig(gradient_checkpointing="offload"))
        engine = build_engine(model, config=config, device=CPU, precision=precision)
        results.append(loss_and_gradients(model, lambda engine=engine: engine.nll_sum(flat)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[1][1])


def test_a_recomputation_is_noted_on_its_tensor_alone_and_only_where_a_gradient_is_needed() -> None:
    source = torch.randn(3, 4, requires_grad=True)
    tensor = source * 2
    assert mark_recomputable(tensor, lambda one: one * 2, source) is tensor
    found = recomputation_of(tensor)
    assert found is not None
    assert torch.equal(found.function(*found.inputs), tensor)
    assert not found.inputs[0].requires_grad
    assert found.inputs[0].data_ptr() == source.data_ptr()
    assert recomputation_of(tensor.view(4, 3)) is None
    assert recomputation_of(mark_recomputable(torch.ones(3), torch.neg, source)) is None
