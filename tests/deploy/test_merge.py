"""N8: the merged model is the tuned one, on every shape of adapter and base."""

import json
import warnings

import pytest
import torch

from llmtune.config.schema import Config
from llmtune.deploy.merge import merge_lora
from llmtune.engine.forward import build_engine
from llmtune.engine.precision import Precision
from llmtune.errors import AdapterError, UsageError
from llmtune.evaluation.inference_model import load_inference_model

LINEAR = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "one layer by pattern": {"target_modules": r"model\.layers\.1\.mlp\.down_proj"},
    "embedding": {"target_modules": ("embed_tokens", "q_proj")},
    "norm": {"target_modules": ("q_proj",), "modules_to_save": ("input_layernorm",)},
    "whole head": {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
    "whole embedding": {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",)},
    "rows of tokens": {"target_modules": ("q_proj",), "train_tokens": ("<|im_end|>",)},
    "new tokens": {"target_modules": ("q_proj",), "train_tokens": ("<|new|>", "<|newer|>", "<|im_start|>")},
}


def independent_logits(folder, ids, adapter=None):
    """Load with transformers and peft alone; llmtune has no part in it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        old, rows = model.get_input_embeddings().weight.shape[0], len(AutoTokenizer.from_pretrained(adapter))
        if rows > old:
            model.resize_token_embeddings(rows, mean_resizing=False)
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
                layer.weight.data[old:] = layer.weight.data[:old].mean(0)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # peft asks transformers for a deprecated name, and has opinions on tied weights
            model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def everything(folder):
    """Return every token of a merged model's vocabulary once, int64 [rows, 50]; the last row is filled up from the
    first tokens.
    """
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    return (torch.arange(-(-rows // 50) * 50) % rows).view(-1, 50)


def largest_difference(base, adapter, merged):
    """Compare base + adapter with the merged model, by libraries alone, on every token."""
    ids = everything(merged)
    return float((independent_logits(base, ids, adapter) - independent_logits(merged, ids)).abs().max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", LINEAR)
def test_the_merged_model_has_the_logits_of_base_and_adapter(make, shape, tied):
    base = make.base(tied=tied)
    adapter = make.adapter(base, **LINEAR[shape])
    merged = make.path("merged")
    report = merge_lora(adapter, merged, dtype="float32")
    assert report.difference.max_abs_logit <= 1e-5
    assert largest_difference(base, adapter, merged) <= 1e-5
    assert report.weights_changed > 0


@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"target_modules": ("c_attn", "wte")}], ids=["lora", "dora", "embedding"]
)
def test_a_model_whose_weights_are_stored_the_other_way_round_merges_too(make, options):
    """GPT-2's Conv1D keeps [in, out]."""
    base = make.base(kind="gpt2")
    adapter = make.adapter(base, **options)
    merged = make.path("merged")
    merge_lora(adapter, merged, dtype="float32")
    assert largest_difference(base, adapter, merged) <= 1e-5


def test_files_that_name_weights_without_the_models_prefix_merge_too(make):
    from safetensors.torch import load_file, save_file

    base = make.base(kind="gpt2")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): one for name, one in tensors.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    adapter = make.adapter(base)
    merged = make.path("merged")
    merge_lora(adapter, merged, dtype="float32")
    assert largest_difference(base, adapter, merged) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_rounded_to_sixteen_bits_stays_within_a_thousandth_of_a_nat(make, dtype):
    adapter = make.adapter(make.base())
    merged = make.path("merged")
    report = merge_lora(adapter, merged, dtype=dtype)
    assert 0 < report.difference.mean_kl <= 1e-3
    assert json.loads((merged / "config.json").read_text())["dtype"] == dtype


