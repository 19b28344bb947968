"""N8 for exports: what other programs take is the model it was made from, in a folder or in one GGUF file, or it does
not exist.
"""

import json
import os
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.deploy import export as exporting
from llmtune.deploy.export import export
from llmtune.deploy.gguf_vocabulary import HOSTILE_TEXTS
from llmtune.durable.files import part_name
from llmtune.errors import CheckpointError, ModelError, TokenizerError, UsageError
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.models.gguf import read_gguf
from llmtune.models.tokenizer_training import train_tokenizer

ROWS = 290
TEXTS = ["the user asks and the assistant answers", "12 and 345 are numbers", "naïve 日本 🙂"] * 4


@pytest.fixture
def trained(tmp_path, make):
    """A base whose tokenizer is one of ours: digits one by one, ChatML."""
    make.tokenizer = train_tokenizer(TEXTS, ROWS, min_frequency=1)
    return make


def logits(folder, ids, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "command", [lambda run, out: export(str(run), out), lambda run, _out: load_inference_model(str(run))]
)
def test_a_run_that_has_saved_nothing_yet_is_refused_as_that(tmp_path, command):
    """It is a run, so its name is not looked up among the models."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text("run: {name: run}\n")
    with pytest.raises(ModelError, match="has saved nothing yet"):
        command(run, tmp_path / "out")


@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_what_a_killed_export_left_is_swept_and_said(trained, tmp_path, output):
    dead = tmp_path / part_name().replace(f"-{os.getpid()}-", "-999999999-")
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    said = []
    export(str(trained.base()), tmp_path / output, print_line=said.append)
    assert not dead.exists()
    assert f"removed what an interrupted save left: {dead}" in said


def everything(rows):
    return (torch.arange(-(-rows // 50) * 50) % rows).view(-1, 50)


def read_back(path, tmp_path):
    """The file as plain transformers reads it, and its tokenizer."""
    nothing = tmp_path / "nothing"
    nothing.mkdir(exist_ok=True)
    return logits(nothing, everything(ROWS), gguf_file=str(path)), read_gguf(path, nothing)[1]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("to_file", [False, True], ids=["folder", "gguf"])
def test_a_whole_model_gives_the_same_logits_in_plain_transformers(trained, tmp_path, to_file, tied):
    base = trained.base(tied=tied)
    output = tmp_path / ("out.gguf" if to_file else "out")
    report = export(str(base), output)
    assert report.difference.max_abs_logit <= 1e-5
    ids = everything(ROWS)
    written = read_back(output, tmp_path)[0] if to_file else logits(output, ids)
    assert torch.equal(written, logits(base, ids))


@pytest.mark.parametrize("to_file", [False, True], ids=["folder", "gguf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_is_the_nearest_of_its_type_and_the_logits_stay_within_a_thousandth_of_a_nat(
    trained, tmp_path, to_file, dtype
):
    base = trained.base()
    output = tmp_path / ("out.gguf" if to_file else "out")
    report = export(str(base), output, dtype=dtype)
    assert 0 < report.difference.mean_kl <= 1e-3
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    where = {"pretrained_model_name_or_path": output} if not to_file else {"gguf_file": str(output)}
    (tmp_path / "nothing").mkdir()
    where.setdefault("pretrained_model_name_or_path", tmp_path / "nothing")
    written = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
    for name, weight in source.items():
        exact = weight if to_file and weight.ndim == 1 else weight.to(getattr(torch, dtype)).float()
        assert torch.equal(written[name], exact), name
    if not to_file:
        assert json.loads((output / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_queries_and_keys_stand_as_llama_cpp_rotates_them(trained, tmp_path, heads):
    """Read without any library: row r of head h in the file is row r/2 of the first half, or of the second where r is
    odd.
    """
    from gguf import GGUFReader
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "vocab_size": ROWS,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(
        **shape, num_attention_heads=heads[0], num_key_value_heads=heads[1], bos_token_id=None, eos_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    trained.tokenizer.save_pretrained(tmp_path / "base")
    export(str(tmp_path / "base"), tmp_path / "out.gguf")
    stored = {one.name: torch.from_numpy(one.data.copy()) for one in GGUFReader(tmp_path / "out.gguf").tensors}
    source = load_file(tmp_path / "base" / "model.safetensors")
    for name, count in (("q", heads[0]), ("k", heads[1])):
        ours = source[f"model.layers.0.self_attn.{name}_proj.weight"]
        for head in range(count):
            for row in range(8):
                assert torch.equal(
                    stored[f"blk.0.attn_{name}.weight"][8 * head + row], ours[8 * head + row // 2 + 4 * (row % 2)]
                )
    assert torch.equal(stored["blk.0.attn_v.weight"], source["model.layers.0.self_attn.v_proj.weight"])


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_other_architectures_of_the_table_go_through_a_file_too(trained, tmp_path, kind):
    from transformers import AutoConfig

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": ROWS,
        "max_position_embeddings": 64,
    }
    shape |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "sliding_window": None,
    }
    shape |= {"head_dim": 128} if kind == "qwen3" else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    trained.tokenizer.save_pretrained(tmp_path / "base")
    assert export(str(tmp_path / "base"), tmp_path / "out.gguf").difference.max_abs_logit <= 1e-5
    assert torch.equal(read_back(tmp_path / "out.gguf", tmp_path)[0], logits(tmp_path / "base", everything(ROWS)))


def test_the_tokenizer_in_the_file_gives_the_same_ids_ends_and_template(trained, tmp_path):
    base = trained.base()
    export(str(base), tmp_path / "out.gguf")
    source, written = AutoTokenizer.from_pretrained(base), read_back(tmp_path / "out.gguf", tmp_path)[1]
    for text in (*HOSTILE_TEXTS, *TEXTS):
        assert written.encode(text, add_special_tokens=False) == source.encode(text, add_special_tokens=False), text
    assert (written.eos_token_id, written.pad_token_id) == (source.eos_token_id, source.pad_token_id)
    assert written.chat_template == source.chat_template


@pytest.mark.parametrize("to_file", [False, True], ids=["folder", "gguf"])
def test_an_adapter_is_merged_on_the_way(trained, tmp_path, to_file):
    from peft import PeftModel

    base = trained.base()
    adapter = trained.adapter(base)
    output = tmp_path / ("out.gguf" if to_file else "out")
    export(str(adapter), output, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for a deprecated name
        tuned = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
        ).eval()
    with torch.no_grad():
        expected = tuned(input_ids=everything(ROWS)).logits
    written = read_back(output, tmp_path)[0] if to_file else logits(output, everything(ROWS))
    torch.testing.assert_close(written, expected, rtol=0, atol=1e-5)
    assert float((written - logits(base, everything(ROWS))).abs().max()) > 1e-2
    assert {one.name for one in tmp_path.iterdir()} <= {"base-1", "adapter-2", output.name, "nothing"}


def test_a_run_is_found_by_its_name_and_its_final_model_taken(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    final = tmp_path / "runs" / "mine" / "checkpoints" / "final"
    final.parent.mkdir(parents=True)
    trained.base().rename(final)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("model: {name: custom-nano}\n")
    assert export("mine", tmp_path / "out").source.endswith("final")


def test_a_gguf_file_is_a_source_too(trained, tmp_path):
    base = trained.base()
    export(str(base), tmp_path / "one.gguf")
    export(str(tmp_path / "one.gguf"), tmp_path / "two.gguf")
    assert torch.equal(read_back(tmp_path / "one.gguf", tmp_path)[0], read_back(tmp_path / "two.gguf", tmp_path)[0])


def refused(error, words, source, output, **options):
    """Try, and see that nothing was left, whatever the words."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error, match=words):
        export(str(source), output, **options)
    assert sorted(output.parent.iterdir()) == before


