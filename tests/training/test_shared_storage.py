"""Processes that do not see the same run, because their machines do not share its storage, are refused by name."""

import os
import socket

import pytest

from llmtune.cli.main import run as command
from rank_helpers import in_two_ranks, needs_namespaces, sees_elsewhere
from training_helpers import small_run

pytestmark = needs_namespaces


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    """KEY=VALUE words of a run that stops after its first step, saved; and the folder of its folder."""
    folder = tmp_path_factory.mktemp("shared")
    more = ("training.max_steps=3", "training.max_minutes=0.0000001", "distributed.timeout_s=20")
    return folder, small_run(tiny_model_folder, rows_file, folder, *more)


def refused(start, place, there):
    """What two processes printed that start the same, of which the second sees another folder at a place."""

    def in_one():
        if os.environ["RANK"] == "1":
            sees_elsewhere(place, there)
        return command(start)

    codes, said = in_two_ranks(in_one)
    assert codes == [2, 2], said
    said = "".join(said)
    assert said.count("error: ") == 1, said
    assert f"process 1 ({socket.gethostname()}) differs from process 0: {place}" in said, said
    assert "`run.output_dir` lie on storage that all of them share" in said
    return said


def test_the_same_command_on_a_machine_without_the_runs_folder_is_refused_on_all(words, tmp_path):
    """Not with the code of a lost process, after which schedulers start it again for ever."""
    folder, given = words
    start = ["train", "--resume", "auto", *given, "run.name=unseen"]
    assert command(start) == 0
    assert "config.yaml is 'No such file or directory' there" in refused(start, folder / "unseen", tmp_path)


def test_another_checkpoint_of_the_same_step_is_refused(words):
    """An older copy: both are whole, and the weights are others."""
    folder, given = words
    assert command(["train", *given, "run.name=here"]) == 0
    assert command(["train", *given, "run.name=there", "run.seed=7"]) == 0
    here, there = (folder / name / "checkpoints" for name in ("here", "there"))
    refused(["resume", str(folder / "here")], here / "step-000001", there / "step-000001")


def test_a_checkpoint_that_is_missing_on_another_machine_is_refused_on_all(words, tmp_path):
    folder, given = words
    assert command(["train", *given, "run.name=alone"]) == 0
    refused(["resume", str(folder / "alone")], folder / "alone" / "checkpoints" / "step-000001", tmp_path)
