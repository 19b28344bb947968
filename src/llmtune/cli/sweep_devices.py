"""`llmtune sweep --devices N`: the runs of a sweep side by side, each alone on one device in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from llmtune import durable
from llmtune.common.environment import available_cores, launched_process
from llmtune.common.text import print_line
from llmtune.config.sweep import SweepRun
from llmtune.errors import UsageError
from llmtune.runs.signals import StopRequest

__all__ = ["train_on_devices"]

PROGRAM = (sys.executable, "-m", "llmtune")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOOK_EVERY_S = 0.2


def train_on_devices(runs: Sequence[SweepRun], devices: int, words: Sequence[str], *, no_cuda: bool) -> dict[str, int]:
    """Train the runs, at most one at a time on each device; return the exit codes other than 0 by the run's name.

    On a CPU a device is a share of its cores. A run prints into `NAME.log` beside its folder. words: those after
    `llmtune` that train one run, whose name follows them.

    Raises UsageError for more devices than there are or under a launcher, StoppedBySignal after a signal, when every
    run is saved.
    """
    places = _environments(devices, no_cuda=no_cuda)
    waiting, free, failed = list(enumerate(runs, 1)), list(range(devices)), dict[str, int]()
    running: dict[subprocess.Popen[bytes], tuple[SweepRun, int]] = {}
    was_told = False
    with StopRequest() as stop:
        while running or (waiting and not stop.is_requested):
            while waiting and free and not stop.is_requested:
                (number, run), device = waiting.pop(0), free.pop(0)
                print_line(f"sweep   run {number} of {len(runs)} on device {device}: {run.name}")
                running[_start(run, [*words, run.name], places[device])] = run, device
            if stop.is_requested and not was_told:
                was_told = True
                for process in running:
                    process.terminate()
            time.sleep(_LOOK_EVERY_S)
            for process in [process for process in running if process.poll() is not None]:
                run, device = running.pop(process)
                free.append(device)
                if process.returncode:
                    failed[run.name] = process.returncode
                    print_line(f"sweep   exit code {process.returncode}: {run.path}.log")
        if stop.is_requested:
            raise stop.error("saved; the same command goes on")
    return failed


def _environments(devices: int, *, no_cuda: bool) -> list[dict[str, str]]:
    """The variables with which a process sees one device alone, for each. Raises UsageError, see above."""
    import torch

    if (started := launched_process().world_size) > 1:
        problem = f"{devices} runs at once were asked for, and {started} processes are started already"
        raise UsageError(problem, "--devices", "leave it out under another launcher: its processes share each run")
    found = 0 if no_cuda or not torch.cuda.is_available() else torch.cuda.device_count()
    if devices < 1 or (found and devices > found):
        problem = f"{devices} devices were asked for" + (f", and there are {found}" if found else "")
        raise UsageError(problem, "--devices", "name how many runs train at once, at most one on each device")
    if found:
        visible = [name for name in os.environ.get(_VISIBLE, "").split(",") if name] or list(map(str, range(found)))
        return [{_VISIBLE: name} for name in visible[:devices]]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // devices)))
    return [{"OMP_NUM_THREADS": threads}] * devices


def _start(run: SweepRun, words: Sequence[str], place: dict[str, str]) -> subprocess.Popen[bytes]:
    log = run.path.with_name(f"{run.name}.log")
    durable.make_folder(log.parent)
    with log.open("ab") as stream:
        # In a session of its own: Ctrl-C reaches this process alone, which passes it on once.
        return subprocess.Popen(  # noqa: S603 - this program again
            [*PROGRAM, *words],
            env=os.environ | place,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
