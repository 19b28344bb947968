"""What a run leaves behind needs nothing of ours: peft and transformers load it, and give the logits llmtune gives
(design section 6).
"""

import json
import subprocess
import sys

import pytest
import torch

from llmtune.deploy.merge import merge_lora
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.training import train as training
from training_helpers import FOUR_BIT, LORA

IDS = [5, 17, 200, 33, 9, 120, 61]

PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, *models, ids = sys.argv[1:]
for folder in [base, *models]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id is not None
    if folder == base:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        print(json.dumps(model(torch.tensor([json.loads(ids)])).logits[0, -1].tolist()))
assert "llmtune" not in sys.modules
"""  # noqa: E501


def ours(where):
    subject = load_inference_model(str(where), offline=True)
    with torch.no_grad():
        return subject.model(torch.tensor([IDS], device=subject.model.device)).logits[0, -1].float()


def test_n8_results_load_in_plain_peft_and_transformers_with_the_logits_of_generate(
    config_of, tmp_path, tiny_model_folder
):
    """A LoRA run, its merged model, and a full run; one process without llmtune reads them all."""
    lora, full = training.train(config_of(*LORA)).folder, training.train(config_of(name="full")).folder
    merge_lora(lora, tmp_path / "merged", offline=True)
    paths = tiny_model_folder, lora / "checkpoints" / "final", tmp_path / "merged", full / "checkpoints" / "final"
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, paths), json.dumps(IDS)], capture_output=True, text=True, check=True
    )
    adapted, merged, trained = (torch.tensor(json.loads(line)) for line in done.stdout.splitlines())
    assert torch.allclose(adapted, ours(lora), atol=1e-6, rtol=0)
    assert torch.allclose(merged, ours(tmp_path / "merged"), atol=1e-6, rtol=0)
    assert torch.allclose(merged, ours(lora), atol=1e-5, rtol=0)
    assert torch.allclose(trained, ours(full), atol=1e-6, rtol=0)


def test_n8_a_qlora_run_falls_in_loss_and_merges_within_the_bound(config_of, tmp_path):
    result = training.train(
        config_of(*FOUR_BIT, "training.epochs=8", "training.learning_rate=0.03", "adapter.dropout=0")
    )
    losses = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    train = [line["train_mean_nll"] for line in losses if "train_mean_nll" in line]
    assert sum(train[-3:]) < sum(train[:3]) - 0.2
    report = merge_lora(result.folder, tmp_path / "merged", offline=True)
    assert report.merged_digest
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("which", ["best", "final"])
def test_what_a_user_takes_away_is_whole(which, config_of):
    run = training.train(config_of(*LORA)).folder
    names = {path.name for path in (run / "checkpoints" / which).iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "manifest.json",
    }


def test_what_a_run_says_before_its_first_step_is_one_list_of_choices_and_its_folder(config_of):
    """The folder is named at once, and a name that was taken is said; every line of the list of choices stands in the
    list.
    """
    said = [[], []]
    runs = [
        training.train(config_of(*LORA, "training.max_steps=1", name="twice"), print_line=lines.append).folder
        for lines in said
    ]
    assert [run.name for run in runs] == ["twice", "twice-2"]
    folders = [next(line for line in lines if line.startswith("run ")) for lines in said]
    assert folders == [f"run     {runs[0]}", f"run     {runs[1]} (there is a run `twice` already)"]
    first = said[0].index("chosen for you:") + 1
    last = said[0].index(next(line for line in said[0] if line.startswith("training ")))
    assert last - first > 5
    assert all(line.startswith("  ") for line in said[0][first:last])
    assert [line for line in said[0][last:] if line.startswith("  ")] == []


def test_the_run_folder_holds_what_the_design_says(config_of):
    run = training.train(
        config_of(*LORA, "evaluation.prompts=[hello]", "tracking.trackers=[jsonl, tensorboard]")
    ).folder
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "origins.json",
        "run.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "samples.jsonl",
        "checkpoints",
        "tensorboard",
    }
    line = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()][-2]
    wanted = "step epoch progress train_mean_nll learning_rate grad_norm num_tokens num_loss_tokens num_sequences tokens_per_second"  # noqa: E501
    assert set(line) == {*wanted.split(), "loss_tokens_per_second", "step_seconds", "memory_bytes", "rows_digest"}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (run / "final").resolve() == run / "checkpoints" / "final"
    assert {"eval_mean_nll", "eval_perplexity", "eval_bits_per_byte", "eval_num_loss_tokens"} <= set(last)


def test_the_saved_config_loads_back_to_an_equal_one(config_of):
    from llmtune.config.layers import load_config

    resolved = config_of(*LORA)
    run = training.train(resolved).folder
    assert load_config(str(run / "config.yaml"), environ={}).config == resolved.config
