"""`llmtune sync`: the record of a run reaches a tracker afterwards as it would have while it trained."""

import os
import subprocess
import sys

import pytest

from llmtune.cli.main import main
from report_helpers import make_run, quiet_losses
from tracking.test_wandb import history_of, records_of


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "a-run", quiet_losses(6), heldout=[(0, 4.0), (6, 2.0)])
    (folder / "config.yaml").write_text("tracking:\n  project: mine\n  tags: [t]\n")
    (folder / "checkpoints" / "final").mkdir(parents=True)
    (folder / "checkpoints" / "final" / "model.txt").write_text("weights")
    return folder


def command(*words):
    with pytest.raises(SystemExit) as ended:
        main(["sync", *map(str, words)])
    return ended.value.code


def test_tensorboard_gets_every_step_once(run, capsys):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    assert command(run, "--to", "tensorboard") == 0
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/mean_nll")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in enumerate(quiet_losses(6), 1)]
    assert [event.step for event in events.Scalars("eval/mean_nll")] == [0, 6]
    assert b"0 plain" in events.Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0]
    assert command(run, "--to", "tensorboard") == 2  # the lines would be there twice
    assert "already" in capsys.readouterr().err


@pytest.mark.campaign
def test_wandb_gets_the_record_and_on_request_the_model(run):
    """In a process of its own: wandb leaves threads behind."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(run.parent), "WANDB_CONFIG_DIR": str(run.parent), "WANDB_CACHE_DIR": str(run.parent)}
    words = [sys.executable, "-m", "llmtune", "sync", str(run), "--offline", "--artifact"]
    done = subprocess.run(
        words,
        env=environment | {"WANDB_DATA_DIR": str(run.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = records_of(run)
    (made,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (made.display_name, made.project) == ("a-run", "mine")
    assert "t" in made.tags
    losses = {line["step"]: line["train/mean_nll"] for line in history_of(records) if "train/mean_nll" in line}
    assert losses == dict(enumerate(quiet_losses(6), 1))
    answers = [line["step"] for line in history_of(records) if any(name.startswith("samples") for name in line)]
    assert answers == [0, 9]
    sent = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    sent += [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    assert [(artifact.name, artifact.type) for artifact in sent].count(("a-run", "model")) == 1


def test_a_run_without_a_final_model_sends_none(tmp_path, capsys):
    folder = make_run(tmp_path / "bare", quiet_losses(3))
    (folder / "config.yaml").write_text("run: {seed: 1}\n")
    assert command(folder, "--artifact") == 2
    assert "no final model" in capsys.readouterr().err
