"""The Slurm script of examples/clusters; a real Slurm is not started here."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "clusters" / "train.sbatch"


def submitted(tmp_path, code):
    """Run the script with programs that stand for Slurm's, the training ending with `code`; what they were told."""
    told = tmp_path / "told"
    programs = {
        "scontrol": f'echo "scontrol $*" >> {told}; [ "$1" != show ] || printf "n1\\nn2\\n"',
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 "$@"',
        "llmtune": f'echo "llmtune $* $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR" >> {told}; exit {code}',
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "NAME": "a run"}
    done = subprocess.run(["bash", SCRIPT, "run.seed=1"], env=environment, capture_output=True, text=True)
    return done.returncode, told.read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "is_queued"), [(143, True), (138, True), (8, True), (0, False), (2, False), (7, False)]
)
def test_the_slurm_script_queues_a_stopped_job_again_and_no_other(tmp_path, code, is_queued):
    ended, told = submitted(tmp_path, code)
    assert "llmtune train --config config.yaml --name a run --resume auto run.seed=1 3 1 4 n1" in told
    assert (told[-1] == "scontrol requeue 7") == is_queued
    assert ended == (0 if is_queued else code)
