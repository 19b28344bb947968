"""The folder of a run: names, identity, lock, and finding it again."""

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from llmtune import durable
from llmtune.errors import CheckpointError, MachineError, UsageError
from llmtune.runs.folder import (
    RunFolder,
    checked_name,
    clean_name_part,
    create_run,
    find_newest_unfinished,
    list_runs,
    resolve_run,
)


def names_in(folder):
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "a; touch x $(id) && '\"`",
        "naïve-模型-🦙",
        "a b",
        "*?[x]",
        "~root",
        "CON",
        "a\u200d🦙",
        "x" * 200,
        "%s{0}",
        "a..b",
        "|&<>#!",
    ],
)
def test_whatever_is_only_a_name_is_one(tmp_path, name):
    """No value from config names something to run."""
    with create_run(tmp_path, name) as run:
        assert run.path == tmp_path / name
    assert names_in(tmp_path) == [name]
    assert resolve_run(name, tmp_path) == tmp_path / name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a/b", "path separator"),
        ("../a", "path separator"),
        ("/etc/x", "path separator"),
        ("a\\b", "path separator"),
        ("..", "starts with a dot"),
        (".", "starts with a dot"),
        (".hidden", "starts with a dot"),
        ("-rf", "starts with a dash"),
        ("a\nb", "control character"),
        ("a\x00b", "control character"),
        ("a\x1b[2Jb", "control character"),
        ("a\u202eb", "control character"),
        ("a\udc80", "control character"),
        (" a", "starts or ends with a space"),
        ("é" * 101, "longer than 200 bytes"),
    ],
)
def test_what_could_leave_the_folder_hide_or_disturb_a_terminal_is_refused(tmp_path, name, reason):
    """Writes stay under the run folder; the message itself is printable."""
    with pytest.raises(UsageError, match=reason) as caught:
        create_run(tmp_path / "runs", name)
    assert caught.value.problems[0].problem.isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("org/Model-1B", "Model-1B"),
        ("./m.gguf", "m.gguf"),
        ("C:\\a\\b", "b"),
        ("../..", "model"),
        ("a\x1b\nb", "ab"),
        ("x" * 500, "x" * 80),
        ("", "model"),
    ],
)
def test_a_model_id_gives_a_part_that_can_stand_in_a_name(text, part):
    assert clean_name_part(text) == part
    checked_name(part)


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    names = []
    for _ in range(3):
        with create_run(tmp_path, "a") as run:
            names.append(run.name)
            assert run.info["name"] == run.name
    assert names == ["a", "a-2", "a-3"]


def test_a_file_in_the_way_is_a_name_that_is_taken(tmp_path):
    (tmp_path / "a").write_text("mine")
    with create_run(tmp_path, "a") as run:
        assert run.name == "a-2"
    assert (tmp_path / "a").read_text() == "mine"


MAKE = """
import os, sys, time
from llmtune.runs.folder import create_run
print("ready", flush=True)
sys.stdin.read()
with create_run(sys.argv[1], "same") as run:
    print(run.name)
"""


def test_many_processes_that_ask_for_one_name_get_one_each(tmp_path):
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path)], **pipe) for _ in range(4)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.close()  # go
    names = sorted(worker.stdout.read().strip() for worker in workers)
    for worker in workers:
        worker.stdout.close()
        worker.wait()
    assert names == ["same", "same-2", "same-3", "same-4"]
    assert names_in(tmp_path) == names


