"""Code of the user's own in several processes: one that fails ends all alike and saved, a slow one is waited for."""

import json
import socket
import time

import pytest

from llmtune.config.dump import config_to_yaml
from rank_helpers import TwoRanks
from training_fixtures import WORDS
from training_helpers import comparing_run, lines_of, small_run

CODE = """
import os, random, time

calls = 0

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def fails_on_one(completions, **columns):
    global calls
    calls += 1
    if calls > 2 and os.environ.get("RANK") == {late!r}: raise ValueError("no more")
    return length(completions)

def slow_on_one(completions, **columns):
    global calls
    calls += 1
    if calls == 3 and os.environ.get("RANK") == {late!r}: time.sleep(6)
    return length(completions)

def judge(prompt, reference, answer):
    print("judged by", os.environ.get("RANK"), flush=True)
    return random.random()

def judge_that_fails(prompt, reference, answer):
    global calls
    calls += 1
    if calls > 8: raise ValueError("no more")
    return 0.5
"""


def code_file(folder, late=0):
    path = folder / f"mine{late}.py"
    path.write_text(CODE.replace("{late!r}", repr(str(late))))
    return path


@pytest.fixture(scope="module")
def prompting(tiny_model_folder, tmp_path_factory):
    """The config of a run of four steps that draws answers to two prompts each, and the folder it is written to."""
    folder = tmp_path_factory.mktemp("own-code")
    rows = folder / "prompts.jsonl"
    lines = [{"prompt": [{"role": "user", "content": f"{WORDS[at]} {at}"}]} for at in range(8)]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    path = folder / "config.yaml"
    settings = ("objective.method=grpo", "objective.num_generations=2", "objective.max_new_tokens=4")
    settings += ("data.test_size=0", "training.max_steps=4", "checkpoint.every_steps=100", "distributed.timeout_s=3")
    path.write_text(config_to_yaml(comparing_run(tiny_model_folder, rows, folder, *settings).config))
    return folder, ["--config", str(path)]


def state_of(run):
    info = json.loads((run / "run.json").read_text())
    return info["state"], info["step"]


@pytest.mark.parametrize("late", [0, 1])
def test_a_reward_that_fails_in_one_process_ends_both_saved_and_is_printed_once(prompting, late):
    folder, words = prompting
    code = code_file(folder, late)
    codes, said = TwoRanks("train", *words, f"run.name=fails-{late}", "--reward", f"{code}:fails_on_one").end()
    run = folder / "runs" / f"fails-{late}"
    assert codes == [2, 2], said
    assert "".join(said).count("ValueError: no more") == "".join(said).count("error: ") == 1, said
    assert state_of(run) == ("failed", 2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    again = TwoRanks("resume", str(run), "--reward", f"{code}:length", "--allow-changes")
    codes, said = again.end()
    assert codes == [0, 0], said
    assert state_of(run) == ("finished", 4)


@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_reward_that_is_slow_in_one_process_is_waited_for(prompting, late):
    folder, words = prompting
    both = TwoRanks("train", *words, f"run.name=slow-{late}", "--reward", f"{code_file(folder, late)}:slow_on_one")
    codes, said = both.end()
    assert codes == [0, 0], said


@pytest.mark.campaign
@pytest.mark.parametrize("late", [0, 1])
def test_a_reward_that_never_ends_in_one_process_is_named_after_ten_time_outs(prompting, late):
    folder, words = prompting
    code = code_file(folder, late)
    code.write_text(code.read_text().replace("time.sleep(6)", "time.sleep(1000)"))
    both = ("train", *words, f"run.name=endless-{late}", "distributed.timeout_s=2", "--reward", f"{code}:slow_on_one")
    began = time.monotonic()
    codes, said = TwoRanks(*both).end()
    assert codes == [8, 8], said
    assert 20 < time.monotonic() - began < 60, "".join(said)[-700:]
    assert f"process {late} ({socket.gethostname()}) answers, and does not go on" in "".join(said)
    assert "".join(said).count("error: ") == 1, said


@pytest.fixture(scope="module")
def judging(tiny_model_folder, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    more = ("evaluation.every_steps=1", "evaluation.best_by=eval_score", "evaluation.max_new_tokens=4")
    more += ("training.max_steps=6", "data.test_size=2", "checkpoint.every_steps=100", "distributed.timeout_s=10")
    return folder, small_run(tiny_model_folder, rows_file, folder, *more)


def test_the_main_process_alone_judges_and_decides_what_is_best(judging):
    """A judge may say something else each time: the other process would save where this one does not."""
    folder, words = judging
    code = code_file(folder)
    codes, said = TwoRanks("train", *words, "run.name=judged", "--score", f"{code}:judge").end()
    assert codes == [0, 0], said
    scores = {line["step"]: line["eval_score"] for line in lines_of(folder / "judged") if "eval_score" in line}
    assert said[0].count("judged by 0") == 2 * len(scores)
    assert "judged by 1" not in "".join(said)
    manifest = json.loads((folder / "judged" / "checkpoints" / "best" / "manifest.json").read_text())
    trained = {step: score for step, score in scores.items() if step}
    assert manifest["step"] == max(trained, key=trained.get)


@pytest.mark.campaign
def test_a_judge_that_is_slow_is_waited_for(judging):
    folder, words = judging
    code = code_file(folder)
    code.write_text(code.read_text().replace("return random.random()", "time.sleep(4); return random.random()"))
    more = ("run.name=slow", "training.max_steps=2", "distributed.timeout_s=3", "--score", f"{code}:judge")
    codes, said = TwoRanks("train", *words, *more).end()
    assert codes == [0, 0], said


def test_a_judge_that_fails_ends_both_saved(judging):
    folder, words = judging
    code = code_file(folder)
    codes, said = TwoRanks("train", *words, "run.name=fails", "--score", f"{code}:judge_that_fails").end()
    assert codes == [2, 2], said
    assert "".join(said).count("ValueError: no more") == "".join(said).count("error: ") == 1, said
    assert state_of(folder / "fails")[0] == "failed"
    assert len(list((folder / "fails" / "checkpoints").glob("step-*"))) == 1
