"""P11 through whole runs: whatever a tracker meets, the run ends as the run without trackers, with one line, in bounded
time.

The bound: at the end all trackers together get 30 s (`TrackerQueue.finish`); nothing else waits for one.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmtune.cli.main import run as command
from training_fixtures import _planned_bytes, rows_file  # noqa: F401
from training_helpers import LORA, Forked, lines_of, weights_of

pytest.importorskip("wandb", reason="wandb is not installed")

END_S = 30.0
"""What all trackers together get at the end of a run."""
KEY = "a" * 40


class Refuser(BaseHTTPRequestHandler):
    status = 500

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def answering(status):
    """A server that gives every request the same answer; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Refuser,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def never_answering():
    """A server that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def nobody():
    """An address at which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{one.getsockname()[1]}"


class Runs:
    """Starts `llmtune` in a process and a working folder of its own."""

    def __init__(self, here, model, rows):
        self.here, self.model, self.rows = here, model, rows

    def words(self, name, trackers, *more):
        keys = {
            "model.name": self.model, "data.train": self.rows, "run.output_dir": "runs", "run.name": name, "data.test_size": 4,  # noqa: E501
            "training.batch_size": 2, "training.max_steps": 160, "training.epochs": 80, "training.learning_rate": 0.01,
            "training.precision": "fp32", "checkpoint.every_steps": 80, "evaluation.every_steps": 80,
            "tracking.trackers": f"[jsonl,{trackers}]" if trackers else "[jsonl]",
        }  # fmt: skip
        return ["train", *(f"{key}={value}" for key, value in keys.items()), *LORA, *more]

    def environ(self, **more):
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        kept.pop("HF_HUB_OFFLINE", None)
        own = {
            "HOME": str(self.here),
            "WANDB_CONFIG_DIR": str(self.here),
            "NETRC": str(self.here / "netrc"),
            "WANDB_API_KEY": KEY,
        }
        return {**kept, **own, **more}

    def start(self, *words, before=(), **environ):
        if before or environ or words[0] == "resume" or any("wandb" in word for word in words):
            return subprocess.Popen(
                [*before, sys.executable, "-m", "llmtune", *words],
                cwd=self.here, env=self.environ(**environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,  # noqa: E501
            )  # fmt: skip
        return Forked(lambda: self.command(words, environ))  # wandb starts a process of its own, and is left alone

    def command(self, words, environ):
        environment = self.environ(**environ)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(self.here)
        return command(list(words))

    def end(self, process, *, code=0):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == code, said
        assert "Traceback" not in said, said
        return said

    def run(self, *words, code=0, **more):
        return self.end(self.start(*words, **more), code=code)

    def run_forked(self, *words, **environ):
        """For a run in which wandb starts no process."""
        return self.end(Forked(lambda: self.command(words, environ)))

    def folder(self, name):
        return self.here / "runs" / name


@pytest.fixture(scope="module")
def runs(tiny_model_folder, rows_file, tmp_path_factory):  # noqa: F811
    return Runs(tmp_path_factory.mktemp("runs"), tiny_model_folder, rows_file)


def assert_the_same(runs, name, err, *trackers):
    """The finished run is byte for byte the one without trackers, and each broken tracker has one line."""
    if not runs.folder("plain").exists():
        runs.run(*runs.words("plain", ""))
    assert weights_of(runs.folder(name)) == weights_of(runs.folder("plain"))
    assert lines_of(runs.folder(name)) == lines_of(runs.folder("plain"))
    for tracker in trackers:
        said = [line for line in err.splitlines() if f"tracker {tracker}" in line]
        assert len([line for line in said if "switched off" in line]) == 1, err
        assert len(said) <= 2, err  # the second counts what the tracker never saw
    assert json.loads((runs.folder(name) / "run.json").read_text())["state"] == "finished"


def step_seconds(runs, name):
    lines = (json.loads(line) for line in (runs.folder(name) / "metrics.jsonl").read_text().splitlines())
    return sum(line["step_seconds"] for line in lines if "step_seconds" in line)


def training_seconds(runs, name):
    """By the clock, from the run's first file to its last checkpoint: also what lies between steps, which
    `step_seconds` leaves out.
    """
    folder = runs.folder(name)
    return (folder / "checkpoints" / "step-000160" / "manifest.json").stat().st_mtime - (
        folder / "config.yaml"
    ).stat().st_mtime


SERVERS = {
    "unreachable": nobody,
    "hanging": never_answering,
    "401": lambda: answering(401),
    "429": lambda: answering(429),
    "500": lambda: answering(500),
}


def assert_a_bad_server_costs_one_line(runs, which):
    """Beside a run without trackers that starts with it: whatever else takes the cores takes them from both."""
    beside = f"beside-{which}" if runs.folder("plain").exists() else "plain"
    with SERVERS[which]() as url:
        other, other_began = runs.start(*runs.words(beside, "")), time.time()
        began = time.monotonic()
        err = runs.run(*runs.words(which, "wandb"), WANDB_BASE_URL=url)
        took = time.monotonic() - began
    runs.end(other)
    beside_s = (runs.folder(beside) / "run.json").stat().st_mtime - other_began  # written when it ends
    assert_the_same(runs, which, err, "wandb")
    assert took < 2 * beside_s + END_S + 15, f"{took:.0f} s, {beside_s:.0f} s without trackers"
    assert step_seconds(runs, which) < 2 * step_seconds(runs, beside) + 1
    assert training_seconds(runs, which) < 2 * training_seconds(runs, beside) + 1


def test_p11_wandb_that_never_answers_costs_a_run_one_line(runs):
    assert_a_bad_server_costs_one_line(runs, "hanging")


@pytest.mark.campaign
@pytest.mark.parametrize("which", [which for which in SERVERS if which != "hanging"])
def test_p11_a_wandb_server_that_refuses_costs_a_run_one_line(runs, which):
    assert_a_bad_server_costs_one_line(runs, which)


def children_of(process):
    """Ids of the processes that descend from one."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, pending = [], [process]
    while pending:
        above = pending.pop()
        below = [one for one, parent in parents.items() if parent == above]
        found += below
        pending += below
    return found


@pytest.mark.campaign
def test_p11_wandb_s_own_process_may_die_in_the_middle_of_a_run(runs):
    process = runs.start(*runs.words("dying", "wandb", "tracking.wandb_mode=offline"))
    deadline = time.monotonic() + 120
    while not list(runs.folder("dying").glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed = [one for one in children_of(process.pid) if "wandb" in Path(f"/proc/{one}/cmdline").read_text()]
    for one in killed:
        os.kill(one, signal.SIGKILL)
    err = runs.end(process)
    assert killed
    assert_the_same(runs, "dying", err, "wandb")


@pytest.mark.campaign
def test_p11_folders_no_tracker_can_write_cost_a_resumed_run_one_line_each(runs):
    """What a read-only folder does, without asking the system for one: a file stands where the folder should be."""
    stop = runs.words("blocked", "tensorboard,wandb", "training.max_minutes=1e-6", "tracking.wandb_mode=offline")
    runs.run_forked(*stop, WANDB_MODE="disabled")
    for name in ("tensorboard", "wandb"):
        shutil.rmtree(runs.folder("blocked") / name)
        (runs.folder("blocked") / name).write_text("in the way")
    err = runs.run_forked("resume", str(runs.folder("blocked")), "training.max_minutes=null", "--allow-changes")
    assert_the_same(runs, "blocked", err, "tensorboard", "wandb")


@pytest.mark.campaign
@pytest.mark.parametrize("options", ["ro", "size=16k"])
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_p11_a_tracker_s_folder_may_be_read_only_or_full(runs, tracker, options):
    """A file system of its own is laid over the folder of a stopped run, which then goes on."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this system lets no process lay a file system over a folder of its own")
    name = f"{tracker} {options}"
    more = [
        "tracking.watch=all",
        *(["tracking.wandb_mode=offline"] if tracker == "wandb" else []),
    ]  # some hundred kilobytes of histograms
    runs.run(*runs.words(name, tracker, "training.max_minutes=1e-6", *more))
    shell = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
    before = ("unshare", "-rm", "sh", "-c", shell, "sh", options, str(runs.folder(name) / tracker))
    err = runs.run("resume", str(runs.folder(name)), "training.max_minutes=null", "--allow-changes", before=before)
    assert_the_same(runs, name, err, tracker)


@pytest.mark.campaign
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_p11_a_tracker_whose_package_is_broken_costs_a_run_one_line(runs, tracker):
    folder = runs.here / f"broken {tracker}"
    (folder / tracker).mkdir(parents=True)
    (folder / tracker / "__init__.py").write_text("raise ImportError('half of it is missing')\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    err = runs.run(*runs.words(f"no {tracker}", tracker), PYTHONPATH=path)
    assert_the_same(runs, f"no {tracker}", err, tracker)


def test_p11_a_tracker_asked_for_and_not_installed_is_refused_before_anything_starts(runs, monkeypatch):
    """Not a failure in the middle of a run but a request that cannot be met: exit 6 with the command that installs it."""  # noqa: E501
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    said = runs.end(Forked(lambda: runs.command(runs.words("missing", "wandb"), {})), code=6)
    assert "pip install wandb" in said
    assert not runs.folder("missing").exists()
