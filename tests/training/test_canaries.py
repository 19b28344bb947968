"""P4, P5: a file in a run's folders that would run code if it were opened as what it claims to be is found, and never
run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from canaries import plant
from disk_faults import Unsynced
from llmtune import durable
from llmtune.config.process_options import Options
from llmtune.errors import CheckpointError
from llmtune.runs.signals import StopRequest
from llmtune.training import train as training
from training_helpers import LORA, weights_of


@pytest.fixture
def stopped(config_of):
    """A run with checkpoints of steps 1 and 2, of three."""
    given = (*LORA, "checkpoint.every_steps=1", "training.max_steps=3")
    with durable.use_backend(Unsynced()):
        session = training.open_run(
            config_of(*given, name="stopped"), Options(), StopRequest(), print_line=lambda line: None
        )
        steps = session.steps()
        next(steps)
        next(steps)
        steps.close()
    return session.run.path


def test_p4_no_canary_in_a_runs_folders_fires_on_resume(stopped, config_of, tmp_path):
    """The real command, with the planted checkpoint as its working folder: it is set aside, the one before is used, the
    end is the same.
    """
    with durable.use_backend(Unsynced()):
        whole = training.train(
            config_of(*LORA, "checkpoint.every_steps=1", "training.max_steps=3", name="whole")
        ).folder
    mark = tmp_path / "mark"
    newest = stopped / "checkpoints" / "step-000002"
    for folder in (stopped, stopped / "checkpoints", newest):
        plant(folder, mark)
    command = [str(Path(sys.executable).parent / "llmtune"), "resume", str(stopped)]
    environ = {**os.environ, "PYTHONSTARTUP": str(newest / "modeling_x.py")}
    done = subprocess.run(command, cwd=newest, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not belong here" in done.stderr
    assert "set aside as step-000002.damaged" in done.stderr
    assert not mark.exists()
    assert weights_of(stopped) == weights_of(whole)


def test_p5_where_every_checkpoint_is_planted_nothing_is_used_and_nothing_runs(stopped, tmp_path):
    mark = tmp_path / "mark"
    for folder in (stopped / "checkpoints").glob("step-??????"):
        plant(folder, mark)
    with pytest.raises(CheckpointError, match="does not belong here") as caught:
        training.resume(str(stopped))
    assert caught.value.exit_code == 5
    assert not mark.exists()
