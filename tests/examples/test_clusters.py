"""The files of examples/clusters; no real cluster is started here."""

import os
import re
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


def submitted(tmp_path, code, *, job="JobState=RUNNING Reason=None", restarts=None):
    """Run the script with programs that stand for Slurm's, the training ending with `code`; what they were told."""
    told = tmp_path / "told"
    programs = {
        "scontrol": f"""echo "scontrol $*" >> {told}
            case "$1 $2" in
              "show hostnames") printf "n1\\nn2\\n" ;;
              "show job") printf "JobId=7 JobName=llmtune\\n   {job} Dependency=(null)\\n" ;;
            esac""",
        "srun": """while [[ $1 == --* ]]; do shift; done
            SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 "$@\"""",
        "llmtune": f"""echo "llmtune $* $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR" >> {told}
            echo "threads $SRUN_CPUS_PER_TASK $OMP_NUM_THREADS" >> {told}
            exit {code}""",
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurms = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    environment = os.environ | slurms | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "a run"}
    environment.pop("OMP_NUM_THREADS")  # the tests' own
    done = subprocess.run(["bash", SCRIPT, "run.seed=1"], env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, told.read_text().splitlines()


def is_queued_again(tmp_path, code, **named):
    """Whether the script queues a job again; it ends with the code of the training where it does not."""
    ended, told = submitted(tmp_path, code, **named)
    is_queued = told[-1] == "scontrol requeue 7"
    assert ended == (0 if is_queued else code)
    return is_queued


SAVED = [128 + signal.SIGTERM, 128 + signal.SIGUSR1]
KILLED = [128 + number for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV)]
LOST = [RankLostError.exit_code, *KILLED]


def test_the_slurm_script_tells_each_process_its_place_and_its_share_of_the_node(tmp_path):
    _, told = submitted(tmp_path, 0)
    assert "llmtune train --config config.yaml --name a run --resume auto run.seed=1 3 1 4 2 n1" in told
    assert "threads 8 8" in told


def test_the_slurm_script_asks_for_whole_nodes_and_lets_each_process_see_all_gpus():
    asked = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    given = dict(word.removeprefix("--").partition("=")[::2] for word in asked)
    assert given["gpus-per-node"] == given["ntasks-per-node"]
    assert {"cpus-per-task", "mem", "time", "requeue"} <= given.keys()
    assert "gpus-per-task" not in given  # choose_device takes cuda:LOCAL_RANK


@pytest.mark.parametrize("code", [*SAVED, *LOST])
def test_the_slurm_script_queues_a_stopped_job_again(tmp_path, code):
    assert is_queued_again(tmp_path, code)


@pytest.mark.parametrize("code", [0, 2, 7])
def test_the_slurm_script_queues_no_job_again_that_would_end_in_the_same_way(tmp_path, code):
    assert not is_queued_again(tmp_path, code)


@pytest.mark.parametrize("code", [SAVED[0], LOST[0]])
@pytest.mark.parametrize(
    ("job", "is_queued"),
    [  # as Slurm 22.05 prints them
        ("JobState=COMPLETING Reason=None", False),
        ("JobState=CANCELLED Reason=None", False),
        ("JobState=COMPLETING Reason=TimeLimit", True),
    ],
)
def test_the_slurm_script_queues_no_cancelled_job_again_but_one_that_is_out_of_time(tmp_path, code, job, is_queued):
    assert is_queued_again(tmp_path, code, job=job) == is_queued


@pytest.mark.parametrize("code", LOST)
def test_the_slurm_script_gives_up_a_job_that_loses_a_process_at_every_start(tmp_path, code):
    assert is_queued_again(tmp_path, code, restarts="19")
    assert not is_queued_again(tmp_path, code, restarts="20")


def test_the_slurm_script_queues_a_preempted_job_again_however_often(tmp_path):
    assert is_queued_again(tmp_path, SAVED[0], restarts="1000")


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