def test_run_json_holds_the_identity_without_secrets(tmp_path, monkeypatch):
    """Planted canaries never show up."""
    monkeypatch.setenv("WANDB_API_KEY", "canary-in-the-environment")
    identity = {
        "versions": {"torch": "2"},
        "note": "canary-in-the-environment",
        "command": ["x", "hf_canary4canaryCanary"],
        "token": "canary",
    }
    with create_run(tmp_path, "a", details=identity) as run:
        run.update(state="stopped", api_key="canary", total_steps=3)
        assert run.state == "stopped"
    text = (tmp_path / "a" / "run.json").read_text()
    assert "canary" not in text
    info = json.loads(text)
    assert (info["versions"], info["total_steps"], info["state"]) == ({"torch": "2"}, 3, "stopped")
    assert len(info["run_id"]) == 32


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with create_run(tmp_path, "a"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "run.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


HOLD = """
import os, sys, time
from llmtune.runs.folder import RunFolder
run = RunFolder.open(sys.argv[1])
if sys.argv[2:]:
    if os.fork() == 0:
        time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that has the run."""
    processes = []

    def start(path, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout.readline().strip() == str(process.pid)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_two_processes_cannot_share_a_run_and_a_dead_ones_lock_is_free(tmp_path, holder):
    with create_run(tmp_path, "a") as run:
        path = run.path
    process = holder(path)
    assert durable.is_locked(path / ".lock")
    with pytest.raises(MachineError, match=f"the run is in use by process {process.pid} on "):
        RunFolder.open(path)
    with pytest.raises(CheckpointError, match="no unfinished run"):
        find_newest_unfinished(tmp_path)
    process.kill()
    process.wait()
    RunFolder.open(path).close()


def test_a_data_worker_that_outlives_its_killed_parent_does_not_keep_the_run(tmp_path, holder):
    with create_run(tmp_path, "a") as run:
        path = run.path
    process = holder(path, "with a child")
    process.kill()
    process.wait()
    RunFolder.open(path).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    """Two processes could write one run there."""
    with create_run(tmp_path, "a") as run:
        path = run.path

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(MachineError, match=f"cannot lock: .*{errno.errorcode[number]}(?s:.*)must have file locks"):
        RunFolder.open(path)
    assert durable.is_locked(path / ".lock")


def test_one_process_cannot_open_a_run_twice(tmp_path):
    with create_run(tmp_path, "a") as run, pytest.raises(MachineError, match="in use"):
        RunFolder.open(run.path)
    with RunFolder.open(run.path), pytest.raises(MachineError, match="in use"):
        RunFolder.open(run.path)


def test_reading_the_lock_file_does_not_free_it(tmp_path):
    with create_run(tmp_path, "a") as run:
        (run.path / ".lock").read_bytes()
        assert durable.is_locked(run.path / ".lock")


def test_opening_sweeps_what_a_killed_process_left_and_says_so(tmp_path):
    """P1: with one line each."""
    with create_run(tmp_path, "a") as run:
        path = run.path
    (path / "checkpoints" / ".llmtune-part-00000000-1-1").mkdir()
    (path / "checkpoints" / ".llmtune-old-best").mkdir()
    with RunFolder.open(path) as run:
        assert len(run.removed) == 2
    assert names_in(path / "checkpoints") == ["best"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"run_id": "x", "state": "odd"}', "[" * 100_000])
def test_what_is_no_run_is_refused_and_left_alone(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    before = names_in(tmp_path)
    with pytest.raises(CheckpointError):
        RunFolder.open(tmp_path)
    assert names_in(tmp_path) == before


def test_runs_are_listed_by_their_making_with_what_their_logs_say(tmp_path):
    for name, state in (("b", "finished"), ("a", "stopped"), ("c", "running")):
        with create_run(tmp_path, name, details={"total_steps": 9}) as run:
            run.update(state=state)
            with durable.AppendLog(run.path / "metrics.jsonl") as log:
                log.append({"step": 1, "train_mean_nll": 2.5})
                log.append({"step": 1, "eval_mean_nll": 2.25})
    (tmp_path / "no run").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    runs = list_runs(tmp_path)
    assert [(run.name, run.state) for run in runs] == [("b", "finished"), ("a", "stopped"), ("c", "interrupted")]
    assert runs[0][4:] == (1, 9, 2.5, 2.25, None, None)
    assert list_runs(tmp_path / "nowhere") == []


def test_the_newest_unfinished_run_is_found(tmp_path):
    for name, state in (("old", "stopped"), ("newer", "failed"), ("newest", "finished"), ("wild", "diverged")):
        with create_run(tmp_path, name) as run:
            run.update(state=state)
        time.sleep(0.001)
    assert find_newest_unfinished(tmp_path).name == "newer"
    assert resolve_run(None, tmp_path) == tmp_path / "newer"


def test_a_run_is_meant_by_its_folder_or_its_name(tmp_path, monkeypatch):
    with create_run(tmp_path / "runs", "a"):
        pass
    monkeypatch.chdir(tmp_path)
    assert resolve_run("runs/a", "elsewhere") == tmp_path / "runs" / "a"
    assert resolve_run("a", "runs") == tmp_path / "runs" / "a"
    with pytest.raises(CheckpointError, match=r"no run `b`[\s\S]*the runs there: a"):
        resolve_run("b", "runs")