def test_each_weight_keeps_its_stored_type_when_none_is_asked_for(make):
    from safetensors.torch import load_file

    base = make.base(dtype=torch.bfloat16)
    merged = make.path("merged")
    merge_lora(make.adapter(base), merged)
    assert {one.dtype for one in load_file(merged / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_of_a_4bit_base_merges_into_that_base_dequantized(make, kind, precision):
    """The very 4-bit model, loaded as in training, is the judge: its own arithmetic differs from float32 by its compute
    type only.
    """
    from llmtune.adapters.load import load_adapter
    from llmtune.config.schema import ModelConfig
    from llmtune.models.catalog import resolve
    from llmtune.models.load import load_model

    base = make.base(kind=kind)
    adapter = make.adapter(base, quantization="4bit", precision=precision)
    merged = make.path("merged")
    report = merge_lora(adapter, merged, dtype="float32")
    assert report.difference.max_abs_logit <= 1e-5
    assert report.merged_into == "the 4bit base it was trained on, dequantized"
    config = ModelConfig(name=str(base), quantization="4bit")
    loaded = load_model(
        resolve(str(base)),
        config,
        tokenizer=make.tokenizer,
        device=torch.device("cpu"),
        trained="adapter",
        precision=precision,
        seed=0,
    )
    trained = load_adapter(loaded.model, adapter)
    with torch.no_grad():
        theirs = trained.eval()(input_ids=everything(merged)).logits.float()
    ours = independent_logits(merged, everything(merged))
    tolerance = 1e-4 if precision == "fp32" else 0.1
    assert float((theirs - ours).abs().max()) <= tolerance
    assert float((independent_logits(base, everything(merged), adapter) - ours).abs().max()) > 2 * float(
        (theirs - ours).abs().max()
    )


@pytest.mark.parametrize("is_measured", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_a_4bit_base_answers_and_is_measured_as_its_merge_is(make, kind, precision, is_measured):
    """Commands compute in float32 on a CPU, also with weights that training multiplied in bfloat16."""
    base = make.base(kind=kind)
    adapter = make.adapter(base, quantization="4bit", precision=precision)
    merged = make.path("merged")
    merge_lora(adapter, merged, dtype="float32")
    run = load_inference_model(str(adapter), no_cuda=True)
    if is_measured:  # with fused LoRA layers
        device = torch.device("cpu")
        build_engine(run.model, config=Config(), device=device, precision=Precision("fp32", device))
    with torch.no_grad():
        theirs = run.model(input_ids=everything(merged)).logits
    assert theirs.dtype == torch.float32
    assert float((theirs - independent_logits(merged, everything(merged))).abs().max()) <= 1e-5


def test_an_adapter_of_a_4bit_base_merges_into_the_unquantized_one_when_named_and_both_are_compared(make):
    base = make.base()
    adapter = make.adapter(base, quantization="4bit")
    merged = make.path("merged")
    report = merge_lora(adapter, merged, base=str(base), dtype="float32")
    assert report.merged_into == "the base"
    assert largest_difference(base, adapter, merged) <= 1e-5
    assert report.difference.max_abs_logit <= 1e-5
    assert report.other_base is not None
    assert report.other_base.max_abs_logit > 1e-3


def test_an_adapter_of_an_8bit_base_merges_into_that_base_dequantized(make):
    report = merge_lora(make.adapter(make.base(), quantization="8bit"), make.path("merged"), dtype="float32")
    assert report.difference.max_abs_logit <= 1e-5
    assert report.other_base is not None


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(make):
    adapter = make.adapter(make.base())
    other = make.base(seed=7)
    merged = make.path("merged")
    with pytest.raises(AdapterError, match="trained on other weights"):
        merge_lora(adapter, merged, base=str(other))
    assert not merged.exists()


def test_an_adapter_of_another_shape_is_refused_by_name(make):
    adapter = make.adapter(make.base())
    (adapter / "adapter_base.json").unlink()
    with pytest.raises(AdapterError, match="does not fit this base"):
        merge_lora(adapter, make.path("merged"), base=str(make.base(kind="gpt2")))


def test_an_output_that_exists_is_left_alone(make):
    adapter = make.adapter(make.base())
    taken = make.path("merged")
    taken.mkdir()
    with pytest.raises(UsageError, match="already exists"):
        merge_lora(adapter, taken)
    assert list(taken.iterdir()) == []


def test_a_folder_without_an_adapter_is_explained(make):
    base = make.base()
    with pytest.raises(AdapterError, match="is a whole model"):
        merge_lora(base, make.path("merged"))
    with pytest.raises(AdapterError, match="there is no folder"):
        merge_lora(make.folder / "nowhere", make.path("merged"))


def test_the_output_holds_all_that_is_needed_to_use_it(make):
    from transformers import AutoTokenizer, GenerationConfig

    merged = make.path("merged")
    report = merge_lora(make.adapter(make.base(), train_tokens=("<|new|>",)), merged)
    assert {path.name for path in merged.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", "merge_report.json", "manifest.json",  # noqa: E501
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template
    assert "<|new|>" in tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(merged).eos_token_id == 2
    written = json.loads((merged / "merge_report.json").read_text())
    assert written["difference"]["max_abs_logit"] == report.difference.max_abs_logit
    assert written["entries_unchanged_by_rounding"] <= written["entries_changed"]


def test_a_run_is_merged_from_what_it_produced(make):
    adapter = make.adapter(make.base())
    run = make.path("run")
    (run / "checkpoints").mkdir(parents=True)
    adapter.rename(run / "checkpoints" / "final")
    assert merge_lora(run, make.path("merged")).adapter.endswith("final")


def test_shards_are_cut_at_the_given_size_and_load_together(make, monkeypatch):
    monkeypatch.setattr("llmtune.deploy.model_files.MAX_SHARD_BYTES", 30_000)
    base = make.base(tied=False)
    adapter, merged = make.adapter(base), make.path("merged")
    merge_lora(adapter, merged, dtype="float32")
    assert len(list(merged.glob("model-*-of-*.safetensors"))) > 2
    assert largest_difference(base, adapter, merged) <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_that_training_added_and_left_frozen_are_merged_as_training_had_them(make, tmp_path, precision):
    """Of an adapter whose tokenizer has more tokens than its base has rows, and that trains none of them."""
    base = make.base()
    grown = type(make.tokenizer).from_pretrained(base)
    grown.add_tokens(["<one>", "<two>"], special_tokens=True)
    grown.save_pretrained(base)
    report = merge_lora(make.adapter(base, precision=precision, target_modules=("q_proj",)), tmp_path / "merged")
    assert "2 embedding rows are added" in report.notes[0]