def test_what_a_gguf_file_cannot_say_is_refused_with_the_way_out(trained, tmp_path):
    (tmp_path / "o").mkdir()
    output = tmp_path / "o" / "out.gguf"
    base = trained.base()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "olmo"}))
    refused(ModelError, r"(?s)`olmo` is not written as GGUF.*export as safetensors.*convert_hf_to_gguf", base, output)
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    refused(ModelError, "a feed-forward activated by `gelu`", base, output)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu", "rope_parameters": rope}))
    refused(ModelError, "type `linear`.*; a feed-forward activated", base, output)


def test_a_tokenizer_that_llama_cpp_cannot_split_like_is_refused(trained, tmp_path):
    from tokenizers import pre_tokenizers

    (tmp_path / "o").mkdir()
    trained.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    refused(
        TokenizerError,
        "splits text in a way that llama.cpp has no name for",
        trained.base(),
        tmp_path / "o" / "out.gguf",
    )


def test_a_tokenizer_of_bytes_alone_is_refused_before_anything_is_written(tmp_path, make):
    make.tokenizer = train_tokenizer(["7 8 9"], 300)
    assert json.loads(make.tokenizer.backend_tokenizer.to_str())["model"]["merges"] == []
    (tmp_path / "o").mkdir()
    refused(TokenizerError, "has no merges, only bytes and control tokens", make.base(), tmp_path / "o" / "out.gguf")


def test_a_special_token_that_a_file_cannot_carry_is_refused(trained, tmp_path):
    (tmp_path / "o").mkdir()
    trained.tokenizer.add_special_tokens({"additional_special_tokens": ["<wörter und zahlen 🙂>"]})
    base = trained.base()
    refused(TokenizerError, "does not survive", base, tmp_path / "o" / "out.gguf")


def test_an_output_that_exists_or_contradicts_the_format_is_refused(trained, tmp_path):
    base = trained.base()
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="already exists"):
        export(str(base), tmp_path / "taken.gguf")
    assert (tmp_path / "taken.gguf").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="--to safetensors does not go with"):
        export(str(base), tmp_path / "x.gguf", file_format="safetensors")
    with pytest.raises(UsageError, match=r"(?s)--to gguf does not go with.*ends in \.gguf"):
        export(str(base), tmp_path / "x", file_format="gguf")
    with pytest.raises(UsageError, match="--base is for adapters"):
        export(str(base), tmp_path / "x", base=str(base))
    with pytest.raises(ModelError, match="`custom-nano` is built from scratch and stored nowhere"):
        export("custom-nano", tmp_path / "x")


def test_weights_that_do_not_fit_float16_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    base = trained.base()
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "o").mkdir()
    for output in (tmp_path / "o" / "x", tmp_path / "o" / "x.gguf"):
        refused(ModelError, "do not fit float16", base, output, dtype="float16")


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_result_beyond_the_tolerance_does_not_exist(trained, tmp_path, monkeypatch, name):
    """A mutant of the arithmetic: a hundredth of one row is lost on the way to the file."""
    (tmp_path / "o").mkdir()
    base = trained.base()
    rounded = exporting.ModelFolder.rounded

    def lossy(self, weight, asked):
        tensor = rounded(self, weight, asked).clone()
        if weight == "model.layers.1.mlp.down_proj.weight":
            tensor[0] *= 0.99
        return tensor

    monkeypatch.setattr(exporting.ModelFolder, "rounded", lossy)
    refused(CheckpointError, "what was written is not its source", base, tmp_path / "o" / name)


def test_the_folder_holds_all_that_is_needed_to_use_it(trained, tmp_path):
    from transformers import GenerationConfig

    export(str(trained.base()), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",  # noqa: E501
        "README.md", "export_report.json", "manifest.json",
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
