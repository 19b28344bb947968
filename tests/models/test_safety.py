"""Nobody let in: what a model or adapter folder may hold, and that nothing in it is ever run."""

import contextlib
import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.adapters.attach import attach_adapter
from llmtune.adapters.load import load_adapter
from llmtune.adapters.write import write_adapter
from llmtune.errors import AdapterError, LlmtuneError, ModelError
from llmtune.models.scan import refuse_unsafe_folder, weight_files


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"auto_map": {"AutoConfig": "modeling_x.Config"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"text_config": {"trust_remote_code": 1}}, "text_config.trust_remote_code"),
        ({"text_config": {"auto_map": {"AutoModel": "someone/repo--x.Y"}}}, "text_config.auto_map"),
        ({"_attn_implementation": "someone/kernels"}, "_attn_implementation"),
        ({"attn_implementation": "someone/kernels@v1:forward"}, "attn_implementation"),
        ({"_attn_implementation_internal": {"text_config": "someone/kernels"}}, "_attn_implementation_internal"),
        ({"_experts_implementation": "someone/experts"}, "_experts_implementation"),
        ({"sub": [{"auto_map": {"a": "b.c"}}]}, "sub[0].auto_map"),
    ],
)
def test_a_config_that_names_code_is_refused_before_any_library_reads_it(
    model_folder, load, tiny_tokenizer, change, key
):
    edit(model_folder / "config.json", **change)
    with pytest.raises(ModelError) as caught:
        load(model_folder, tokenizer=tiny_tokenizer)
    problem = caught.value.problems[0]
    assert problem.where.endswith(f"config.json: {key}")
    assert "--trust-remote-code" in problem.fix
    assert caught.value.exit_code == 4


def test_every_place_that_names_code_is_said_at_once(model_folder):
    edit(model_folder / "config.json", auto_map={"a": "b.c"}, _attn_implementation="x/y")
    edit(model_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]})
    with pytest.raises(ModelError) as caught:
        refuse_unsafe_folder(model_folder)
    assert len(caught.value.problems) == 3
    refuse_unsafe_folder(model_folder, trust_remote_code=True)


