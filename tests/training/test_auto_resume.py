"""`train --resume auto`: the same command, started again, goes on in the same folder."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from llmtune.cli.main import run as command
from rank_helpers import (
    LAUNCHER,
    LONGEST_S,
    TwoRanks,
    environment,
    in_two_ranks,
    launched,
    processes_of,
    wait_for_lines,
)
from training_helpers import lines_of, small_run, weights_of

OWN = [sys.executable, "-m", "llmtune"]


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    more = ("training.max_steps=12", "checkpoint.every_steps=4")
    return folder, small_run(tiny_model_folder, rows_file, folder, *more)


@pytest.fixture(scope="module")
def whole(words):
    """A run that nobody stopped."""
    folder, given = words
    assert command(["train", *given, "run.name=whole"]) == 0
    return folder / "whole"


def folders(folder, name):
    return sorted(path.name for path in folder.glob(f"{name}*"))


def test_the_same_command_begins_goes_on_and_is_finished(words, capsys):
    folder, given = words
    given = ["train", "--resume", "auto", *given, "run.name=again", "training.max_minutes=0.0000001"]
    assert command([*given, "training.max_steps=3"]) == 0
    assert "this command has no run yet; it begins one" in capsys.readouterr().err
    for step in (1, 2):
        assert command([*given, "training.max_steps=3"]) == 0
        said = capsys.readouterr().err
        assert "again was begun by this command; it goes on" in said
        assert f"going on after step {step}" in said
    assert command([*given, "training.max_steps=3"]) == 0
    done = capsys.readouterr()
    assert "again is finished after step 3; nothing is left to do" in done.err
    assert done.out.strip() == str(folder / "again")
    assert folders(folder, "again") == ["again"]
    assert [line["step"] for line in lines_of(folder / "again") if "train_mean_nll" in line] == [1, 2, 3]


def test_another_command_in_its_place_is_refused_with_each_key(words, whole, capsys):
    folder, given = words
    other = ["run.name=whole", "training.learning_rate=0.5", "run.seed=7"]
    assert command(["train", "--resume", "auto", *given, *other]) == 2
    said = capsys.readouterr().err
    assert "training.learning_rate was None, is now 0.5" in said
    assert "run.seed was 42, is now 7" in said
    assert folders(folder, "whole") == ["whole"]


def test_two_processes_whose_command_is_refused_part(words, whole):
    """The next run of a sweep meets anew; it would take a group that is left for that of the program around it."""
    given = ["train", "--resume", "auto", *words[1], "run.name=whole", "run.seed=7", "distributed.timeout_s=20"]

    def start():
        assert command(given) == 2
        assert not dist.is_initialized()

    codes, said = in_two_ranks(start)
    assert codes == [0, 0], said
    assert "".join(said).count("error: ") == 1, said


def test_a_run_that_diverged_is_not_tried_again(words, whole, capsys):
    info = json.loads((whole / "run.json").read_text())
    (whole / "run.json").write_text(json.dumps(info | {"state": "diverged"}))
    assert command(["train", "--resume", "auto", *words[1], "run.name=whole"]) == 7
    (whole / "run.json").write_text(json.dumps(info))
    assert "whole diverged after step 12, and would again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--resume", "auto", "--name", "{model}-{timestamp}"], "is another at each start"),
        (["--resume", "yes"], "--resume takes `auto`, not `yes`"),
        (["--max-restarts", "2", "--devices", "2"], "--max-restarts starts processes again"),
        (["--max-restarts", "2", "--resume", "auto", "run.name=x"], "--max-restarts starts processes again"),
    ],
)
def test_a_command_that_could_not_find_its_run_is_refused(words, more, problem, capsys):
    assert command(["train", *words[1], *more]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.campaign
@pytest.mark.parametrize("launcher", ["--devices", "torchrun"])
def test_p12_a_killed_process_under_restarts_finishes_in_the_same_folder(words, launcher):
    folder, given = words
    name = f"restarted-{launcher.strip('-')}"
    if launcher == "torchrun":
        start = [*LAUNCHER[:3], "--max-restarts", "2", *LAUNCHER[3:], "train"]
    else:
        start = [*OWN, "train", "--devices", "2", "--max-restarts", "2"]
    more = [f"run.name={name}", "training.max_steps=300", "checkpoint.every_steps=20"]
    process = subprocess.Popen(
        [*start, "--resume", "auto", *given, *more],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_lines(folder / name, 60)
    os.kill(processes_of(name)["1"], signal.SIGKILL)
    said = process.communicate(timeout=LONGEST_S)[0]
    assert process.returncode == 0, said
    assert said.count("was begun by this command; it goes on") == 1, said
    assert folders(folder, name) == [name]
    assert json.loads((folder / name / "run.json").read_text())["step"] == 300


@pytest.mark.campaign
def test_a_stopped_command_of_two_processes_goes_on_and_finishes_to_the_same_bytes(words):
    folder, given = words
    longer = [*given, "training.max_steps=60", "--resume", "auto"]
    launched("train", *longer, "run.name=undisturbed")
    both = TwoRanks("train", *longer, "run.name=preempted")
    wait_for_lines(folder / "preempted", 8)
    both.processes[1].send_signal(signal.SIGTERM)
    assert both.end()[0] == [143, 143]
    launched("train", *longer, "run.name=preempted")
    assert folders(folder, "preempted") == ["preempted"]
    assert weights_of(folder / "preempted") == weights_of(folder / "undisturbed")
    assert launched("train", *longer, "run.name=preempted").count("is finished after step 60") == 1
