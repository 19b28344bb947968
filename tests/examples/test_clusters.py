"""The files of examples/clusters; no real cluster is started here."""

import os
import re
import runpy
import shlex
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from llmtune.cli.main import build
from llmtune.config.layers import load_config
from llmtune.config.schema import DistributedConfig
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
    codes = {"containerName": container["name"], "values": sorted([*LOST, *SAVED])}
    assert again == {"action": "Count", "onExitCodes": codes | {"operator": "In"}}
    assert fails == {"action": "FailJob", "onExitCodes": codes | {"operator": "NotIn"}}
    # Started again inside its pod, a container would not be judged by the rules.
    assert (pod["restartPolicy"], job["podReplacementPolicy"]) == ("Never", "Failed")


def test_the_pod_has_its_rows_runs_and_caches_on_the_volume_that_is_shipped():
    pod = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]
    claim, files = yaml.safe_load_all((FOLDER / "kubernetes-volume.yaml").read_text())
    (container,), (copier,) = pod["containers"], files["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["runs"] in files["spec"]["volumes"]
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert copier["volumeMounts"] == [{"name": "runs", "mountPath": mounts["runs"]}]
    given = parsed(container["command"])
    resources = container["resources"]
    assert (given["resume"], given["devices"]) == ("auto", resources["limits"]["nvidia.com/gpu"])
    assert resources["requests"].keys() == {"cpu", "memory"}
    assert str(Path(given["config"][0]).parent) == mounts["config"]
    paths = [word.partition("=")[2] for word in given["overrides"]]
    caches = {variable["name"]: variable["value"] for variable in container["env"]}
    assert [word.partition("=")[0] for word in given["overrides"]] == ["run.output_dir", "data.train"]
    assert caches.keys() == {"HF_HOME", "LLMTUNE_CACHE_DIR"}
    assert {Path(path).parent for path in [*paths, *caches.values()]} == {Path(mounts["runs"])}


def test_the_image_has_all_that_the_package_is_built_from():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [words[1:] for words in map(str.split, lines) if words[:1] == ["COPY"]]
    sources = {name for *names, _ in copied for name in names}
    assert all(target == "./" or [target] == names for *names, target in copied)
    assert [line for line in lines if line.endswith("'.[gpu]'")]
    pyproject = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    project, wheel = pyproject["project"], pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "gpu" in project["optional-dependencies"]
    packages = {Path(package).parts[0] for package in wheel["packages"]}
    assert sources == {
        "pyproject.toml", project["readme"], *project["license-files"], *packages, *wheel["force-include"],
    }  # fmt: skip


def test_the_skypilot_job_starts_again_by_the_exit_codes_of_llmtune():
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    volume = yaml.safe_load((FOLDER / "skypilot-volume.yaml").read_text())
    # A code that is named starts the job again however often: it must not be that of a failure.
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": sorted(SAVED), "max_restarts_on_errors": 3}
    assert volume["type"] == "k8s-pvc"  # SkyPilot has volumes on Kubernetes and RunPod only
    assert (task["resources"]["infra"], list(task["volumes"].values())) == (volume["infra"], [volume["name"]])
    words = shlex.split(task["run"].replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8").replace("\\\n", ""))
    assert words.pop(0) == "exec"  # else the signal would reach the shell alone
    given = parsed(words)
    assert (given["resume"], given["devices"], given["config"]) == ("auto", 8, ["config.yaml"])
    (folder,) = task["volumes"]
    assert given["overrides"] == [f"run.output_dir={folder}/runs"]
    assert task["envs"].keys() == {"HF_HOME", "LLMTUNE_CACHE_DIR"}
    assert all(Path(path).parent == Path(folder) for path in task["envs"].values())


def test_the_ray_script_gives_its_process_group_the_time_out_of_the_run_and_passes_other_words_on(monkeypatch):
    asked = {}

    class Trainer(SimpleNamespace):  # stands for Ray's
        def fit(self):
            asked.update(vars(self))

    torch = SimpleNamespace(TorchConfig=dict, TorchTrainer=lambda _, **named: Trainer(**named))
    train = SimpleNamespace(FailureConfig=dict, RunConfig=dict, ScalingConfig=dict)
    for name, module in {"ray": SimpleNamespace(), "ray.train": train, "ray.train.torch": torch}.items():
        monkeypatch.setitem(sys.modules, name, module)
    given = ["--workers", "2", "--name", "a run", "--timeout-s", "60", "run.seed=1", "--", "--config", "/c.yaml"]
    monkeypatch.setattr(sys, "argv", ["ray_train.py", *given])
    runpy.run_path(str(FOLDER / "ray_train.py"), run_name="__main__")
    assert asked["torch_config"] == {"timeout_s": 10 * 60}
    words = asked["train_loop_config"]["words"]
    assert words == ["--name", "a run", "distributed.timeout_s=60", "run.seed=1", "--config", "/c.yaml"]


def test_the_ray_script_waits_as_long_as_a_run_does_where_nothing_is_said():
    assert (
        f'"--timeout-s", type=int, default={DistributedConfig().timeout_s:g}' in (FOLDER / "ray_train.py").read_text()
    )
