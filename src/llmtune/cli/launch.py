"""`--devices N`: one process of the command for each device of this machine, by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from llmtune.cli.process import check_surroundings
from llmtune.common.environment import available_cores, launched_process, limit_spinning
from llmtune.common.text import print_line
from llmtune.errors import MachineError, RankLostError, UsageError
from llmtune.runs.signals import deferred_signals

__all__ = ["launch", "launches"]

SHUTDOWN_S = 24 * 60 * 60
"""Seconds that a stopped process may take to save before the launcher kills it. Each process ends by itself."""

RESTARTED = (RankLostError.exit_code, MachineError.exit_code)
"""Exit codes after which the same command may do better; a wrong config or a diverged run would fail again."""


def launches(devices: int) -> bool:
    """Whether this process has to start those that train on the devices that were asked for, and is none of them yet.

    Raises UsageError where another launcher has started another number of them, MachineError where it does not say so.
    """
    started = launched_process().world_size
    if "WORLD_SIZE" not in os.environ:
        return True
    if started != devices:
        problem = f"{devices} devices were asked for, and {started} processes are started already"
        raise UsageError(problem, "--devices", "leave it out under another launcher, which decides how many train")
    return False


def launch(devices: int, words: Sequence[str], *, max_restarts: int = 0) -> int:
    """Run `llmtune WORDS` in `devices` processes that train together, and return the exit code of the run.

    They are started again, at most `max_restarts` times, where they may do better then (`RESTARTED`). Signals are
    passed on. Each process takes its share of the cores unless OMP_NUM_THREADS is set. Raises UsageError for fewer than
    one device.
    """
    if devices < 1:
        raise UsageError(f"{devices} devices were asked for", "--devices", "name how many processes train, from 1")
    check_surroundings()
    limit_spinning()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // devices)))
    for left in range(max_restarts, -1, -1):
        code = _launch_once(devices, words)
        if code not in RESTARTED or not left:
            break
        print_line(f"\nllmtune: exit code {code}: starting again ({left - 1} more times)")
    return code


def _launch_once(devices: int, words: Sequence[str]) -> int:
    with deferred_signals():  # of torch's imports a few swallow what Ctrl-C raises in them
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What the launcher says of a signal or a failure stands in the message of the process itself.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id="llmtune",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
        local_addr="localhost",
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGUSR1",
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "llmtune", *words)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return RankLostError.exit_code if code < 0 else code  # negative: it was killed, and the others left
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
