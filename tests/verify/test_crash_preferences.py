"""Ten kills in one run of DPO from an adapter, and of GRPO, half of them while answers are drawn: the same bytes."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from llmtune.config.layers import load_config
from llmtune.training import rollouts
from llmtune.training import train as training
from training_fixtures import WORDS
from training_helpers import LORA, difference, in_child, line_count, lines_of, weights_of

pytestmark = pytest.mark.campaign

KILLS = 10
SHIFTS = ((1, 2, 3), (4, 5))


@pytest.fixture
def rows(tmp_path):
    """A file of pairs, which GRPO reads as prompts with a right answer."""
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(24):
            right, wrong = (" ".join(WORDS[(number + shift) % len(WORDS)] for shift in shifts) for shifts in SHIFTS)
            file.write(json.dumps({"prompt": f"{WORDS[number % len(WORDS)]} {number}", "answer": right} | {
                "chosen": right, "rejected": wrong}) + "\n")  # fmt: skip
    return path


@pytest.fixture
def given(tiny_model_folder, rows, tmp_path):
    return [
        f"model.name={tiny_model_folder}",
        f"data.train={rows}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run.output_dir={tmp_path / 'runs'}",
        "data.num_workers=1",
        "data.test_size=4",
        "training.batch_size=2",
        "training.learning_rate=0.003",
        "training.precision=fp32",
        "checkpoint.every_steps=2",
        "tracking.trackers=[jsonl]",
        *LORA,
    ]


def run_of(words, name):
    """Train a run, or go on with it, to its end."""
    folder = words["run.output_dir"] / name
    if (folder / "run.json").is_file():
        training.resume(str(folder))
    else:
        overrides = [f"{key}={value}" for key, value in words.items()]
        training.train(load_config(None, overrides=[*overrides, f"run.name={name}"], environ={}))


def survives_ten_kills(given, folder, *, steps, is_now=lambda number: True):
    """Kill one run ten times, a few steps further each time, and compare its end with the run that nobody stopped.

    A kill comes when `is_now(number)` holds, and then within a step's time of its own, by chance.
    """
    words = dict(word.split("=", 1) for word in given) | {"training.max_steps": steps}
    words["run.output_dir"] = folder / "runs"
    chance = random.Random(1)
    assert in_child(lambda: run_of(words, "whole"), timeout_s=600) == 0
    run = folder / "runs" / "attacked"
    for number in range(KILLS):
        # The first before anything is written; each process goes further than the one before it.
        reached = number * steps // (KILLS + 1)
        pause_s = chance.uniform(0, 0.05)

        def kill_when(number=number, reached=reached, pause_s=pause_s):
            if line_count(run / "metrics.jsonl") < reached or not is_now(number):
                return False
            time.sleep(pause_s)
            return True

        assert in_child(lambda: run_of(words, "attacked"), kill_when=kill_when, timeout_s=600) == -signal.SIGKILL
    assert in_child(lambda: run_of(words, "attacked"), timeout_s=600) == 0
    whole = folder / "runs" / "whole"
    assert difference(whole, run) == ""
    assert weights_of(run) == weights_of(whole)
    assert lines_of(run) == lines_of(whole)
    return run, whole


def test_p1_dpo_from_an_adapter_survives_ten_kills_in_one_run(given, tmp_path):
    basis = ["run.name=start", "training.max_steps=2", "data.format=prompt-completion"]
    basis += ["data.train=[{path: " + str(tmp_path / "rows.jsonl") + ", columns: {completion: answer}}]"]
    training.train(load_config(None, overrides=[*given, *basis], environ={}), print_line=lambda _: None)
    start = tmp_path / "runs" / "start" / "checkpoints" / "final"
    survives_ten_kills([*given, "objective.method=dpo", f"adapter.start_from={start}"], tmp_path, steps=66)


def test_p1_grpo_survives_ten_kills_in_one_run_half_of_them_while_answers_are_drawn(given, tmp_path, monkeypatch):
    """Rounds of three steps: checkpoints lie inside of them, after their answers were drawn by weights now gone."""
    drawing = tmp_path / "drawing"
    drawing.mkdir()
    draw = rollouts.draw_answers

    def marked(*positional, **named):
        mark = drawing / str(os.getpid())
        mark.touch()
        answers = draw(*positional, **named)
        mark.unlink()
        return answers

    monkeypatch.setattr(rollouts, "draw_answers", marked)

    def is_now(number):
        return number % 2 == 0 or any(Path("/proc", mark.name).exists() for mark in drawing.iterdir())

    run, whole = survives_ten_kills(
        [
            *given,
            "objective.method=grpo",
            "objective.num_generations=4",
            "objective.max_new_tokens=48",
            "objective.steps_per_generation=3",
            "objective.rewards={regex: 1.0, f1: 1.0}",
            "objective.reward_pattern='[aeiou]'",
        ],
        tmp_path,
        steps=33,
        is_now=is_now,
    )
    assert (run / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert len(list(drawing.iterdir())) >= 3  # each of a process that ended between the first and the last token
