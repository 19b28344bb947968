"""The files of examples/clusters; no real cluster is started here."""

import os
import shlex
import signal
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from llmtune.cli.main import build
from llmtune.config.layers import load_config
from llmtune.errors import RankLostError

FOLDER = Path(__file__).parents[2] / "examples" / "clusters"
SCRIPT = FOLDER / "train.sbatch"


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


SAVED = [128 + signal.SIGTERM, 128 + signal.SIGUSR1]


def parsed(words):
    """What the program reads in the words of a training; its config keys must exist."""
    assert words[:2] == ["llmtune", "train"]
    train = build().get_command(None, "train")
    given = train.make_context("train", words[2:]).params
    load_config(None, overrides=given["overrides"])
    return given


def test_the_kubernetes_job_replaces_a_pod_by_the_exit_codes_of_llmtune():
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    evicted, again, fails = job["podFailurePolicy"]["rules"]
    assert (evicted["action"], evicted["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    codes = {"containerName": container["name"], "values": sorted([RankLostError.exit_code, 137, *SAVED])}
    assert again == {"action": "Count", "onExitCodes": codes | {"operator": "In"}}
    assert fails == {"action": "FailJob", "onExitCodes": codes | {"operator": "NotIn"}}
    # Started again inside its pod, a container would not be judged by the rules.
    assert (pod["restartPolicy"], job["podReplacementPolicy"]) == ("Never", "Failed")
    given = parsed(container["command"])
    assert (given["resume"], given["devices"]) == ("auto", container["resources"]["limits"]["nvidia.com/gpu"])
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(given["config"][0]).parent), given["overrides"][0].removeprefix("run.output_dir=")} <= mounted
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_skypilot_job_starts_again_by_the_exit_codes_of_llmtune():
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery == {
        "recover_on_exit_codes": sorted([RankLostError.exit_code, *SAVED]),
        "max_restarts_on_errors": 0,
    }
    words = shlex.split(task["run"].replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8").replace("\\\n", ""))
    assert words.pop(0) == "exec"  # else the signal would reach the shell alone
    given = parsed(words)
    assert (given["resume"], given["devices"], given["config"]) == ("auto", 8, ["config.yaml"])
    assert given["overrides"] == [f"run.output_dir={folder}" for folder in task["volumes"]]
