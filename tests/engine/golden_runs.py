"""The golden trajectories (N6): 30 steps of four trainings, as text beside this file in `golden/`.

`python tests/engine/golden_runs.py` writes them anew, with the environment they come from. Do so only for a change that
is meant to change numbers, and say which in the commit.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).with_name("golden")
STEPS = 30
RUNS = {
    "full": {"batch_size": 4, "accumulation": 2},
    "lora": {"batch_size": 4, "accumulation": 2, "lora": True},
    "packed": {"batch_size": 2, "accumulation": 2, "packing": "best_fit", "layout": "flat"},
    "scratch": {"batch_size": 8, "accumulation": 1, "scratch": True},
}


def trajectory(bench, name, **changes):
    """The steps of one golden training.

    Its weights and rows come from NumPy's PCG64, so they are the same everywhere.
    """
    options = dict(RUNS[name])
    scratch, lora = options.pop("scratch", False), options.pop("lora", False)
    model = bench.model(lora=lora, **({"tie_word_embeddings": True, "num_hidden_layers": 3} if scratch else {}))
    rng = np.random.Generator(np.random.PCG64(7))
    scale = 0.02 if scratch else 0.15
    with torch.no_grad():
        for parameter in dict(model.named_parameters()).values():
            if parameter.ndim >= 2:
                parameter.copy_(torch.from_numpy(rng.random(parameter.shape) * 2 - 1) * scale * 3**0.5)
    plan = bench.plan(bench.examples(48, seed=1), max_steps=STEPS, shuffle_seed=3, **options)
    rate = {"scratch": 3e-3, "lora": 1e-2}.get(name, 1e-3)
    return bench.training(model, plan, learning_rate=rate, schedule="cosine", warmup_steps=3, **changes).run()


def lines(results):
    """One line a step: number, loss, gradient norm, learning rate, tokens."""
    return [
        f"{r.step} {r.train_mean_nll:.9g} {r.grad_norm:.9g} {r.learning_rate:.9g} {r.num_tokens} {r.num_loss_tokens:g}"
        for r in results
    ]


def read(name):
    """Header lines and rows of numbers of a golden file."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in text if line.startswith("#")], [
        [float(word) for word in line.split()] for line in text if line[0] != "#"
    ]


def write(bench):
    """All golden files, from this machine."""
    import transformers

    torch.set_num_threads(1)
    environment = [
        f"# torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}, Python {platform.python_version()}",  # noqa: E501
        f"# {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, fp32",
        "# step train_mean_nll grad_norm learning_rate num_tokens num_loss_tokens",
    ]
    FOLDER.mkdir(exist_ok=True)
    for name in RUNS:
        text = "\n".join([*environment, *lines(trajectory(bench, name))])
        (FOLDER / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = importlib.util.spec_from_file_location("bench_of_conftest", Path(__file__).with_name("conftest.py"))
    conftest = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = conftest
    spec.loader.exec_module(conftest)
    write(conftest.Bench())
