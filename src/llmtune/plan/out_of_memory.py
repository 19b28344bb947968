"""When memory runs out in the middle of a run: what was asked for, held and planned, and what to change, with the
memory planned then.
"""

from __future__ import annotations

import mmap
import re
import resource
import traceback

import torch

from llmtune.common.bytes import readable_bytes
from llmtune.engine.allocator import release_free_memory
from llmtune.errors import LlmtuneError, MachineError
from llmtune.plan.forecast import Forecaster
from llmtune.plan.hardware import memory_for_us, resident_bytes
from llmtune.plan.suggestions import KEEPING_OVERRIDES, Change, changes

__all__ = ["asked_bytes", "open_reserve", "out_of_memory"]

MOST_EDITS = 3

RESERVE_BYTES = 256 << 20
"""Address space kept for the moment when there is no other: Python itself goes wrong without any.

Nothing of it is ever touched.
"""

_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)?", re.IGNORECASE)
_UNITS = {None: 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def open_reserve() -> mmap.mmap | None:
    """Set `RESERVE_BYTES` of untouched memory aside, to be closed when all other is used up.

    None where the system gives none.
    """
    try:
        return mmap.mmap(-1, RESERVE_BYTES)
    except OSError:
        return None


def asked_bytes(error: BaseException) -> int | None:
    """How much was asked for at once, where the error says it.

    >>> asked_bytes(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"))
    4096
    >>> asked_bytes(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."))
    2684354560
    """
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def out_of_memory(
    error: BaseException, forecaster: Forecaster, *, doing: str, where: str | None, saved: str | None
) -> MachineError:
    """Turn an error that `models.memory_errors` knows into a refusal with the numbers, and up to three edits with their
    planned memory.

    doing: `in step 7`, `while the model was loaded`. saved: the newest checkpoint, None where there is none. Lets go of
    what the failed step held, because looking for edits takes some memory too.
    """
    asked, held = asked_bytes(error), _held_bytes(forecaster)
    traceback.clear_frames(error.__traceback__)  # their local variables are the tensors of the step that failed
    _free(forecaster)
    wanted = f"{readable_bytes(asked)} more were asked for" if asked is not None else "more was asked for"
    problem = f"the memory is used up {doing}: {wanted}, {readable_bytes(held)} were held and {_limit(forecaster)}; {_planned(forecaster)}"
    kept = "nothing is saved yet" if saved is None else f"the newest checkpoint is {saved}"
    return MachineError(f"{problem}; {kept}", where, _fix(_edits(forecaster), can_go_on=saved is not None))


def _held_bytes(forecaster: Forecaster) -> int:
    return torch.cuda.memory_reserved() if forecaster.target.kind == "cuda" else resident_bytes()


def _free(forecaster: Forecaster) -> None:
    if forecaster.target.kind == "cuda":
        torch.cuda.empty_cache()
    else:
        release_free_memory()


def _limit(forecaster: Forecaster) -> str:
    """What there is: a device's memory, this machine's, or the limit that was set for this process."""
    if forecaster.target.kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"{forecaster.target.name} has {readable_bytes(total)}, {readable_bytes(free)} of them free now"
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    limited = (
        f" (its address space is limited to {readable_bytes(address_space)})"
        if address_space != resource.RLIM_INFINITY
        else ""
    )
    return f"this process could hold {readable_bytes(memory_for_us())} here{limited}"


def _planned(forecaster: Forecaster) -> str:
    try:
        return f"the plan was {readable_bytes(forecaster.memory().peak_bytes)}"
    except (
        LlmtuneError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        NotImplementedError,
    ):
        return "there was no plan for this model"


def _edits(forecaster: Forecaster) -> list[Change]:
    """Changes that need less, those that keep the result first."""
    try:
        found = changes(forecaster)
    except (
        LlmtuneError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        NotImplementedError,
    ):
        return []  # a model without a plan, or no memory left even to plan
    return sorted(found, key=lambda one: not one.overrides.startswith(KEEPING_OVERRIDES))[:MOST_EDITS]


def _fix(edits: list[Change], *, can_go_on: bool) -> str:
    if not edits:
        return "`llmtune plan` says what a run needs and what to change"
    listed = "; or ".join(f"{one.overrides} ({readable_bytes(one.peak_bytes)} planned)" for one in edits)
    if not can_go_on:
        return f"start again with {listed}"
    return f"go on with `llmtune resume`, or, where that changes the model or its optimizer, start again, with {listed}"
