"""Answers compared with sharded weights, through the real commands: the run is that of one process (N2)."""

import pytest

from llmtune.cli.main import run as command
from rank_helpers import TwoRanks
from sharded_runs import Ranks
from training_helpers import lines_of

FULL, LORA = ("adapter.method=none",), ("adapter.method=lora", "adapter.r=4")
CASES = {
    "dpo-start": ("objective.method=dpo", "objective.reference=start", *FULL),
    "dpo-base": ("objective.method=dpo", "objective.reference=base", *LORA),
    "dpo-start-lora": ("objective.method=dpo", "objective.reference=start", *LORA),
    "dpo-precomputed": ("objective.method=dpo", "objective.reference=precomputed", *FULL),
    "dpo-4bit": ("objective.method=dpo", "model.quantization=4bit", *LORA),
    "ipo": ("objective.method=dpo", "objective.loss=ipo", *LORA),
    "kto": ("objective.method=kto", *LORA),
    "kto-start": ("objective.method=kto", *FULL),
    "simpo": ("objective.method=simpo", *FULL),
    "orpo": ("objective.method=orpo", *LORA),
    "plain": ("objective.method=dpo", "training.engine=plain", *FULL),
}


@pytest.fixture(scope="module")
def ranks(untied_model_folder, pairs_file, tmp_path_factory):
    """11 training pairs in windows of 3: in the last one, of 2 pairs, two of four processes have no row."""
    folder = tmp_path_factory.mktemp("sharded-preferences")
    return Ranks(
        folder,
        [
            f"model.name={untied_model_folder}",
            f"data.train={pairs_file}",
            f"data.cache_dir={folder / 'cache'}",
            f"run.output_dir={folder}",
            *("data.num_workers=1", "data.test_size=5", "data.max_length=128", "distributed.timeout_s=60"),
            *("training.batch_size=1", "training.gradient_accumulation_steps=3", "training.learning_rate=0.003"),
            *("training.precision=fp32", "evaluation.every_steps=5", "tracking.trackers=[jsonl]"),
        ],
    )


def is_one_run(alone, together):
    """The same rows and the same counts; every mean within 1e-6 of the loss's size."""
    ours, theirs = lines_of(together), lines_of(alone)
    assert len(ours) == len(theirs) > 2
    for here, there in zip(ours, theirs, strict=True):
        assert here.keys() == there.keys()
        for key, value in there.items():
            close = 1e-5 if key == "grad_norm" else 2e-6
            exact = isinstance(value, str) or key.startswith("num_") or key in ("step", "epoch", "progress")
            assert here[key] == (value if exact else pytest.approx(value, rel=close, abs=close)), (key, here["step"])


def test_a_reference_in_parts_is_the_reference(ranks):
    """Full tuning compared with a frozen copy of this process's parts, two processes."""
    words = [*ranks.base, *CASES["dpo-start"], "training.max_steps=4"]
    assert command(["train", *words, "run.name=alone"]) == 0
    codes, said = TwoRanks("train", *words, "run.name=together", "distributed.strategy=fsdp").end()
    assert codes == [0, 0], "\n".join(said)
    is_one_run(ranks.folder / "alone", ranks.folder / "together")
    losses = [line["train_loss"] for line in lines_of(ranks.folder / "together") if "train_loss" in line]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(losses[-1] - losses[0]) > 1e-4, "the reference moved with the model"


@pytest.mark.campaign
@pytest.mark.parametrize("count", [2, 4])
def test_compared_answers_are_those_of_one_process(ranks, count):
    for name, words in CASES.items():
        if count == 2:
            assert command(["train", *ranks.base, f"run.name={name}-1", *words, "training.max_steps=15"]) == 0
    runs = [("train", f"{name}-{count}", [*words, "training.max_steps=15"]) for name, words in CASES.items()]
    ranks.run(count, *runs)
    for name in CASES:
        is_one_run(ranks.folder / f"{name}-1", ranks.folder / f"{name}-{count}")
