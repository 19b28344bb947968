"""`model.train_only`: full tuning that moves some parameters and no bit of the others."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.deploy.export import export
from llmtune.errors import ConfigError, ModelError
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.models.parameters import freeze_all_but, trained_parameters
from llmtune.plan import forecast
from llmtune.plan.forecast import Forecaster
from llmtune.plan.hardware import find_target
from llmtune.prepare import prepare
from llmtune.training import train as training
from training_helpers import lines_of, weights_of

FAST = ("training.max_steps=4", "evaluation.every_steps=null", "data.test_size=0", "checkpoint.every_steps=2")
LAST = r"model.train_only=['model\.layers\.1\..*','model\.norm\.weight']"


def test_only_the_named_parameters_move_and_the_result_is_a_whole_model(config_of, tiny_model_folder):
    run = training.train(config_of(*FAST, LAST)).folder
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(run / "checkpoints" / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers.1." in name or name == "model.norm.weight"}


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_the_loss_is_that_of_torch_with_the_others_frozen(engine, config_of, tiny_model_folder):
    """The fast paths against the library's own forward: the same losses, step by step."""
    lines = lines_of(training.train(config_of(*FAST, LAST, f"training.engine={engine}", name=engine)).folder)
    whole = lines_of(training.train(config_of(*FAST, LAST, "training.engine=plain", name="plain-too")).folder)
    losses, expected = (
        [line["train_mean_nll"] for line in each if "train_mean_nll" in line] for each in (lines, whole)
    )
    assert losses == pytest.approx(expected, abs=1e-5)


def test_it_resumes_to_the_same_bytes(config_of):
    whole = training.train(config_of(*FAST, LAST, name="whole")).folder
    part = training.train(config_of(*FAST, LAST, "training.max_steps=2", "training.lr_schedule=constant", name="part"))
    same = training.train(config_of(*FAST, LAST, "training.lr_schedule=constant", name="same")).folder
    training.resume(str(part.folder), overrides=["training.max_steps=4"], allow_changes=True)
    assert weights_of(part.folder) == weights_of(same) != weights_of(whole)


def test_a_run_that_has_checkpoints_only_answers_with_the_base_s_other_weights(config_of, tmp_path):
    run = training.train(config_of(*FAST, LAST)).folder
    final = load_inference_model(str(run), no_cuda=True).model.state_dict()
    shutil.rmtree(run / "checkpoints" / "final")
    stopped = load_inference_model(str(run), no_cuda=True)
    assert stopped.description.endswith("step-000004")
    assert all(torch.equal(tensor, final[name]) for name, tensor in stopped.model.state_dict().items())
    earlier = load_inference_model(str(run), checkpoint="2", no_cuda=True).model.state_dict()
    moved = {name for name in final if not torch.equal(earlier[name], final[name])}
    assert moved
    assert all(".layers.1." in name or name == "model.norm.weight" for name in moved)
    with pytest.raises(ModelError, match="holds the trained weights alone") as refused:
        export(str(run), tmp_path / "exported")
    assert "llmtune resume" in refused.value.problems[0].fix


def test_a_pattern_of_a_tied_head_is_one_of_the_embedding(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    decision = freeze_all_but(model, ["lm_head.*"])
    assert list(trained_parameters(model)) == ["model.embed_tokens.weight"]
    assert decision.reason.startswith("12,800 of ")


@pytest.mark.parametrize(
    ("pattern", "says", "fix"),
    [
        ("layers.1", "matches no parameter", "did you mean 'model.train_only=.*layers.1.*'?"),
        ("*.norm.weight", "is no regular expression", "did you mean 'model.train_only=.*.norm.weight'?"),
        ("layers.9", "matches no parameter", "a full name is `model.layers."),
        ("(", "is no regular expression", "a full name is `model.layers."),
        (".*q_proj.*|v_proj", "a part of", "did you mean 'model.train_only=.*q_proj.*|.*v_proj.*'?"),
        ("q_proj|v_proj", "matches no parameter", "did you mean 'model.train_only=.*q_proj.*|.*v_proj.*'?"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, says, fix, config_of):
    with pytest.raises(ConfigError, match=says) as refused:
        training.train(config_of(*FAST, f"model.train_only=['{pattern}']"))
    assert refused.value.problems[0].where == "model.train_only"
    assert fix in refused.value.problems[0].fix
    with pytest.raises(ConfigError, match="freezes the whole model"):
        config_of("adapter.method=lora", "model.train_only=['.*']")


def test_the_plan_counts_what_is_trained(tmp_path, tiny_tokenizer, rows_file, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("LLMTUNE_CACHE_DIR", str(tmp_path / "cache"))
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "six")
    tiny_tokenizer.save_pretrained(tmp_path / "six")
    words = [
        f"model.name={tmp_path / 'six'}", f"data.train={rows_file}", "training.precision=fp32",
        r"model.train_only=['model\.layers\.[45]\..*']",
    ]  # fmt: skip
    prepared = prepare(load_config(None, overrides=words, environ={}), Options())
    forecaster = Forecaster(prepared, Options(), find_target(None, no_cuda=True))
    batch, _ = forecaster.largest_micro_batch(prepared.config)
    model = forecaster._build(prepared.config)
    assert forecaster.sizes(prepared.config).trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = forecaster._trace(prepared.config, batch, "single")
    monkeypatch.setattr(forecast, "TRACED_BLOCKS", 6)
    whole = forecaster._trace(prepared.config, batch, "single")
    assert planned.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.1)