@pytest.mark.parametrize("value", [None, "sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_ordinary_attention_names_are_fine(model_folder, value):
    edit(model_folder / "config.json", _attn_implementation=value)
    refuse_unsafe_folder(model_folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\..\\b.safetensors", ".hidden.safetensors"],
)
def test_a_shard_index_may_not_point_outside_its_folder(model_folder, load, name):
    save_file(load_file(model_folder / "model.safetensors"), model_folder.parent / "outside.safetensors")
    (model_folder / "model.safetensors").unlink()
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match="not a plain file name"):
        load(model_folder)


def test_a_missing_shard_is_named(model_folder):
    (model_folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, model_folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="1 of 2 shards are missing, first model-00002"):
        weight_files(model_folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth", "net.mdl", "tf_model.h5"]
)
def test_weights_that_are_only_pickles_are_refused_with_the_conversion_named(model_folder, load, name):
    (model_folder / "model.safetensors").rename(model_folder / name)
    with pytest.raises(ModelError) as caught:
        load(model_folder)
    assert name in caught.value.problems[0].problem
    assert "convert" in caught.value.problems[0].fix


def test_a_missing_an_unexpected_and_a_misshapen_weight_are_refused(model_folder, load):
    path = model_folder / "model.safetensors"
    whole = load_file(path)
    for change, words in (
        (lambda w: w.pop("model.norm.weight"), "`model.norm.weight` is missing"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(2)}), "`model.extra.weight` is in the files"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(31)}), "cannot be loaded|another shape"),
    ):
        weights = dict(whole)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            load(model_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_value_that_is_no_number_is_found(model_folder, load, value):
    weights = load_file(model_folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*not numbers"):
        load(model_folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        b"\x80\x04K\x01.",
        struct.pack("<Q", 5) + b"{bad}",
    ],
)
def test_a_weight_file_that_is_no_safetensors_is_refused(model_folder, load, content):
    (model_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load(model_folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", '{"model_type": "no-such-model"}', '{"model_type": 5}', "[" * 100_000]
)
def test_a_damaged_config_is_one_clear_error(model_folder, load, tiny_tokenizer, text):
    (model_folder / "config.json").write_text(text)
    with pytest.raises(ModelError):
        load(model_folder, tokenizer=tiny_tokenizer)


def test_weights_published_in_another_quantization_are_refused(model_folder, load):
    edit(model_folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized with `gptq`"):
        load(model_folder)


CANARY = "import pathlib; pathlib.Path({mark!r}).write_text('run')"


def plant_canaries(folder, mark):
    """Files that would leave a mark if any of them were run or unpickled."""
    code = CANARY.format(mark=str(mark))
    names = [
        "modeling_x.py",
        "configuration_x.py",
        "tokenization_x.py",
        "sitecustomize.py",
        "usercustomize.py",
        "conftest.py",
        "__init__.py",
        "torch.py",
    ]
    for name in names:
        (folder / name).write_text(code)
    body = b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR."  # a pickle that runs the code when it is loaded
    pickles = [
        "pytorch_model.bin",
        "adapter_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
        "rng_state.pth",
        "a.pkl",
        "b.mdl",
    ]
    for name in pickles:
        (folder / name).write_bytes(body)


def test_the_canary_itself_sings(tmp_path):
    plant_canaries(tmp_path, tmp_path / "mark")
    code = "import pickle, sys; pickle.loads(open('a.pkl', 'rb').read())"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "mark").read_text() == "run"


@pytest.mark.parametrize("damage", [None, "config", "weights", "adapter"])
def test_no_canary_fires_whatever_is_read_and_whatever_is_wrong(
    model_folder, load, lora, tmp_path, monkeypatch, damage
):
    mark, adapter = tmp_path / "mark", tmp_path / "adapter"
    adapter.mkdir()
    adapted, _ = attach_adapter(load(model_folder).model, lora(), seed=0)
    write_adapter(adapted, adapter)
    for folder in (model_folder, adapter):
        plant_canaries(folder, mark)
    monkeypatch.chdir(model_folder)
    if damage == "config":
        edit(
            model_folder / "config.json",
            auto_map={"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"},
            model_type="x",
        )
    elif damage == "weights":
        (model_folder / "model.safetensors").unlink()
    elif damage == "adapter":
        (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(LlmtuneError) if damage else contextlib.nullcontext():
        load_adapter(load(model_folder).model, adapter)
    assert not mark.exists()


def test_an_adapter_beside_a_model_is_not_joined_to_it_unasked(model_folder, load, tmp_path, monkeypatch):
    (tmp_path / "canary_library.py").write_text(CANARY.format(mark=str(tmp_path / "mark")))
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"parent_library": "canary_library", "base_model_class": "X"}
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "auto_mapping": mapping}
    (model_folder / "adapter_config.json").write_text(json.dumps(config))
    for trust in (False, True):
        with pytest.raises(ModelError, match="holds a model and an adapter"):
            load(model_folder, trust_remote_code=trust)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}}, "auto_mapping.*import"),
        ({"megatron_core": "evil.module", "megatron_config": {"a": 1}}, "megatron_core.*import"),
        ({"megatron_core": "evil.module"}, "megatron_core.*import"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"r": "8"}, "`r` cannot be"),
        ({"r": 0}, "`r` cannot be"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": [1]}, "target_modules"),
        ({"something_new": {"path": "x"}}, "something_new"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
    ],
)
def test_an_adapter_config_is_read_against_an_allow_list(tiny_model_folder, load, lora, tmp_path, change, words):
    adapted, _ = attach_adapter(load(tiny_model_folder).model, lora(), seed=0)
    write_adapter(adapted, tmp_path)
    edit(tmp_path / "adapter_config.json", **change)
    with pytest.raises(AdapterError, match=words) as caught:
        load_adapter(load(tiny_model_folder).model, tmp_path)
    assert caught.value.exit_code == 4


def test_an_adapter_that_is_only_a_pickle_is_refused_with_the_conversion_named(tiny_model_folder, load, lora, tmp_path):
    adapted, _ = attach_adapter(load(tiny_model_folder).model, lora(), seed=0)
    write_adapter(adapted, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, a format that can run code"):
        load_adapter(load(tiny_model_folder).model, tmp_path)
