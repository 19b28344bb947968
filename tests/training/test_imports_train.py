"""An imported config trains: one of each toolkit, and one of each method, with a tiny model and rows in their place."""

from __future__ import annotations

import json

import pytest

from import_samples import SAMPLES, imported, values
from llmtune.cli.main import run

ROWS = {
    "sft": {"messages": [{"role": "user", "content": "Say a"}, {"role": "assistant", "content": "a"}]},
    "dpo": {"prompt": "Say a", "chosen": "a", "rejected": "b"},
    "kto": {"prompt": "Say a", "completion": "a", "label": True},
    "grpo": {"prompt": "Say a", "answer": "a"},
    "classification": {"text": "Say a", "label": "yes"},
}
ROWS |= {"reward": ROWS["dpo"], "orpo": ROWS["dpo"]}
STAND_INS = ("model.quantization=none", "model.attention=auto", "training.precision=fp32", "training.optimizer=adamw")
"""What a processor without a GPU and its packages cannot do; the rest is as imported."""
COMMANDS = {
    "dpo": "trl dpo --model_name_or_path m --dataset_name d --use_peft",
    "kto": "trl kto --model_name_or_path m --dataset_name d --use_peft",
    "reward": "trl reward --model_name_or_path m --dataset_name d",
    "orpo": "swift rlhf --rlhf_type orpo --model m --dataset d",
    "grpo": "swift rlhf --rlhf_type grpo --model m --dataset d --num_generations 2 --max_completion_length 4 "
    "--per_device_train_batch_size 2 --truncation_strategy delete",
    "classification": "swift sft --task_type seq_cls --model m --dataset d",
}


def train(result, model, folder):
    of = values(result)
    method = of("objective.method")
    for name in ("rows", "others"):
        rows = [ROWS[method], *([{"text": "Say b", "label": "no"}] if method == "classification" else [])]
        lines = [json.dumps(row).replace("Say", f"Say {name} {number}") + "\n" for number in range(4) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "here.yaml").write_text(result.yaml)
    stand_ins = [f"model.name={model}", "data.train=[rows.jsonl]", *STAND_INS, "data.num_workers=1"]
    stand_ins += ["data.eval=[others.jsonl]"] if of("data.eval") else []
    stand_ins += ["objective.rewards={length: 1.0}"] if method == "grpo" else []
    stand_ins += ["adapter.layers=2"] if of("adapter.layers") else []
    short = ["training.max_steps=1", "training.warmup_steps=0", "training.warmup_ratio=null"]
    command = ["train", "--config", "here.yaml", "--output-dir", "runs", "--name", "run", "--no-cuda"]
    assert run([*command, *stand_ins, *short]) == 0
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "train_mean_nll" in line or "learning_rate" in line]


@pytest.mark.parametrize("peer", SAMPLES)
def test_an_imported_config_of_each_toolkit_trains(tmp_path, monkeypatch, tiny_model_folder, peer):
    monkeypatch.chdir(tmp_path)
    name, text = SAMPLES[peer]
    result = imported(tmp_path, text, name)
    (line,) = train(result, tiny_model_folder, tmp_path)
    assert line["learning_rate"] == pytest.approx(values(result)("training.learning_rate"))


@pytest.mark.parametrize("method", COMMANDS)
def test_an_imported_config_of_each_method_trains(tmp_path, monkeypatch, tiny_model_folder, method):
    monkeypatch.chdir(tmp_path)
    result = imported(tmp_path, COMMANDS[method] + "\n", "run.sh")
    assert values(result)("objective.method") == method
    assert len(train(result, tiny_model_folder, tmp_path)) == 1
