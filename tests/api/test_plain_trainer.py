"""Issue 6, must show 2, in the small: from nothing on text, llmtune and the plain Trainer of transformers end in the
same place.

`benchmarks/scratch_vs_trainer.py` does it with custom-tiny; its parts are used here, so that neither can rot.
"""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "scratch_vs_trainer.py"
SMALL = tuple(f"model.architecture.{key}" for key in ("vocab_size=400", "d_model=32", "n_layers=2", "n_heads=2"))
WORDS = [
    "the",
    "user",
    "asks",
    "and",
    "assistant",
    "answers",
    "a",
    "small",
    "system",
    "of",
    "words",
    "numbers",
    "(7)",
    "naïve",
    "->",
]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("scratch_vs_trainer", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROGRAM.parent)  # as python does for a program
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(benchmark, tmp_path):
    """Documents of very different lengths: one fills several rows, most need padding beside it."""
    drawn = random.Random(0)
    documents = [" ".join(drawn.choices(WORDS, k=drawn.choice([5, 40, 400]))) for _ in range(60)]
    benchmark.prepare(
        tmp_path, documents, model="custom-nano", steps=12, batch_size=4, overrides=(*SMALL, "data.num_workers=1")
    )
    return tmp_path


def plainly(benchmark, folder):
    with torch.random.fork_rng():  # the Trainer seeds every generator there is
        return benchmark.train_with_trainer(folder)


def test_every_step_and_the_held_out_loss_are_those_of_the_plain_trainer(benchmark, folder):
    mine, plain = benchmark.train_with_llmtune(folder), plainly(benchmark, folder)
    assert len(mine["losses"]) == len(plain["losses"]) == 12
    assert mine["losses"][-1] < mine["losses"][0] - 0.2  # it learned something
    assert mine["parameters"] == plain["parameters"]
    assert max(benchmark.compare(mine, plain).values()) <= 1e-5


def test_the_comparison_sees_another_start(benchmark, folder):
    """The first layer's feed-forward twice as large in one of the two, and they no longer agree."""
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, path, {"format": "pt"})
    assert (
        benchmark.compare(benchmark.train_with_llmtune(folder), plainly(benchmark, folder))[
            "largest difference of a step's loss"
        ]
        > 1e-5
    )


@pytest.mark.campaign
def test_the_benchmarks_text_is_large_and_the_same_every_time(benchmark):
    documents = benchmark.documents_of_python()
    assert len(documents) > 300
    assert sum(len(text.encode()) for text in documents) > 1_500_000
    assert documents == benchmark.documents_of_python()
