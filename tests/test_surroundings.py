"""P7, P8, P4 through whole runs: a full disk, a signal in any phase, files that would run code, secrets in the
environment.
"""

import errno
import json
import os
import shutil
import signal
import time

import pytest

from canaries import plant
from disk_faults import Counting
from llmtune import durable
from llmtune.cli.main import main
from llmtune.errors import MachineError, StoppedBySignal
from llmtune.training import train as training
from training_fixtures import _one_thread, _planned_bytes, config_of, rows_file  # noqa: F401
from training_helpers import LORA, lines_of, weights_of


class FullDisk(Counting):
    """Refuses every operation on a path that holds one of the words."""

    def __init__(self, *words):
        super().__init__()
        self.words = words

    def call(self, operation, *arguments):
        if any(word in str(one) for word in self.words for one in arguments):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().call(operation, *arguments)


class Interrupted(Counting):
    """Sends this process a signal at the first operation on a path that holds the word."""

    def __init__(self, word):
        super().__init__()
        self.word = word

    def call(self, operation, *arguments):
        if self.word and any(self.word in str(one) for one in arguments):
            self.word = ""
            os.kill(os.getpid(), signal.SIGTERM)
        return super().call(operation, *arguments)


def test_p7_a_disk_that_fills_during_a_run_costs_the_saves_and_never_the_run(config_of, tmp_path):  # noqa: F811
    whole = training.train(config_of(*LORA, name="whole")).folder
    with (
        durable.use_backend(FullDisk("step-000006", "step-000009", "step-000010")),
        pytest.raises(MachineError) as caught,
    ):
        training.train(config_of(*LORA, name="full"))
    assert caught.value.exit_code == 6
    run = tmp_path / "runs" / "full"
    assert durable.verify_manifest(run / "checkpoints" / "step-000003") == []
    assert [line["step"] for line in lines_of(run) if "train_mean_nll" in line] == list(range(1, 11))
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    training.resume(str(run))
    assert weights_of(run) == weights_of(whole)


def test_p8_a_signal_while_saving_is_answered_saved_and_the_run_ends_the_same(config_of, tmp_path):  # noqa: F811
    whole = training.train(config_of(*LORA, name="whole")).folder
    with durable.use_backend(Interrupted("step-000003")), pytest.raises(StoppedBySignal) as caught:
        training.train(config_of(*LORA, name="stopped"))
    assert caught.value.exit_code == 128 + signal.SIGTERM
    run = tmp_path / "runs" / "stopped"
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    training.resume(str(run))
    assert weights_of(run) == weights_of(whole)
    assert lines_of(run) == lines_of(whole)


@pytest.mark.parametrize("words", ["train ", "training "])
def test_p8_a_signal_before_the_first_step_leaves_no_run_behind(words, config_of, tmp_path):  # noqa: F811
    def print_line(text):
        if text.lstrip().startswith(words):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(StoppedBySignal, match="nothing to save yet"):
        training.train(config_of(*LORA), print_line=print_line)
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def test_p4_no_canary_fires_and_no_secret_is_written(tiny_model_folder, rows_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    secrets = {"WANDB_API_KEY": "canary5ecret0wandb0key", "HF_TOKEN": "hf_canary5ecret0hub0token"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    here, mark, model = tmp_path / "here", tmp_path / "mark", tmp_path / "here" / "model"
    shutil.copytree(tiny_model_folder, model)
    shutil.copy(rows_file, here / "rows.jsonl")
    monkeypatch.chdir(here)
    for folder in (here, model):
        plant(folder, mark)
    notes = f"run.notes=logged in with {secrets['WANDB_API_KEY']}"
    words = (
        "data.train=rows.jsonl",
        "training.max_steps=2",
        "training.batch_size=4",
        "adapter.method=lora",
        "tracking.trackers=[jsonl]",
    )
    assert (
        run("train", "model.name=./model", "--name", "r", *words, notes) == 2
    )  # a secret in a config is refused, and not repeated
    assert not (here / "runs").exists()
    assert run("train", "model.name=./model", "--name", "r", *words) == 0
    final = here / "runs" / "r" / "checkpoints" / "final"
    taken = here / "taken"
    shutil.copytree(final, taken)
    plant(taken, mark)
    assert run("generate", "taken", "hello", "--max-new-tokens", "2") == 0
    assert run("merge-lora", "taken", "--output", "merged") == 0
    assert run("evaluate", "./model", "--data", "rows.jsonl") == 0
    assert not mark.exists()
    out, err = capsys.readouterr()
    written = {path: path.read_bytes() for path in (here / "runs").rglob("*") if path.is_file()}
    assert len(written) > 10
    for secret in secrets.values():
        assert secret not in out + err
        assert [path for path, raw in written.items() if secret.encode() in raw] == []
