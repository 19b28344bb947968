"""LoRA: what is trained, how it starts, and that its files are peft's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.adapters.attach import attach_adapter
from llmtune.adapters.load import load_adapter, load_adapter_weights
from llmtune.adapters.write import adapter_state_and_config, write_adapter
from llmtune.errors import AdapterError
from llmtune.models.parameters import count_parameters, trained_parameters
from llmtune.models.read_config import quiet_libraries

IDS_BT = torch.arange(4, 28).reshape(2, 12)
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stir(model, seed=7):
    """Give every trained weight a value that shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS_BT).logits


def test_all_linear_means_every_linear_layer_but_the_head(tiny_model_folder, load, lora):
    model, decisions = attach_adapter(load(tiny_model_folder).model, lora(), seed=0)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained_parameters(model)}
    assert layers == set(LAYERS)
    assert model.peft_config["default"].target_modules == set(LAYERS)
    assert "14 layers get rank 4" in decisions[0].reason


def test_the_counts_are_exact(tiny_model_folder, load, lora):
    base = load(tiny_model_folder).model
    total = count_parameters(base)
    # 400 x 32 + 2 (32 x (32 + 16 + 16) + 32 x 32 + 3 x 32 x 64 + 2 x 32) + 32
    assert total == 12_800 + 2 * (2048 + 1024 + 6144 + 64) + 32
    model, _ = attach_adapter(base, lora(), seed=0)
    per_block = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    assert sum(one.numel() for one in trained_parameters(model).values()) == 2 * per_block
    assert count_parameters(model) == total + 2 * per_block


def test_an_adapter_changes_nothing_before_its_first_step(tiny_model_folder, load, lora):
    base = load(tiny_model_folder).model
    before = logits(base)
    model, _ = attach_adapter(base, lora(), seed=0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}])
def test_the_update_has_the_scale_its_formula_says(tiny_model_folder, load, lora, changes):
    base = load(tiny_model_folder).model
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model, _ = attach_adapter(base, lora(target_modules=("q_proj",), **changes), seed=0)
    layer = stir(model).base_model.model.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    scale = 8 / 4**0.5 if changes.get("rslora") else 8 / 4
    expected = weight + scale * product
    if changes.get("dora"):
        magnitude = layer.lora_magnitude_vector["default"].weight
        expected = magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ expected.T, atol=1e-5, rtol=1e-5)


