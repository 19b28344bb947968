"""LoftQ: the adapter begins with the strongest part of what quantizing took, as peft computes it; the base stays."""

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition

from llmtune.adapters.attach import attach_adapter
from llmtune.adapters.residual_base import lora_layers
from llmtune.config.layers import parse_config
from llmtune.config.schema import AdapterConfig, ModelConfig
from llmtune.errors import AdapterError, ConfigError
from llmtune.models.catalog import resolve
from llmtune.models.load import load_model
from llmtune.models.quantization import dequantized_weight
from llmtune.models.tokenizer import load_tokenizer
from llmtune.training.quantization_error import begin_with_quantization_error


def loaded(folder, quantization="4bit"):
    source = resolve(str(folder))
    model_config = ModelConfig(name=str(folder), quantization=quantization)
    tokenizer = load_tokenizer(source, model_config).tokenizer
    arguments = {"tokenizer": tokenizer, "device": torch.device("cpu"), "trained": "adapter", "precision": "fp32"}
    return source, load_model(source, model_config, seed=0, **arguments).model


def test_the_first_values_are_those_that_peft_computes_and_the_base_stays(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    source, model = loaded(tiny_model_folder)
    adapted, _ = attach_adapter(model, AdapterConfig(method="lora", r=4, alpha=4.0, init="loftq"), seed=0)
    before = {name: dequantized_weight(layer.get_base_layer()) for name, layer in lora_layers(adapted)}
    decision = begin_with_quantization_error(adapted, source)
    full = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).state_dict()
    for name, layer in lora_layers(adapted):
        quantized = dequantized_weight(layer.get_base_layer())
        assert torch.equal(quantized, before[name])
        error = full[f"{name.removeprefix('base_model.model.')}.weight"] - quantized
        theirs = _low_rank_decomposition(error, reduced_rank=4)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product, theirs["L"] @ theirs["R"], atol=1e-6, rtol=1e-4)
        assert (error - product).norm() < 0.95 * error.norm()
    assert "% of what quantizing took" in decision.reason


def test_the_scale_of_the_adapter_is_taken_into_account(tiny_model_folder):
    products = []
    for alpha in (4.0, 16.0):
        source, model = loaded(tiny_model_folder)
        adapted, _ = attach_adapter(model, AdapterConfig(method="lora", r=4, alpha=alpha, init="loftq"), seed=0)
        begin_with_quantization_error(adapted, source)
        _, layer = next(lora_layers(adapted))
        scale = layer.scaling["default"]
        products.append(scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    torch.testing.assert_close(*products, atol=1e-6, rtol=1e-4)


def test_it_is_for_layers_of_4_bits(tiny_model_folder):
    source, model = loaded(tiny_model_folder)
    config = AdapterConfig(method="lora", r=4, init="loftq", target_modules=("q_proj", "lm_head"))
    adapted, _ = attach_adapter(model, config, seed=0)
    with pytest.raises(AdapterError, match="`lm_head` is not quantized"):
        begin_with_quantization_error(adapted, source)
    with pytest.raises(ConfigError, match="quantizing to 4 bits"):
        parse_config("adapter: {method: lora, init: loftq}")
