"""Ten kills in one run of DPO from an adapter, and of GRPO, some while answers are drawn: the same bytes at the end."""

import json
import os

import pytest

from llmtune.config.layers import load_config
from llmtune.training import rollouts
from llmtune.training import train as training
from llmtune.verify.crash import verify_crash
from llmtune.verify.subprocesses import run_forked
from training_fixtures import WORDS
from training_helpers import LORA

pytestmark = pytest.mark.campaign

KILLS = 10


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


SHIFTS = ((1, 2, 3), (4, 5))


@pytest.fixture
def given(tiny_model_folder, rows, tmp_path):
    return [
        f"model.name={tiny_model_folder}",
        f"data.train={rows}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.num_workers=1",
        "data.test_size=4",
        "training.batch_size=2",
        "training.learning_rate=0.003",
        "training.precision=fp32",
        *LORA,
    ]


def killed(given, folder, *, steps):
    """Ten kills of one run, by `verify crash`."""
    record = folder / "kills.jsonl"
    verdict = verify_crash(
        None,
        given,
        folder / "runs",
        steps=steps,
        kills=KILLS,
        kills_in_a_life=KILLS,
        print_line=print,
        seed=1,
        record=record,
    )
    assert verdict.passed, verdict.lines()
    kills = [json.loads(line) for line in record.read_text().splitlines()]
    assert [kill["outcome"] for kill in kills] == ["identical"] * KILLS
    assert [kill["life"] for kill in kills] == [1] * KILLS
    assert sum(kill["phase"] in ("training", "saving") for kill in kills) >= 2


def test_p1_dpo_from_an_adapter_survives_ten_kills_in_one_run(given, tmp_path):
    basis = [f"run.output_dir={tmp_path}", "run.name=start", "training.max_steps=2", "data.format=prompt-completion"]
    basis += ["data.train=[{path: " + str(tmp_path / "rows.jsonl") + ", columns: {completion: answer}}]"]
    end = run_forked(lambda: training.train(load_config(None, overrides=[*given, *basis])), kill_after_s=None)
    assert end.code == 0, end.error
    start = tmp_path / "start" / "checkpoints" / "final"
    killed([*given, "objective.method=dpo", f"adapter.start_from={start}"], tmp_path, steps=160)


def test_p1_grpo_survives_ten_kills_in_one_run_some_while_answers_are_drawn(given, tmp_path, monkeypatch):
    """Rounds of three steps: every checkpoint lies inside of one, after its answers were drawn by weights now gone."""
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
    killed(
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
        steps=24,
    )
    assert len(list(drawing.iterdir())) >= 1  # killed between the first and the last token of a round
