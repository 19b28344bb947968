"""An adapter in a GGUF file is what llama.cpp adds to the base's file: W + alpha / r B A, in the order of that file.

Its logits in llama.cpp itself: `python benchmarks/llama_cpp.py --families`.
"""

from __future__ import annotations

import pytest
import torch
from gguf import GGUFReader

from llmtune.deploy import gguf_adapter
from llmtune.deploy.export import export
from llmtune.deploy.gguf_adapter import export_adapter
from llmtune.errors import AdapterError, CheckpointError, UsageError


def read(path):
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return {one.name: torch.from_numpy(one.data.copy()).double() for one in reader.tensors}, keys


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("llama", {"rslora": True, "alpha_pattern": {"q_proj": 3.0}}), ("gpt2", {})],
    ids=str,
)
def test_base_and_adapter_are_the_merged_file(make, tmp_path, kind, options):
    from llmtune.models.tokenizer_training import train_tokenizer

    make.tokenizer = train_tokenizer(["the user asks and the assistant answers"] * 4, 290)
    base = make.base(kind=kind)
    adapter = make.adapter(base, **options)
    lines = export_adapter(adapter, tmp_path / "a.gguf")
    assert lines[-1] == f"llama-server -m base.gguf --lora {tmp_path / 'a.gguf'}  # llama.cpp"
    export(str(base), tmp_path / "base.gguf")
    export(str(adapter), tmp_path / "merged.gguf", dtype="float32")
    (lora, keys), (weights, _), (merged, _) = (read(tmp_path / f"{name}.gguf") for name in ("a", "base", "merged"))
    assert (keys["general.type"], keys["adapter.type"], keys["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)
    changed = 0
    for name, weight in weights.items():
        if f"{name}.lora_a" in lora:
            a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
            weight, changed = weight + keys["adapter.lora.alpha"] / len(a) * b @ a, changed + 1
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)
    assert changed == len(lora) // 2 > 0


@pytest.mark.parametrize("options", [{"dora": True}, {"modules_to_save": ("lm_head",)}], ids=str)
def test_what_the_file_has_no_place_for_is_refused_with_the_way_out(make, tmp_path, options):
    adapter = make.adapter(make.base(tied=False), **options)
    with pytest.raises(AdapterError, match=r"(?s)has no place for what the adapter does to.*leave --adapter-only out"):
        export_adapter(adapter, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_output_that_is_no_new_file_is_refused(make, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"mine")
    for name, words in (("a", "no file to make"), ("a.gguf", "already exists")):
        with pytest.raises(UsageError, match=words):
            export_adapter(tmp_path, tmp_path / name)


def test_a_file_with_other_numbers_does_not_get_its_name(make, tmp_path, monkeypatch):
    write = gguf_adapter._write

    def broken(path, architecture, name, alpha, tensors):
        write(path, architecture, name, alpha, {key: value * 0.99 for key, value in tensors.items()})

    monkeypatch.setattr(gguf_adapter, "_write", broken)
    with pytest.raises(CheckpointError, match="what was written is not the adapter"):
        export_adapter(make.adapter(make.base()), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