def test_the_start_is_a_function_of_the_seed_and_leaves_the_global_generator_alone(tiny_model_folder, load, lora):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, _ = adapter_state_and_config(attach_adapter(load(tiny_model_folder).model, lora(), seed=3)[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, _ = adapter_state_and_config(attach_adapter(load(tiny_model_folder).model, lora(), seed=3)[0])
    other, _ = adapter_state_and_config(attach_adapter(load(tiny_model_folder).model, lora(), seed=4)[0])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    bound = 1 / 32**0.5
    values = first["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert 0.8 * bound < values.abs().max() <= bound


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trained_weights_are_float32_whatever_the_base_is(tiny_model_folder, load, lora, precision):
    model = load(tiny_model_folder, precision=precision).model
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {one.dtype for one in model.parameters()} == {expected}
    adapted, _ = attach_adapter(model, lora(modules_to_save=("lm_head",)), seed=0)
    assert {one.dtype for one in trained_parameters(adapted).values()} == {torch.float32}


def test_a_list_names_endings_and_a_string_is_a_pattern_over_full_names(tiny_model_folder, load, lora):
    listed, _ = attach_adapter(load(tiny_model_folder).model, lora(target_modules=("q_proj", "v_proj")), seed=0)
    pattern, _ = attach_adapter(
        load(tiny_model_folder).model, lora(target_modules=r".*layers\.1\..*(q|v)_proj"), seed=0
    )
    assert len(trained_parameters(listed)) == 8
    assert len(trained_parameters(pattern)) == 4
    assert all(".layers.1." in name for name in trained_parameters(pattern))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_porj",), "no layer is called `q_porj`.*did you mean `q_proj`"),
        (("q_proj", "kproj", "wat"), "no layer is called `kproj`"),
        ("q_proj", r"write a list: adapter.target_modules=\[q_proj\]"),
        ("(", "no regular expression"),
        ((), "the list is empty"),
    ],
)
def test_a_target_that_is_not_there_is_refused_with_the_nearest(tiny_model_folder, load, lora, targets, words):
    with pytest.raises(AdapterError, match=f"(?s){words}"):
        attach_adapter(load(tiny_model_folder).model, lora(target_modules=targets), seed=0)


def test_a_module_to_save_that_is_not_there_is_refused(tiny_model_folder, load, lora):
    with pytest.raises(AdapterError, match=r"(?s)no module is called `lmhead`.*`lm_head`"):
        attach_adapter(load(tiny_model_folder).model, lora(modules_to_save=("lmhead",)), seed=0)


VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "list": {"target_modules": ("q_proj", "down_proj")},
    "pattern": {"target_modules": r".*mlp\..*_proj"},
    "saved modules": {"modules_to_save": ("norm",)},
    "tokens": {"train_tokens": ("<|im_start|>", "<|im_end|>")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_peft_and_transformers_load_what_we_write_with_equal_logits(
    tiny_model_folder, tiny_tokenizer, load, lora, tmp_path, variant
):
    from peft import PeftModel

    model, _ = attach_adapter(
        load(tiny_model_folder).model, lora(**VARIANTS[variant]), seed=0, tokenizer=tiny_tokenizer
    )
    expected = logits(stir(model))
    write_adapter(model, tmp_path, tokenizer=tiny_tokenizer, stop_token_ids=[2], base_digest="d")
    with quiet_libraries():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path)
    assert torch.equal(logits(theirs), expected)
    ours = load_adapter(load(tiny_model_folder).model, tmp_path, base_digest="d")
    assert torch.equal(logits(ours), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_itself_would_write_the_same_tensors(tiny_model_folder, tiny_tokenizer, load, lora, tmp_path, variant):
    model, _ = attach_adapter(
        load(tiny_model_folder).model, lora(**VARIANTS[variant]), seed=0, tokenizer=tiny_tokenizer
    )
    stir(model)
    with quiet_libraries():
        model.save_pretrained(tmp_path)
    theirs, (ours, config) = load_file(tmp_path / "adapter_model.safetensors"), adapter_state_and_config(model)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert config.keys() - json.loads((tmp_path / "adapter_config.json").read_text()).keys() == set()


def test_the_written_files_are_the_same_bytes_every_time(tiny_model_folder, load, lora, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_adapter(attach_adapter(load(tiny_model_folder).model, lora(), seed=0)[0], tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors", "adapter_base.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_saved_adapter_fills_a_fresh_one_bit_for_bit(tiny_model_folder, load, lora, tmp_path):
    model, _ = attach_adapter(load(tiny_model_folder).model, lora(dora=True), seed=0)
    write_adapter(stir(model), tmp_path)
    fresh, _ = attach_adapter(load(tiny_model_folder).model, lora(dora=True), seed=1)
    load_adapter_weights(fresh, tmp_path)
    wanted, found = trained_parameters(model), trained_parameters(fresh)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert all(one.requires_grad for one in found.values())


def test_an_adapter_of_another_base_is_refused_by_digest(tiny_model_folder, load, lora, tmp_path):
    loaded = load(tiny_model_folder)
    write_adapter(attach_adapter(loaded.model, lora(), seed=0)[0], tmp_path, base_digest=loaded.base_digest)
    load_adapter(load(tiny_model_folder).model, tmp_path, base_digest=loaded.base_digest)
    with pytest.raises(AdapterError, match="other weights than this base"):
        load_adapter(load(tiny_model_folder).model, tmp_path, base_digest="0" * 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, name: w.pop(name), "lacks the tensor"),
        (lambda w, name: w.update({name + "x": torch.zeros(1)}), "has no place here"),
        (lambda w, name: w.update({name: torch.zeros(3, 3)}), r"has shape \(3, 3\)"),
        (lambda w, name: w.update({name: w[name] * float("nan")}), "not numbers"),
    ],
)
def test_adapter_tensors_must_be_exactly_those_that_fit(tiny_model_folder, load, lora, tmp_path, change, words):
    write_adapter(attach_adapter(load(tiny_model_folder).model, lora(), seed=0)[0], tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights, min(weights))
    save_file(weights, path)
    with pytest.raises(AdapterError, match=words):
        load_adapter(load(tiny_model_folder).model, tmp_path)
