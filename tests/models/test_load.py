"""What comes back from disk is exactly what was there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_flash_attn_2_available

from llmtune import durable
from llmtune.errors import ConfigError, ModelError
from llmtune.models.load import resize_for_tokenizer
from llmtune.models.parameters import checkpointable_blocks
from llmtune.models.weights import digest_tensors, inspect_weights, refuse_changed_weights


def test_the_weights_are_those_on_disk_bit_for_bit(tiny_model_folder, load):
    loaded, theirs = (
        load(tiny_model_folder).model.state_dict(),
        AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict(),
    )
    assert loaded.keys() == theirs.keys()
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs)


def test_loading_leaves_the_global_generator_alone_and_prints_nothing(tiny_model_folder, load, capfd):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load(tiny_model_folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("trained", "precision", "dtype", "expected"),
    [
        ("full", "fp32", "auto", torch.float32),
        ("full", "bf16", "auto", torch.float32),
        ("full", "fp16", "auto", torch.float32),
        ("adapter", "fp32", "auto", torch.float32),
        ("adapter", "bf16", "auto", torch.bfloat16),
        ("adapter", "fp16", "auto", torch.float16),
        ("adapter", "fp32", "bfloat16", torch.bfloat16),
        ("full", "bf16", "bfloat16", torch.bfloat16),
    ],
)
def test_frozen_weights_follow_the_arithmetic_and_trained_ones_are_float32_unless_named(
    tiny_model_folder, load, trained, precision, dtype, expected
):
    loaded = load(tiny_model_folder, trained=trained, precision=precision, dtype=dtype)
    assert {one.dtype for one in loaded.model.parameters()} == {expected}
    assert [one.key for one in loaded.decisions] == (["model.dtype"] if dtype == "auto" else [])


@pytest.mark.parametrize(
    ("stored", "trained", "precision", "held"),
    [
        (torch.bfloat16, "full", "fp32", torch.float32),
        (torch.float32, "adapter", "bf16", torch.bfloat16),
        (torch.float32, "full", "fp32", torch.float32),
    ],
)
def test_blocks_as_stored_stay_in_their_file_and_are_converted_to_the_same_bits(
    model_folder, load, stored, trained, precision, held
):
    """No copy of them is made before: all lie in the mapped file."""
    weights = load_file(model_folder / "model.safetensors")
    whole = {name: weight.to(stored) for name, weight in weights.items()}
    save_file(whole, model_folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(model_folder, trained=trained, precision=precision, blocks_as_stored=True)
    blocks = checkpointable_blocks(loaded.model)
    inside = [weight for block in blocks for weight in block.parameters()]
    assert len(inside) > 10
    assert {weight.dtype for weight in inside} == {stored}
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("model.safetensors")]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    assert all(any(low <= weight.data_ptr() < high for low, high in ranges) for weight in inside)
    assert loaded.blocks_dtype == loaded.model.config.dtype == held
    for block in blocks:
        block.to(loaded.blocks_dtype)
    as_ever = load(model_folder, trained=trained, precision=precision)
    assert as_ever.blocks_dtype is None
    expected, got = as_ever.model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert got[name].dtype == weight.dtype
        assert torch.equal(got[name], weight), name


def test_files_of_several_types_are_loaded_in_one(model_folder, load):
    """Else a weight that its file holds exactly could be rounded by way of another type."""
    weights = load_file(model_folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name] = weights[name].bfloat16()
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(model_folder, trained="full", blocks_as_stored=True)
    assert loaded.blocks_dtype is None
    assert {one.dtype for one in loaded.model.parameters()} == {torch.float32}


def test_a_weight_too_large_for_float16_is_kept_in_float32_or_refused_by_name(model_folder, load):
    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"][0] = 70_000.0
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert next(load(model_folder, precision="fp16").model.parameters()).dtype == torch.float32
    with pytest.raises(ModelError, match="a weight of 70000 does not fit float16"):
        load(model_folder, dtype="float16")


def test_the_digest_knows_every_bit_and_no_file_layout(model_folder, load, tmp_path):
    digest = load(model_folder).base_digest
    weights = load_file(model_folder / "model.safetensors")
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:5]}, tmp_path / "a.safetensors")
    save_file({name: weights[name] for name in names[5:]}, tmp_path / "b.safetensors", metadata={"other": "header"})
    assert inspect_weights([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]).digest == digest
    weights["model.norm.weight"].view(torch.int32)[3] ^= 1  # the lowest bit of one number
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert load(model_folder).base_digest != digest


def test_the_digest_is_sha256_over_name_type_shape_and_bytes():
    import hashlib

    expected = hashlib.sha256(
        b"a\0float32\0(2,)\0" + bytes.fromhex("0000803f00000040") + b"b\0int64\0()\0" + bytes([5] + [0] * 7)
    ).hexdigest()
    assert digest_tensors([("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor(5))]) == expected


def committed(folder):
    """Two weight files and a card, as a result of ours is written."""
    with durable.commit_folder(folder) as staging:
        durable.write_tensors(staging / "model-1.safetensors", {"a": torch.zeros(3)})
        durable.write_tensors(staging / "model-2.safetensors", {"b": torch.ones(3)})
        durable.write_text(staging / "README.md", "a card")
    return folder


def test_weights_that_are_not_as_they_were_committed_are_refused_by_name(tmp_path):
    """P5: a bit that safetensors reads without complaint; a card may be edited."""
    folder = committed(tmp_path / "final")
    (folder / "README.md").write_text("edited")
    refuse_changed_weights(folder)
    weights = bytearray((folder / "model-2.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model-2.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=r"`model-2.safetensors` was changed: its sha256 does not fit"):
        refuse_changed_weights(folder)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        refuse_changed_weights(folder)
    assert len(caught.value.problems) == 2


def test_a_damaged_manifest_of_ours_is_refused_whichever_bit_or_cut_it_was(tmp_path):
    """P5: it says no more what the weights were, so they are not taken for good."""
    folder = committed(tmp_path / "final")
    whole = (folder / "manifest.json").read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    cut = [whole[:length] for length in range(len(whole))]
    without_seal = [b"".join(line for line in whole.splitlines(keepends=True) if b"manifest_sha256" not in line)]
    for content in flipped + cut + without_seal:
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"manifest\.json (is not JSON|is not a manifest|was changed)"):
            refuse_changed_weights(folder)
    (folder / "manifest.json").write_bytes(whole)
    refuse_changed_weights(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"name": "an app"}',
        '{\n "name": "an app"\n}\n',
        "[]",
        "no JSON",
        '{"files": {"a": {"sha256": "00"}}}',
        "[" * 9_999,
    ],
)
def test_another_programs_manifest_says_nothing_about_weights(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    refuse_changed_weights(tmp_path)


def test_a_manifest_that_cannot_be_read_or_is_nested_beyond_reason_is_refused(tmp_path):
    """P5: neither a disk that does not give it back nor one built to exhaust its reader lets weights pass."""
    (tmp_path / "manifest.json").write_text(
        '{"files": {}, "manifest_sha256": "", "a": ' + '{"a": ' * 600 + "1" + "}" * 601
    )
    with pytest.raises(ModelError, match=r"manifest\.json (is not|was)"):
        refuse_changed_weights(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").symlink_to("manifest.json")
    with pytest.raises(ModelError, match="Too many levels of symbolic links"):
        refuse_changed_weights(tmp_path)


def test_weights_behind_links_as_a_hub_cache_keeps_them_are_compared_too(tmp_path):
    """P5: a model of ours that was published and fetched again."""
    folder = committed(tmp_path / "snapshot")
    for path in list(folder.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    refuse_changed_weights(folder)
    save_file({"a": torch.ones(3)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"`model-1.safetensors` (was changed|has \d+ bytes)"):
        refuse_changed_weights(folder)


def test_a_name_in_two_shards_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="`w` is in two files"):
        inspect_weights([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_new_tokens_get_rows_that_are_the_mean_of_the_old_ones(tiny_model_folder, load, tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([f"<new{index}>" for index in range(100)], special_tokens=True)
    size = len(tokenizer)
    assert size > 400, "the tiny model has 400 rows"
    loaded = load(tiny_model_folder, tokenizer=tokenizer)
    before = load(tiny_model_folder).model.get_input_embeddings().weight
    rows = loaded.model.get_input_embeddings().weight
    assert rows.shape == (size, 32)
    assert torch.equal(rows[:400], before)
    torch.testing.assert_close(rows[400:], before.mean(dim=0).expand(size - 400, -1))
    assert loaded.model.get_output_embeddings().weight is rows
    assert any(one.key == "embedding rows" for one in loaded.decisions)


def test_spare_rows_are_never_taken_away(tiny_model_folder, load, tiny_tokenizer):
    model = load(tiny_model_folder).model
    model.resize_token_embeddings(512, mean_resizing=False)
    assert resize_for_tokenizer(model, tiny_tokenizer) == []
    assert model.get_input_embeddings().weight.shape[0] == 512


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_base_cannot_be_trained_whole(tiny_model_folder, load, quantization):
    with pytest.raises(ConfigError, match=r"adapter\.method=lora"):
        load(tiny_model_folder, trained="full", quantization=quantization)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_is_the_one_that_runs(tiny_model_folder, load, attention):
    assert load(tiny_model_folder, attention=attention).model.config._attn_implementation == attention


@pytest.mark.skipif(is_flash_attn_2_available(), reason="the package is here, so transformers takes it")
def test_a_run_that_asked_for_flash_attention_loads_where_its_package_is_not(tiny_model_folder, load, tiny_tokenizer):
    for name in (tiny_model_folder, "custom-nano"):
        assert load(name, attention="flash", tokenizer=tiny_tokenizer).model.config._attn_implementation == "sdpa"


def test_a_padding_token_that_also_ends_turns_is_trained_like_any_other(model_folder, load, tiny_tokenizer):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 2, "tie_word_embeddings": False}))
    weights = load_file(model_folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    model = load(model_folder, trained="full").model
    ids = torch.tensor([[5, 2, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0
