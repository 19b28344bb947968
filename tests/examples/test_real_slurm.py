"""The Slurm script under a real Slurm, two nodes on this host.

Preempted it is queued again and finished to the same bytes. Cancelled it is saved and not queued again.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rank_helpers import LONG, LONGEST_S, TwoRanks, environment, wait_for_lines
from training_fixtures import rows_file  # noqa: F401
from training_helpers import lines_of, small_run, weights_of

SCRIPT = Path(__file__).parents[2] / "examples" / "clusters" / "train.sbatch"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
MISSING = [
    *(["root"] if os.geteuid() != 0 else []),
    *(f"{name} (apt-get install slurmctld slurmd slurm-client)" for name in PROGRAMS if shutil.which(name) is None),
]
pytestmark = [pytest.mark.campaign, pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")]

SETTINGS = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
SchedulerType=sched/builtin
SelectType=select/linear
SwitchType=switch/none
TaskPlugin=task/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=90 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=2 MaxTime=INFINITE
"""
"""No authentication: nobody else is there. The first node has the name of this host, which is where the processes meet.
After `cred_expire` seconds a job that is queued again may start.
"""


NODES = ("--nodes=2", "--ntasks-per-node=1")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Slurm:
    """A controller and two nodes."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"), PATH=_path_with_llmtune())

    def __enter__(self):
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        host = socket.gethostname().partition(".")[0]
        nodes = (host, f"{host}-second")
        for name in ("state", *nodes):
            (self.folder / name).mkdir()
        text = SETTINGS.format(folder=self.folder, host=host, second=nodes[1], ports=ports)
        (self.folder / "slurm.conf").write_text(text)
        for command in (["slurmctld"], *(["slurmd", "-N", node] for node in nodes)):
            self.daemons.append(subprocess.Popen([*command, "-D"], env=self.environment, **QUIET))
        try:
            self.wait_until(lambda: self.say("sinfo", "--noheader", "--format=%T", "-p", "low").split() == ["idle"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=self.environment, check=False, **QUIET)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()

    def say(self, *words, **named):
        done = subprocess.run(words, env=self.environment | named, cwd=self.folder, capture_output=True, text=True)
        return done.stdout

    def submit(self, *words, **named):
        (number,) = re.findall(r"\d+", self.say("sbatch", *words, **named))
        return number

    def job(self, number):
        """What Slurm says of a job, key by key."""
        return dict(re.findall(r"(\w+)=(\S*)", self.say("scontrol", "show", "job", number)))

    def wait_until(self, holds):
        deadline = time.monotonic() + LONGEST_S
        while not holds():
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)


def submit_training(slurm, config, name, *given):
    """Submit the script for one process on each node; these nodes have one processor and no GPU."""
    script = slurm.folder / "train.sbatch"
    script.write_text(SCRIPT.read_text().replace("#SBATCH --gpus-per-node=8\n", ""))
    return slurm.submit(*NODES, "--cpus-per-task=1", str(script), *given, CONFIG=str(config), NAME=name)


def _path_with_llmtune():
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_p8_a_preempted_job_saves_is_queued_again_and_finishes_to_the_same_bytes(
    tiny_model_folder,
    rows_file,  # noqa: F811
    tmp_path,
):
    runs = tmp_path / "runs"
    config = tmp_path / "config.yaml"
    config.write_text("training:\n  max_steps: 400\n")
    given = small_run(tiny_model_folder, rows_file, runs, "checkpoint.every_steps=1000", "distributed.timeout_s=60")
    (tmp_path / "slurm").mkdir()
    with Slurm(tmp_path / "slurm") as slurm:
        number = submit_training(slurm, config, "preempted", *given)
        wait_for_lines(runs / "preempted", 20)
        urgent = slurm.submit("--partition=high", *NODES, "--wrap", "sleep 1")
        slurm.wait_until(lambda: slurm.job(urgent).get("JobState") == "COMPLETED")
        info = json.loads((runs / "preempted" / "run.json").read_text())
        said = (slurm.folder / f"slurm-{number}.out").read_text()
        assert info["state"] == "stopped", said
        assert 10 <= info["step"] < 400  # of 20 lines, some are evaluations
        slurm.wait_until(lambda: slurm.job(number).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED"))
        said, job = (slurm.folder / f"slurm-{number}.out").read_text(), slurm.job(number)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert said.count("saved; queued again") == 1, said
    assert said.count(f"stopped by SIGTERM: saved after step {info['step']}") == 1, said
    assert json.loads((runs / "preempted" / "run.json").read_text())["state"] == "finished"
    assert [path.name for path in runs.iterdir() if path.is_dir()] == ["preempted"]
    codes, said = TwoRanks("train", "--config", str(config), *given, "run.name=whole").end()
    assert codes == [0, 0], said
    assert weights_of(runs / "preempted") == weights_of(runs / "whole")
    assert lines_of(runs / "preempted") == lines_of(runs / "whole")


def test_p8_a_cancelled_job_saves_and_is_not_queued_again(tiny_model_folder, rows_file, tmp_path):  # noqa: F811
    runs, config = tmp_path / "runs", tmp_path / "config.yaml"
    config.write_text(f"training:\n  max_steps: {LONG.partition('=')[2]}\n")
    given = small_run(tiny_model_folder, rows_file, runs, "checkpoint.every_steps=1000", "distributed.timeout_s=60")
    (tmp_path / "slurm").mkdir()
    with Slurm(tmp_path / "slurm") as slurm:
        number = submit_training(slurm, config, "cancelled", *given)
        wait_for_lines(runs / "cancelled", 20)
        slurm.say("scancel", number)
        slurm.wait_until(lambda: slurm.job(number).get("JobState") != "RUNNING")
        # Until the script has ended it is COMPLETING; one that was queued again would be PENDING then.
        slurm.wait_until(lambda: slurm.job(number).get("JobState") != "COMPLETING")
        said, job = (slurm.folder / f"slurm-{number}.out").read_text(), slurm.job(number)
        assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), said
    assert said.count("saved; cancelled, not queued again") == 1, said
    assert json.loads((runs / "cancelled" / "run.json").read_text())["state"] == "stopped", said
