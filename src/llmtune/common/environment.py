"""What the environment settles: folders, connections, which of several processes this is, how long threads spin.

OpenMP's threads spin while they wait for each other, before they sleep: alone on a machine that saves the time of
waking up. Beside other work a spinning thread holds the core that the thread it waits for needs, and a training takes
3 to 10 times as long (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llmtune.common.decisions import Decision
from llmtune.common.text import excerpt
from llmtune.errors import MachineError

__all__ = [
    "LaunchedProcess",
    "available_cores",
    "cache_folder",
    "environment_error",
    "go_offline",
    "home_expanded",
    "is_offline",
    "launched_process",
    "launcher_number",
    "limit_spinning",
    "spinning_in_force",
    "state_folder",
    "user_cache_folder",
]


LIMITS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""GNU's runtime, which torch's wheels for Linux contain, counts rounds (300,000 by default); LLVM's and Intel's, which
those for macOS and conda's packages use, milliseconds (200 by default). 1,000 rounds cost nothing alone; none at all
(`OMP_WAIT_POLICY=passive`) cost 12 to 19 %."""

OWN_SETTINGS = (*LIMITS, "OMP_WAIT_POLICY", "KMP_LIBRARY")
"""Variables with which a user decides it."""


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LaunchedProcess(NamedTuple):
    """Which of the processes of a training this one is, as its launcher says; without one it is alone."""

    rank: int
    world_size: int
    local_world_size: int | None
    """Processes on this machine; None where the launcher does not say it."""


def launched_process(environ: Mapping[str, str] = os.environ) -> LaunchedProcess:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE: torch's names, which `torchrun` and most launchers set.

    No others: what a scheduler sets (SLURM_PROCID, PMI_RANK) is also there for a command that is to run alone. Raises
    MachineError where one is no such number, or RANK stands without WORLD_SIZE: each process would train a run alone.
    """
    world_size, rank = launcher_number("WORLD_SIZE", 1, environ), launcher_number("RANK", 0, environ)
    launcher_number("LOCAL_RANK", 0, environ)  # `choose_device` reads it, where there is a GPU
    local_world_size = launcher_number("LOCAL_WORLD_SIZE", 1, environ)
    if world_size is None and rank is not None:
        fix = "let the launcher set WORLD_SIZE too, as `torchrun` does; or unset RANK to train with this process alone"
        raise environment_error(f"RANK is {rank} and WORLD_SIZE is not set", fix)
    world_size = 1 if world_size is None else world_size
    if rank is not None and rank >= world_size:
        fix = "let the launcher count the processes from 0, as `torchrun` does"
        raise environment_error(f"RANK is {rank} and WORLD_SIZE is {world_size}", fix)
    return LaunchedProcess(rank or 0, world_size, local_world_size)


def launcher_number(
    name: str, least: int, environ: Mapping[str, str] = os.environ, *, most: int | None = None
) -> int | None:
    """Read a whole number that a launcher sets; None where it is not set. Raises MachineError for anything else.

    >>> launcher_number("LOCAL_RANK", 0, {"LOCAL_RANK": "3"})
    3
    """
    text = environ.get(name)
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= least and (most is None or number <= most):
            return number
    said, numbers = f"`{excerpt(text)}`" if text else "empty", f"from {least} to {most}" if most else f"from {least}"
    fix = f"let the launcher set it, as `torchrun` does, or unset {name}"
    raise environment_error(f"{name} is {said}, and must be a whole number {numbers}", fix)


def environment_error(problem: str, fix: str) -> MachineError:
    """Make the error for what a launcher sets: each process prints it, because each has an environment of its own."""
    error = MachineError(problem, "environment", fix)
    error.is_reported = False
    return error


def limit_spinning() -> None:
    """Limit the spinning of this process's threads, unless the environment says how they wait.

    A runtime reads its variables when it is loaded, with torch: in a process that has imported torch nothing is done.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in OWN_SETTINGS):
        os.environ.update(LIMITS)


def spinning_in_force() -> list[Decision]:
    """The limit as a decision, in a process that has it from `limit_spinning` (or from the process that started it)."""
    if any(os.environ.get(name) != LIMITS.get(name) for name in OWN_SETTINGS):
        return []
    reason = "threads that spin while they wait for each other keep other programs, and each other, from running"
    return [Decision("process.threads", "sleep soon while they wait", reason)]


def is_offline() -> bool:
    """Whether this process may open no connection: `--offline`, or the libraries' own switch."""
    return "1" in (os.environ.get("LLMTUNE_OFFLINE"), os.environ.get("HF_HUB_OFFLINE"))


def go_offline() -> None:
    """Set the environment such that the libraries make no connection; wandb keeps its records on disk."""
    os.environ.update(
        dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "LLMTUNE_OFFLINE"), "1")
    )
    if os.environ.get("WANDB_MODE") != "disabled":
        os.environ["WANDB_MODE"] = "offline"


def home_expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` expanded, or unchanged where there is no such home folder."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Llmtune's cache folder: `LLMTUNE_CACHE_DIR`, or `llmtune` in the user's cache folder; None without a home.

    >>> cache_folder({"XDG_CACHE_HOME": "/var/cache/me"}).as_posix()
    '/var/cache/me/llmtune'
    """
    if named := environ.get("LLMTUNE_CACHE_DIR"):
        return home_expanded(named)
    folder = user_cache_folder(environ)
    return folder / "llmtune" if folder else None


def user_cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The cache folder of all the user's programs: `XDG_CACHE_HOME` or `~/.cache`; None without a home."""
    return _user_folder("XDG_CACHE_HOME", ".cache", environ)


def state_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Llmtune's folder for crash files: `llmtune` in `XDG_STATE_HOME` or `~/.local/state`; None without a home."""
    folder = _user_folder("XDG_STATE_HOME", ".local/state", environ)
    return folder / "llmtune" if folder else None


def _user_folder(variable: str, below_home: str, environ: Mapping[str, str]) -> Path | None:
    if environ.get(variable):
        return Path(environ[variable])
    # A service may run without HOME; the user database may still name a home.
    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    return None if home == "~" else Path(home) / below_home
