"""Quantized GGUF files: written by the official quantizers, read back, and their cost measured."""

import json
import math

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, quants
from transformers import AutoModelForCausalLM

from llmtune.cli.main import main
from llmtune.deploy import export as exporting
from llmtune.deploy.export import export
from llmtune.errors import CheckpointError, UsageError
from llmtune.models.tokenizer_training import train_tokenizer

TEXTS = ["the user asks and the assistant answers", "12 and 345 are numbers"] * 4


@pytest.fixture
def trained(make):
    make.tokenizer = train_tokenizer(TEXTS, 280, min_frequency=1)
    return make


@pytest.mark.parametrize(
    ("name", "bits"), [("q8_0", 8.5), ("q5_1", 6), ("q5_0", 5.5), ("q4_1", 5), ("q4_0", 4.5), ("mxfp4", 4.25)]
)
def test_every_matrix_holds_what_the_official_quantizer_makes_of_it(trained, tmp_path, name, bits):
    base = trained.base()
    report = export(str(base), tmp_path / "out.gguf", gguf_type=name)
    assert report.dtype == name
    assert report.difference.max_abs_logit <= 1e-5  # against the same weights, rounded in memory
    assert report.quantization.mean_kl > 0
    assert report.notes == ["15 matrices are in " + name + ", 5 vectors in f32"]
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    reader = GGUFReader(tmp_path / "out.gguf")
    stored = {one.name: one for one in reader.tensors}
    kind = GGMLQuantizationType[name.upper()]
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down")):
        tensor, weight = stored[f"{theirs}.weight"], source[f"model.{ours}.weight"]
        assert tensor.tensor_type == kind
        assert tensor.n_bytes == weight.numel() * bits / 8
        assert (tensor.data == quants.quantize(weight.numpy(), kind)).all()
    assert torch.equal(torch.tensor(stored["output_norm.weight"].data.copy()), source["model.norm.weight"])
    file_type = LlamaFileType[f"MOSTLY_{name.upper()}" + ("_MOE" if name == "mxfp4" else "")]  # its only name there
    assert reader.fields["general.file_type"].parts[-1][0] == file_type
    assert reader.fields["general.quantization_version"].parts[-1][0] == 2


def test_more_bits_cost_less(trained, tmp_path):
    base = trained.base()
    fine, coarse = (
        export(str(base), tmp_path / f"{name}.gguf", gguf_type=name).quantization.mean_kl for name in ("q8_0", "q4_0")
    )
    assert coarse > 10 * fine


def test_plain_types_are_those_of_dtype(trained, tmp_path):
    base = trained.base()
    for name, dtype in (("f16", "float16"), ("bf16", "bfloat16")):
        report = export(str(base), tmp_path / name / "out.gguf", gguf_type=name)
        export(str(base), tmp_path / dtype / "out.gguf", dtype=dtype)
        assert (report.dtype, report.quantization) == (dtype, None)
        assert (tmp_path / name / "out.gguf").read_bytes() == (tmp_path / dtype / "out.gguf").read_bytes()


def test_a_matrix_whose_rows_do_not_fit_the_blocks_stays_in_float16_and_is_named(trained, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 280}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(tmp_path / "base")
    trained.tokenizer.save_pretrained(tmp_path / "base")
    report = export(str(tmp_path / "base"), tmp_path / "out.gguf", gguf_type="q4_0")
    assert report.notes[0].endswith(
        "1 matrices in f16, because their rows are no multiple of 32: model.layers.0.mlp.down_proj.weight"
    )
    types = {one.name: one.tensor_type.name for one in GGUFReader(tmp_path / "out.gguf").tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_a_wrong_number_in_a_quantized_file_is_seen_however_coarse_the_type(trained, tmp_path, monkeypatch):
    base = trained.base()
    rounded = exporting.ModelFolder.rounded

    def lossy(self, weight, asked):
        tensor = rounded(self, weight, asked).clone()
        if weight == "model.layers.1.mlp.down_proj.weight":
            tensor[0] *= 0.99
        return tensor

    monkeypatch.setattr(exporting.ModelFolder, "rounded", lossy)
    with pytest.raises(CheckpointError, match="what was written is not its source"):
        export(str(base), tmp_path / "out.gguf", gguf_type="q4_0")
    assert not (tmp_path / "out.gguf").exists()


def test_a_type_that_contradicts_the_output_or_the_dtype_is_refused(trained, tmp_path):
    base = str(trained.base())
    with pytest.raises(UsageError, match=r"--type q8_0 is a type of GGUF files, and `.*out` is a folder"):
        export(base, tmp_path / "out", gguf_type="q8_0")
    with pytest.raises(UsageError, match="--type q8_0 and --dtype float16 both name the type"):
        export(base, tmp_path / "out.gguf", gguf_type="q8_0", dtype="float16")


def test_a_base_that_only_the_option_names_is_exported_and_the_perplexity_said_to_be_unmeasured(
    trained, tmp_path, capsys
):
    base = trained.base()
    adapter = trained.adapter(base)
    moved = base.rename(tmp_path / "moved")
    code, _, err = run_command(capsys, "export", adapter, "--base", moved, "--type", "q8_0", "-o", tmp_path / "a.gguf")
    assert code == 0, err
    assert "the perplexity is not measured: " in err


def run_command(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_the_perplexity_of_the_file_stands_beside_that_of_its_source(trained, tmp_path, capsys):
    """The same figures as `evaluate` prints of the model and of the file."""
    base, rows, file = trained.base(), tmp_path / "rows.jsonl", tmp_path / "out.gguf"
    turns = [{"role": "user", "content": "the user asks"}, {"role": "assistant", "content": "12 and 345 are numbers"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns + turns}) + "\n")
    code, out, err = run_command(capsys, "export", base, "--type", "q4_0", "--data", rows, "-o", file)
    assert (code, out) == (0, f"{file}\n"), err
    perplexities = [
        json.loads(run_command(capsys, "evaluate", model, "--data", rows, "--json", "--no-cuda")[1])["eval_perplexity"]
        for model in (base, file)
    ]
    assert not math.isclose(*perplexities, rel_tol=1e-4)
    before, after = perplexities
    assert (
        f"perplexity of 2 held-out rows: {before:.5g} unquantized, {after:.5g} as q4_0 "
        f"({100 * (after / before - 1):+.2f} %)" in err
    )


def test_without_held_out_rows_the_command_says_that_nothing_was_measured(trained, tmp_path, capsys):
    base = trained.base()
    code, _, err = run_command(capsys, "export", base, "--type", "q8_0", "-o", tmp_path / "out.gguf")
    assert code == 0, err
    assert "the perplexity is not measured: no rows are named; name rows with --data FILE" in err
    code, _, err = run_command(capsys, "export", base, "--data", "x.jsonl", "-o", tmp_path / "f.gguf")
    assert code == 2
    assert "--data names rows to measure a quantized file on" in err
