"""Issue 6, must show 1: from nothing to a model that answers and stops by itself, killed and resumed on the way, with
no network.
"""

import itertools
import json

import pytest
import torch

from llmtune.cli.main import run as command
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.training import train as training
from training_helpers import in_child, line_count

OPTIONS = Options(no_cuda=True, offline=True)


def test_custom_nano_from_nothing_is_trained_killed_resumed_evaluated_stops_by_itself_and_is_exported(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    overrides = {
        "model.name": "custom-nano",
        "model.architecture.vocab_size": 600,
        "data.max_samples": 3,
        "data.test_size": 1,
        "data.num_workers": 1,
        "run.name": "nano",
        "training.epochs": 50,
        "training.batch_size": 2,
        "training.learning_rate": 3e-3,
        "training.lr_schedule": "constant",
        "evaluation.every_steps": None,
        "checkpoint.every_steps": 5,
        "tracking.trackers": ["jsonl"],
    }
    resolved = load_config("test", overrides=overrides, environ={})
    metrics = tmp_path / "runs" / "nano" / "metrics.jsonl"
    assert in_child(lambda: training.train(resolved, OPTIONS), kill_when=lambda: line_count(metrics) >= 12) == -9
    assert (tmp_path / "runs" / "nano" / "tokenizer" / "tokenizer.json").is_file()

    result = training.resume("nano", options=OPTIONS)
    assert (result.state, result.step) == ("finished", 50)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "train_mean_nll" in line] == list(range(1, 51))
    assert result.metrics["train_mean_nll"] < 0.2  # two rows by heart

    capfd.readouterr()
    assert command(["evaluate", "runs/nano", "--no-cuda"]) == 0
    assert "bits" in "".join(capfd.readouterr())
    row = json.loads(_first_trained_row(result.folder))
    asked, answer = next((a, b) for a, b in itertools.pairwise(row) if a["role"] == "user")
    system = [part for one in row if one["role"] == "system" for part in ("--system", one["content"])]
    assert command(["generate", "runs/nano", asked["content"], *system, "--json", "--no-cuda"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["text"], said["stopped_by"]) == (answer["content"], "stop_token")

    assert command(["export", "nano", "--output", "exported"]) == 0
    assert command(["export", "nano", "--output", "exported.gguf"]) == 0
    assert command(["generate", "exported.gguf", asked["content"], *system, "--json", "--no-cuda"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["text"] == answer["content"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert command(["generate", "exported", asked["content"], *system, "--json", "--no-cuda"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == answer["content"]
    final = result.folder / "checkpoints" / "final"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer("Why does bread rise?", return_tensors="pt").input_ids
    with torch.no_grad():
        # The trained one still has the attention of the training, which sums in another order.
        torch.testing.assert_close(plain(ids).logits, result.model.eval()(ids).logits, rtol=0, atol=1e-4)


def _first_trained_row(folder):
    """Messages of a row of the shipped conversations that is not the held-out one, as JSON."""
    from llmtune.config.paths import shipped_path

    held_out = {
        entry["source"].rsplit(":", 1)[1]
        for line in (folder / "ledger.jsonl").read_text().splitlines()
        if (entry := json.loads(line)).get("fate") == "held_out"
    }
    rows = shipped_path("example-data/conversations.jsonl").read_text(encoding="utf-8").splitlines()
    number = next(n for n in range(1, 4) if str(n) not in held_out)
    return json.dumps(json.loads(rows[number - 1])["messages"])


SMALL = ["model.architecture.vocab_size=400", "evaluation.max_new_tokens=4"]


LONG_FLAGS = ("--model", "custom-nano", "--config", "test", "--samples", "20", "--project", "proj")
SHORT_FLAGS = ("-m", "custom-nano", "-c", "test", "-s", "20", "-p", "proj")


@pytest.mark.parametrize("flags", [LONG_FLAGS, SHORT_FLAGS], ids=["long", "short"])
def test_the_words_people_type_train_custom_nano_on_20_samples(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert command(["train", *flags, "--no-cuda", *SMALL]) == 0
    assert_trained_on_20_samples(tmp_path / capfd.readouterr().out.strip())


def assert_trained_on_20_samples(folder):
    assert (folder / "checkpoints" / "final" / "model.safetensors").is_file()
    resolved = load_config(str(folder / "config.yaml"), environ={}).config
    assert (resolved.data.max_samples, resolved.tracking.project) == (20, "proj")
    assert json.loads((folder / "run.json").read_text())["data"]["train"]["used"] <= 20


def test_list_models_is_also_a_flag_of_train(capsys):
    assert command(["train", "--list-models"]) == 0
    shown = capsys.readouterr().out
    assert all(f"custom-{size}" in shown for size in ("nano", "tiny", "small", "medium", "large"))
