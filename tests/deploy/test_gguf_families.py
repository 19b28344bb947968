"""Families whose weights stand otherwise in a GGUF file, or that need keys of their own.

Their logits and ids in llama.cpp itself: `python benchmarks/llama_cpp.py --families`.
"""

from __future__ import annotations

import json
import math

import gguf
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gguf_families import FAMILIES, write_family
from llmtune.deploy import gguf_architectures
from llmtune.deploy.export import export
from llmtune.errors import CheckpointError, ModelError
from llmtune.models.gguf import read_gguf
from llmtune.models.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the user asks and the assistant answers", "12 and 345 are numbers"] * 4, 280)


@pytest.fixture
def written(tmp_path, tokenizer):
    """Export a family; return the source's tensors, the file's, and the file's keys without the architecture."""

    def write(name, **options):
        base = write_family(name, tmp_path / name, tokenizer)
        export(str(base), tmp_path / f"{name}.gguf", **options)
        reader = GGUFReader(tmp_path / f"{name}.gguf")
        tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
        keys = {key.partition(".")[2]: field.contents() for key, field in reader.fields.items()}
        return load_file(base / "model.safetensors"), tensors, keys

    return write


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_read_back_as_its_source_rounded(tmp_path, tokenizer, name):
    base = write_family(name, tmp_path / "base", tokenizer)
    quantized = export(str(base), tmp_path / "q8.gguf", gguf_type="q8_0")
    assert quantized.difference.max_abs_logit <= 1e-5  # against the same weights, rounded in memory
    assert 0 < quantized.quantization.mean_kl < 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_n15_a_file_that_is_parsed_once_is_the_model_that_transformers_reads(tmp_path, tokenizer, name, monkeypatch):
    file = tmp_path / "whole.gguf"
    export(str(write_family(name, tmp_path / "base", tokenizer)), file)
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=str(file), dtype=torch.float32)
    opened = []
    read_fields = gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda *given: opened.append(1) or read_fields(*given))
    (tmp_path / "empty").mkdir()
    model, _ = read_gguf(file, tmp_path / "empty")
    assert len(opened) == 1
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert gguf.GGUFReader is GGUFReader  # the package is as it was


def test_gpt2_is_transposed_and_its_positions_are_never_quantized(written):
    source, file, keys = written("gpt2", gguf_type="q8_0")
    assert file["position_embd.weight"].dtype == torch.float32
    assert torch.equal(file["position_embd.weight"], source["transformer.wpe.weight"])
    assert (keys["feed_forward_length"], keys["attention.layer_norm_epsilon"]) == (256, pytest.approx(1e-5))


def test_matrices_of_gpt2_stand_with_outputs_first(written):
    source, file, _ = written("gpt2")
    for ours, theirs in (("attn.c_attn", "attn_qkv"), ("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down")):
        weight = source[f"transformer.h.1.{ours}.weight"]
        assert weight.shape[0] != weight.shape[1]
        assert torch.equal(file[f"blk.1.{theirs}.weight"], weight.t())


def test_norms_of_gemma_are_written_as_the_factors_they_are(written):
    source, file, keys = written("gemma3")
    for ours, theirs in (
        ("norm", "output_norm"),
        ("layers.0.self_attn.q_norm", "blk.0.attn_q_norm"),
        ("layers.0.pre_feedforward_layernorm", "blk.0.ffn_norm"),
        ("layers.6.post_attention_layernorm", "blk.6.post_attention_norm"),
    ):
        assert torch.equal(file[f"{theirs}.weight"], 1 + source[f"model.{ours}.weight"])
    assert (keys["attention.sliding_window"], keys["rope.freq_base"], keys["rope.freq_base_swa"]) == (8, 1e6, 1e4)


def test_multipliers_of_granite_are_in_the_file(written):
    keys = written("granite")[2]
    names = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    assert [keys[name] for name in names] == pytest.approx([0.3, 3.0, 0.4, 2.0])


def test_the_long_positions_of_phi_are_in_the_file(written):
    _, file, keys = written("phi3-longrope")
    assert file["rope_factors_long.weight"].tolist() == pytest.approx([2.0, 2.2, 2.4, 3.0, 4.0, 5.0, 6.0, 8.0])
    assert file["rope_factors_short.weight"].tolist() == pytest.approx([1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0])
    assert keys["rope.scaling.original_context_length"] == 256
    assert keys["rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(2) / math.log(256)))
    assert written("phi3")[2]["rope.dimension_count"] == 8


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "every fourth"),
        ("phi3", {"sliding_window": 100}, "a sliding window of attention below the context"),
        ("gemma3", {"query_pre_attn_scalar": 8}, "attention scaled by `8`"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping of `30.0`"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "every sixth"),
        ("gpt2", {"activation_function": "gelu"}, "activated by `gelu`"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled by its layer"),
        ("granite", {"mlp_bias": True, "attention_bias": True}, "biases in the feed-forward; biases in the attention"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(tmp_path, tokenizer, name, changes, reason):
    from transformers import AutoConfig

    write_family(name, tmp_path / "base", tokenizer)
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | changes
    kind = config.pop("model_type")
    with pytest.raises(ModelError, match=rf"(?s){reason}.*convert_hf_to_gguf"):
        gguf_architectures.refuse_unwritable(AutoConfig.for_model(kind, **config))


def test_a_weight_that_is_read_otherwise_than_it_was_written_is_seen(tmp_path, tokenizer, monkeypatch):
    table, row = gguf_architectures.ARCHITECTURES, gguf_architectures.ARCHITECTURES["granite"]
    broken = gguf_architectures.Layout(row.layout.write, lambda name, config, weight: weight)
    monkeypatch.setitem(
        table, "granite", gguf_architectures.GgufArchitecture(row.name, row.obstacles, broken, row.keys)
    )
    base = write_family("granite", tmp_path / "base", tokenizer)
    with pytest.raises(CheckpointError, match="what was written is not its source"):
        export(str(base), tmp_path / "out.gguf")
