"""A run goes on from the checkpoint that is named; what is said then is true, and what is proposed works."""

import re
import shlex

import pytest

from llmtune.cli.main import main
from llmtune.training import train as training

FOUR_STEPS = ("training.max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=0", "data.test_size=0")
QUIET = ("evaluation.every_steps=null",)


@pytest.fixture(autouse=True, scope="module")
def _planned_bytes():
    """These runs plan in earnest."""


@pytest.fixture
def run(config_of):
    return training.train(config_of(*FOUR_STEPS, *QUIET)).folder


@pytest.fixture
def program(capsys):
    """Run one command line; return (exit code, stderr)."""

    def run_one(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code, capsys.readouterr().err

    return run_one


def weights(run):
    return (run / "checkpoints" / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ("resume", "{}/checkpoints/step-000002"),
        ("resume", "{}", "--checkpoint", "step-000002"),
        ("resume", "{}", "--checkpoint", "2"),
        ("train", "--resume-from-checkpoint", "{}/checkpoints/step-000002"),
    ],
    ids=["resume", "resume --checkpoint", "resume --checkpoint N", "train"],
)
def test_a_run_goes_back_to_a_named_checkpoint_and_ends_with_the_same_bytes(run, program, words):
    before = weights(run)
    code, err = program(*(word.format(run) for word in words), "--no-cuda")
    assert code == 0, err
    assert "going back from step 4 to step 2, and on from there" in err
    assert "only where a changed key" not in err
    assert weights(run) == before


def test_going_back_sets_later_checkpoints_aside_until_their_steps_come_again(run, program):
    places = run / "checkpoints"
    code, err = program("resume", places / "step-000001", "training.max_steps=2", "--allow-changes", "--no-cuda")
    assert code == 0, err
    assert "set aside until their steps come again: step-000002.replaced, step-000003.replaced" in err
    # The newest checkpoint is the one of the training that went on, and nothing of the other is lost.
    found = sorted(path.name for path in places.glob("step-*"))
    assert found == ["step-000001", "step-000002", "step-000003.replaced", "step-000004.replaced"]
    code, err = program("resume", run, "training.max_steps=2", "--allow-changes", "--no-cuda")
    assert "finished after step 2 already" in err
    code, err = program("resume", run, "training.max_steps=4", "--allow-changes", "--no-cuda")
    assert code == 0, err
    assert sorted(path.name for path in places.glob("step-*")) == [f"step-00000{step}" for step in (1, 2, 3, 4)]


def test_a_best_model_of_a_later_step_is_set_aside_with_its_checkpoints(config_of, program):
    keep = ("checkpoint.keep_best=true", "evaluation.every_steps=1", "training.max_steps=3")
    run = training.train(config_of(*keep, "checkpoint.every_steps=1", "checkpoint.keep_last=0")).folder
    before = {path.name: path.read_bytes() for path in (run / "checkpoints" / "best").iterdir()}
    code, err = program("resume", run, "--checkpoint", "1", "--no-cuda")
    assert code == 0, err
    assert "step-000003.replaced, best.replaced" in err
    assert {path.name: path.read_bytes() for path in (run / "checkpoints" / "best").iterdir()} == before
    assert not list((run / "checkpoints").glob("*.replaced*"))


@pytest.mark.parametrize(
    "words",
    [("resume", "{}/checkpoints"), ("train", "--resume-from-checkpoint", "{}")],
    ids=["folder of checkpoints", "folder of the run"],
)
def test_the_folder_of_a_run_or_of_its_checkpoints_goes_on_from_the_newest(run, program, words):
    code, err = program(*(word.format(run) for word in words), "--no-cuda")
    assert code == 0, err
    assert "finished after step 4 already" in err


@pytest.mark.parametrize("name", ["final", "best"])
def test_a_model_without_its_optimizer_is_no_place_to_go_on_from(run, program, name):
    (run / "checkpoints" / "best").mkdir()
    code, err = program("resume", run / "checkpoints" / name)
    assert code == 5
    assert code == program("resume", run, "--checkpoint", name)[0]
    assert f"`{name}` holds the model alone" in err
    assert "step-000001, step-000002, step-000003, step-000004" in err


def test_a_checkpoint_that_is_not_there_is_named_as_it_was_written(program):
    code, err = program("train", "--resume-from-checkpoint", "nosuch")
    assert code == 5
    assert "there is no folder `nosuch`\n  where: --resume-from-checkpoint" in err


def test_a_folder_of_runs_is_answered_with_one_of_them(run, program):
    code, err = program("generate", run.parent, "hi")
    assert code == 4
    assert f"holds runs, no config.json\n  where: RUN|MODEL\n  fix: name one of them, for example {run}" in err


@pytest.mark.parametrize(
    "words",
    [("resume", "{}/checkpoints/step-000002"), ("train", "--resume-from-checkpoint", "{}/checkpoints/step-000002")],
    ids=["resume", "train"],
)
def test_the_way_out_of_another_training_is_an_option_of_the_same_command(run, program, words):
    command = [*(word.format(run) for word in words), "training.max_steps=3", "--no-cuda"]
    code, err = program(*command)
    assert code == 5
    (option,) = set(re.findall(r"say (--[a-z-]+)", err))
    code, err = program(*command, *shlex.split(option))
    assert code == 0, err
    assert "finished after step 3" in err


def test_a_run_that_is_longer_than_its_config_now_asks_for_says_so(run, program):
    code, err = program("resume", run, "training.max_steps=2", "--allow-changes", "--no-cuda")
    assert code == 0, err
    assert "the run is 2 steps long now, and 4 are done: none is left to train" in err


def test_allowing_changes_of_a_new_run_is_refused(program):
    code, err = program("train", "--allow-changes")
    assert code == 2
    assert "--resume-from-checkpoint" in err


def test_the_model_that_a_run_saved_gives_its_name_to_the_next_one(run, program, rows_file, tmp_path):
    words = (f"model.name={run}/checkpoints/final", f"data.train={rows_file}", f"run.output_dir={tmp_path / 'next'}")
    code, err = program("train", *words, "training.max_steps=1", "tracking.trackers=[jsonl]", "--no-cuda")
    assert code == 0, err
    (made,) = (tmp_path / "next").iterdir()
    assert made.name.startswith("run-default-")


def test_files_in_one_text_with_commas_are_answered_with_the_list(program):
    code, err = program("train", "data.train=a.jsonl,b.jsonl", "model.name=custom-nano", "--dry-run")
    assert code == 3
    assert "'data.train=[a.jsonl,b.jsonl]'" in err


def test_a_config_with_the_other_ending_is_proposed(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("")
    code, err = program("train", "-c", "c.yml", "--dry-run")
    assert code == 2
    assert "did you mean `c.yaml`?" in err
