"""Settings of the process that libraries read when they are loaded: no connections, and less spinning.

OpenMP's threads spin while they wait for each other, before they sleep: alone on a machine that saves the time of
waking up. Beside other work a spinning thread holds the core that the thread it waits for needs, and a training takes
3 to 10 times as long (docs/performance.md).
"""

from __future__ import annotations

import os
import sys

from llmtune.common.decisions import Decision

__all__ = ["available_cores", "go_offline", "is_offline", "limit_spinning", "spinning_in_force"]


LIMITS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""GNU's runtime, which torch's wheels for Linux contain, counts rounds (300,000 by default); LLVM's and Intel's, which
those for macOS and conda's packages use, milliseconds (200 by default). 1,000 rounds cost nothing alone; none at all
(`OMP_WAIT_POLICY=passive`) cost 12 to 19 %."""

OWN_SETTINGS = (*LIMITS, "OMP_WAIT_POLICY", "KMP_LIBRARY")
"""Variables with which a user decides it."""


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
