"""The example configs of preferences train as they are written, on their own rows and a small model."""

import json
from pathlib import Path

import pytest

from llmtune.config.layers import load_config
from llmtune.training.train import train
from training_fixtures import _planned_bytes  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "preferences").glob("*.yaml"))


def test_there_is_a_config_for_each_method():
    assert [path.stem for path in EXAMPLES] == ["classification", "dpo", "grpo", "kto", "orpo", "reward", "simpo"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_of_preferences_trains(path, tmp_path):
    small = {
        "model.name": "custom-nano",
        "model.architecture.vocab_size": 400,
        "model.architecture.max_seq_len": 512,
        "model.architecture.n_layers": 1,
        "data.max_samples": 12,
        "data.eval": [],
        "data.test_size": 2,
        "evaluation.before_training": False,
        "data.cache_dir": str(tmp_path),
        "data.num_workers": 1,
        "training.max_steps": 2,
        "training.precision": "fp32",
        "run.output_dir": str(tmp_path / "runs"),
        "tracking.trackers": ["jsonl"],
    }
    if path.stem == "grpo":  # it answers each prompt at every step, and a model that knows nothing never ends
        small |= {"objective.max_new_tokens": 8, "objective.num_generations": 2}
    resolved = load_config(str(path), overrides=small, environ={})
    assert resolved.notes == ()
    assert resolved.config.objective.method == path.stem
    result = train(resolved)
    assert result.step == 2
    if path.stem == "grpo":
        assert 0 <= result.metrics["eval_reward"] <= 1
    else:
        assert result.metrics["eval_loss"] > 0


def test_the_rows_of_the_examples_are_right_records_and_worse_answers():
    folder = ROOT / "example-data" / "preferences"
    for name, count in (("pairs", 160), ("pairs-heldout", 40)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            right, worse = (row[side][0]["content"] for side in ("chosen", "rejected"))
            assert json.loads(right).keys() == {"payer", "item", "city", "amount", "currency", "date"}
            assert right != worse
    for name, count in (("labels", 160), ("labels-heldout", 40)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count
        assert 0.35 < sum(row["label"] for row in rows) / count < 0.65
