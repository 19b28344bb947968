"""Processes that bring other code of the user's own, or another adapter to start from, are refused before step 1."""

import json
import os
import shutil
import socket

import pytest

from llmtune import Trainer, load_config
from llmtune.cli.main import run as command
from rank_helpers import in_two_ranks
from training_helpers import SMALL, small_run

JUDGES = """
def length(prompts, completions, completion_ids, **columns):
    return [float(len(text)) for text in completions]

def score(prompt, reference, answer):
    return float(len(answer))
"""
SHORT = ("training.max_steps=2", "distributed.timeout_s=20", "run.name=unlike")


@pytest.fixture
def folders(tmp_path):
    """A folder for each process, with a file of judges; in that of process 1 it is an older one."""
    for rank, text in enumerate((JUDGES, JUDGES.replace("len(", "-len("))):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "judges.py").write_text(text)
    return tmp_path


def refused(start, key):
    """Nothing is trained where two processes start the same in folders of their own; the error names this key."""
    codes, said = in_two_ranks(start)
    assert codes == [2, 2], said
    assert f"process 1 ({socket.gethostname()}) differs from process 0: {key} is" in "".join(said), said


def in_own_folder(folders, *words):
    def start():
        os.chdir(folders / os.environ["RANK"])
        return command(["train", *words])

    return start


@pytest.fixture
def drawn(tiny_model_folder, folders):
    """The words of a short run that draws answers."""
    rows = folders / "prompts.jsonl"
    prompts = [[{"role": "user", "content": f"words {at}"}] for at in range(6)]
    rows.write_text("".join(json.dumps({"prompt": prompt, "answer": "numbers"}) + "\n" for prompt in prompts))
    grpo = ("objective.method=grpo", "objective.num_generations=2", "objective.max_new_tokens=2", "data.max_length=64")
    return small_run(tiny_model_folder, rows, folders / "runs", *SHORT, *grpo)


def test_another_reward_in_another_process_is_refused(folders, drawn):
    refused(in_own_folder(folders, *drawn, "--reward", "judges.py:length"), "rewards")


def test_the_same_reward_in_another_file_is_the_same(folders, drawn):
    """Content counts, not paths."""
    (folders / "1" / "judges.py").unlink()
    (folders / "1" / "own.py").write_text(JUDGES)

    def start():
        os.chdir(folders / os.environ["RANK"])
        file = "judges.py" if os.environ["RANK"] == "0" else "own.py"
        return command(["train", *drawn, "--reward", f"{file}:length"])

    codes, said = in_two_ranks(start)
    assert codes == [0, 0], said


def test_another_score_in_another_process_is_refused(folders, tiny_model_folder, rows_file):
    words = small_run(tiny_model_folder, rows_file, folders / "runs", *SHORT, "evaluation.max_new_tokens=2")
    refused(in_own_folder(folders, *words, "--score", "judges.py:score"), "score function")


def test_another_loss_of_a_program_of_the_users_in_another_process_is_refused(folders, tiny_model_folder, rows_file):
    words = small_run(tiny_model_folder, rows_file, folders / "runs", *SHORT)

    def usual(log_probs, weights):
        return -(weights * log_probs).sum()

    def doubled(log_probs, weights):
        return -2 * (weights * log_probs).sum()

    def start():
        loss = usual if os.environ["RANK"] == "0" else doubled
        Trainer(load_config(None, overrides=words, environ={}), loss=loss).train()

    refused(start, "loss function")


def test_another_adapter_to_start_from_in_another_process_is_refused(folders, tiny_model_folder, rows_file):
    """With `fsdp` each would hold parts of its own one."""
    words = small_run(tiny_model_folder, rows_file, folders / "runs", "training.max_steps=1")
    for rank in range(2):
        assert command(["train", *words, f"run.name=earlier-{rank}", f"run.seed={rank}"]) == 0
        shutil.copytree(folders / "runs" / f"earlier-{rank}" / "final", folders / str(rank) / "earlier")
    onward = [f"model.name={tiny_model_folder}", f"data.train={rows_file}", f"run.output_dir={folders / 'runs'}"]
    onward += [*SMALL, *SHORT, "adapter.method=lora", "adapter.start_from=earlier"]
    refused(in_own_folder(folders, *onward), "adapter that training starts from")
