"""Several processes of one command, as launchers start them, and two machines in network namespaces."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import pytest

from llmtune.cli.main import run as command
from training_helpers import Forked, line_count

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmtune"]
LONGEST_S = 180
LONG = "training.max_steps=100000"
RECORD = os.environ.get("LLMTUNE_RECORD")
"""A file that gets one line of JSON for each signal or death, so that campaigns made in parts are counted together."""


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "LLMTUNE_OFFLINE": "1"} | more


def launched(*words, code=0, launcher=LAUNCHER):
    """Run a command under a launcher and return what all of its processes printed."""
    done = subprocess.run(
        [*launcher, *words], env=environment(), capture_output=True, text=True, timeout=LONGEST_S, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    return said


def processes_of(run):
    """{rank: process id} of the processes that train this run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = dict(part.split("=", 1) for part in (folder / "environ").read_text().split("\0") if "=" in part)
        except (OSError, ValueError):
            continue
        if f"run.name={run}" in words and "RANK" in variables and "torch.distributed.run" not in words:
            found[variables["RANK"]] = int(folder.name)
    return found


def places(address="127.0.0.1", count=2):
    """The variables by which a launcher tells each process where they meet and who it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": address, "MASTER_PORT": port}
    return [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def end_of(processes, *, longest_s=LONGEST_S):
    """Wait for all, and return their exit codes and what each printed."""
    try:
        said = [process.communicate(timeout=longest_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], said


def in_two_ranks(function):
    """Run `function()` in two forked processes, as a launcher starts them: their exit codes and what each printed."""
    return end_of([Forked(function, environ=environment(**place)) for place in places()])


def ordinary_command(words):
    """A command in a forked process with the warnings of an ordinary one; other packages have some."""
    warnings.simplefilter("ignore")
    return command(words)


class TwoRanks:
    """Two processes of one command, as a launcher starts them, each with its output and exit code of its own.

    They are forked, so that they need not import the libraries, unless they are of another program or machine.
    """

    def __init__(self, *words, own=((), ()), program=(), machines=((), ()), address="127.0.0.1"):
        """`own`: further words of each process. `machines`: what starts a command on each machine."""

        def start(rank, place):
            given = [*words, *own[rank]]
            if not program and not machines[rank]:
                return Forked(lambda: command(given), environ=environment(**place))
            return subprocess.Popen(
                [*machines[rank], sys.executable, *(program or ("-m", "llmtune")), *given],
                env=environment(**place),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        self.processes = [start(rank, place) for rank, place in enumerate(places(address))]

    def end(self):
        """Wait for both, and return their exit codes and what each printed."""
        return end_of(self.processes)


def recorded(**what):
    """Write down what became of a run, where a record is kept."""
    if RECORD:
        with Path(RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


def wait_for_lines(run, count):
    deadline = time.monotonic() + LONGEST_S
    while line_count(run / "metrics.jsonl") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="making network namespaces needs root and iproute2"
)


class TwoMachines:
    """Two network namespaces with a cable between them."""

    def __init__(self):
        self.names = [f"llmtune-{uuid.uuid4().hex[:6]}" for _ in range(2)]
        self.ends = [name.replace("llmtune", "v") for name in self.names]

    def __enter__(self):
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", self.ends[0], "netns", self.names[0], "type", "veth",
            "peer", "name", self.ends[1], "netns", self.names[1])  # fmt: skip
        for number, (name, end) in enumerate(zip(self.names, self.ends, strict=True), 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            _ip("netns", "del", name)

    def start(self, *words):
        machines = [
            ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}")
            for name, end in zip(self.names, self.ends, strict=True)
        ]
        return TwoRanks(*words, machines=machines, address="10.77.0.1")

    def cut(self, end=0):
        """Pull the cable out of this machine; nobody is told."""
        _ip("-n", self.names[end], "link", "set", self.ends[end], "down")


def sent_between(function, count):
    """Run `function()` in so many processes of a network of their own.

    Returns their exit codes, what they printed, and the bytes that they have sent to each other, by its interface.
    """

    def run():
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        _ip("link", "set", "lo", "up")
        codes, said = end_of([Forked(function, environ=environment(**place)) for place in places(count=count)])
        (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if "lo:" in line]
        sent = int(line.partition(":")[2].split()[8])
        print(json.dumps({"codes": codes, "said": "".join(said), "sent": sent}))

    done = Forked(run)
    (line,) = done.communicate(timeout=LONGEST_S)[0].splitlines()[-1:]
    found = json.loads(line)
    return found["codes"], found["said"], found["sent"]


def sees_elsewhere(path, there):
    """Let this process alone see the folder `there` at `path` from here on: its machine shares no storage."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for words in (("--make-rprivate", "/"), ("--bind", str(there), str(path))):
        subprocess.run(["mount", *words], check=True, capture_output=True)


CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
"""Of sched.h; `os.unshare` has them from Python 3.12 on."""


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
