"""The CUDA path on a pretend GPU: what has to be loaded before torch runs as tests of a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(FOLDER))
from pretend.library import compiler  # noqa: E402 - its folder has just been added

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the pretend GPU with")


def run(*arguments: str, card: str = "none", timeout_s: int = 900, **environment: str) -> subprocess.CompletedProcess:
    """Run Python's `arguments` in a process that has a GPU, as far as torch can tell."""
    paths = os.pathsep.join([str(FOLDER), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "pretend", "--card", card, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def passed(*arguments: str, card: str = "none") -> int:
    """Run pytest there; returns how many tests passed, and fails with its report where one did not."""
    done = run("-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", *arguments, card=card)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout + " 0 passed")[1])


def test_the_laws_of_the_gpu_path_hold_on_the_pretend_gpu():
    assert passed("tests/gpu/laws", "-o", "addopts=", "-m", "not campaign") >= 12


@pytest.mark.campaign
def test_they_hold_for_every_family_card_and_variant():
    assert passed("tests/gpu/laws", "-o", "addopts=", "-m", "campaign") >= 20


@pytest.mark.campaign
def test_the_tests_that_need_a_gpu_run_on_it_too():
    """So that they cannot rot; flex attention has to be compiled for a real device."""
    files = ("tests/kernels/test_swiglu.py", "tests/kernels/test_attention.py", "tests/engine/test_step_in_backward.py")
    more = ("-o", "addopts=", "--import-mode=importlib", "-W", "default")
    chosen = ("-m", "gpu", "-k", "not flex and not paged and not 8bit")
    assert passed(*files, *more, *chosen, card="rtx4090") >= 4


@pytest.mark.campaign
def test_training_resuming_answering_and_verifying_run_whole_on_it(tmp_path):
    folder = tmp_path / "runs"

    def llmtune(*arguments: str) -> str:
        done = run("-m", "llmtune", *arguments, card="rtx4090", LLMTUNE_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    small = ["data.max_samples=24", f"run.output_dir={folder}", "evaluation.prompts=[]", "checkpoint.every_steps=2"]
    scratch = ["train", "-c", "test", *small, "model.name=custom-nano"]
    said = llmtune(*scratch, "run.name=base", "training.max_steps=2")
    assert "varlen" in said
    base = folder / "base" / "checkpoints" / "final"
    lora = ["train", "-c", "test", *small, f"model.name={base}", "adapter.method=lora", "adapter.r=4"]
    for name, steps in (("whole", 4), ("stopped", 2)):
        llmtune(
            *lora,
            f"run.name={name}",
            f"training.max_steps={steps}",
            "training.lr_schedule=constant",
            "training.warmup_ratio=0",
        )
    llmtune("resume", str(folder / "stopped"), "--allow-changes", "training.max_steps=4")
    lines = [
        [line for line in (folder / name / "metrics.jsonl").read_text().splitlines() if '"train_mean_nll"' in line]
        for name in ("whole", "stopped")
    ]
    losses = [re.findall(r'"train_mean_nll": ([\d.]+)', "\n".join(one)) for one in lines]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1], "P2: a run stopped and resumed repeats every loss"
    assert llmtune("generate", str(folder / "whole"), "a question").strip()
    merged = tmp_path / "merged"
    assert "against base + adapter" in llmtune("merge-lora", str(folder / "whole"), "-o", str(merged))
    assert b'"lm_head.weight"' not in (merged / "model.safetensors").read_bytes(), "its base is tied"
    llmtune("verify", "packing", "model.name=custom-nano")
