"""Runs of the tiny model, in this process and in forked ones that can be killed."""

import json

import pytest
import torch

from llmtune.config.layers import load_config
from llmtune.plan.activation_trace import PHASES, Peaks
from llmtune.plan.forecast import Forecaster

WORDS = tuple("the user asks and the assistant answers a small system of words and numbers".split())


@pytest.fixture(autouse=True)
def _one_thread():
    """A forked child may use torch only where the parent has no worker threads; one thread also fixes the order of
    every sum.
    """
    assert torch.get_num_threads() == 1


@pytest.fixture(autouse=True, scope="module")
def _planned_bytes():
    """Plans with made-up bytes of activations and of the process, in each module that imports this, or whose conftest
    does. A module with a fixture of this name of its own plans in earnest.

    To count a micro-batch's bytes takes longer than three steps of the tiny model. That they are right, and what a run
    does with them, is for tests/plan.
    """
    with pytest.MonkeyPatch.context() as patch:
        plan_made_up_bytes(patch.setattr)
        yield


def plan_made_up_bytes(set_attribute=setattr):
    """What `_planned_bytes` does to a process; without an argument it stays so."""
    peaks = Peaks(dict.fromkeys(PHASES, 1 << 20), dict.fromkeys(PHASES, 0), 1 << 20)
    set_attribute(Forecaster, "peaks", lambda *_: peaks)
    set_attribute(Forecaster, "process_bytes", 1 << 20)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """24 conversations of different lengths, no two alike."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(24):
            question = " ".join(WORDS[(index * 3 + place) % len(WORDS)] for place in range(2 + index % 7)) + f" {index}"
            answer = " ".join(WORDS[(index * 5 + place) % len(WORDS)] for place in range(1 + index % 9))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """16 pairs of different lengths, no two alike."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(16):
            question = " ".join(WORDS[(index * 3 + place) % len(WORDS)] for place in range(2 + index % 5)) + f" {index}"
            chosen = " ".join(WORDS[(index * 5 + place) % len(WORDS)] for place in range(1 + index % 6))
            rejected = " ".join(WORDS[(index * 7 + place + 1) % len(WORDS)] for place in range(1 + index % 4)) + " no"
            prompt = [{"role": "user", "content": question}]
            sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            file.write(json.dumps({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}) + "\n")
    return path


@pytest.fixture
def config_of(tiny_model_folder, rows_file, tmp_path):
    """Resolve a config of the tiny model on the 24 rows; further KEY=VALUE on top."""

    def resolve(*overrides, name="run"):
        basis = [
            f"model.name={tiny_model_folder}",
            f"data.train={rows_file}",
            f"run.output_dir={tmp_path / 'runs'}",
            f"run.name={name}",
            "data.test_size=4",
            "data.max_length=256",  # what the model sees
            "training.epochs=2",
            "training.batch_size=2",
            "training.gradient_accumulation_steps=2",
            "training.learning_rate=0.01",
            "training.precision=fp32",
            "checkpoint.every_steps=3",
            "evaluation.every_steps=4",
            "tracking.trackers=[jsonl]",
        ]
        return load_config(None, overrides=[*basis, *overrides], environ={})

    return resolve
