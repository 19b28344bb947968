"""The error when memory runs out during a run: bytes requested, held and planned, and changes that need less."""

from __future__ import annotations

import mmap
import re
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from llmtune.common.memory import MEMORY_ERRORS, is_out_of_memory
from llmtune.common.text import readable_bytes
from llmtune.engine.allocator import release_free_memory
from llmtune.engine.probe import MODEL_ERRORS
from llmtune.errors import LlmtuneError, MachineError
from llmtune.plan.forecast import Forecaster
from llmtune.plan.hardware import attainable_bytes, resident_bytes
from llmtune.plan.suggestions import Suggestion, suggest

__all__ = ["Circumstances", "out_of_memory_refused", "requested_bytes"]

SHOWN_SUGGESTIONS = 3

RESERVE_BYTES = 256 << 20
"""Address space kept, and never touched, until no other is left: without any, Python cannot even raise an error."""

PLAN_ERRORS = (LlmtuneError, MemoryError, *MODEL_ERRORS)
"""Errors of planning for a model that has no plan, or where no memory is left even to plan."""

_REQUESTED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)?", re.IGNORECASE)
_UNITS = {None: 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Circumstances(NamedTuple):
    """When and where memory ran out, for the message."""

    doing: str
    """`in step 7`, `while the model was loaded`."""
    where: str | None
    saved: str | None
    """The newest checkpoint, None where there is none."""


@contextmanager
def out_of_memory_refused(forecaster: Forecaster, circumstances: Callable[[], Circumstances]) -> Iterator[None]:
    """Raise errors of memory that is used up in the body as MachineError with the numbers and up to three changes.

    circumstances: called when that happens; it may free memory.
    """
    reserve = _reserve_address_space()
    try:
        yield
    except MEMORY_ERRORS as error:
        # RuntimeError is among them, and most of those are something else.
        if not is_out_of_memory(error):
            raise
        if reserve is not None:
            reserve.close()  # planning the changes needs some address space
        raise _out_of_memory_error(error, forecaster, circumstances()) from error
    finally:
        if reserve is not None:
            reserve.close()


def _reserve_address_space() -> mmap.mmap | None:
    """Reserve RESERVE_BYTES of untouched memory, to be closed when all other is used up; None where that is refused."""
    try:
        return mmap.mmap(-1, RESERVE_BYTES)
    except OSError:
        return None


def requested_bytes(error: BaseException) -> int | None:
    """The size of the allocation that failed; None where the error has no such number.

    >>> requested_bytes(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."))
    4096
    >>> requested_bytes(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."))
    2684354560
    """
    match = _REQUESTED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def _out_of_memory_error(error: BaseException, forecaster: Forecaster, circumstances: Circumstances) -> MachineError:
    """Make the error. The tensors of the failed step are freed, because planning the changes takes memory too."""
    doing, where, saved = circumstances
    # Read first: the next lines free what was held.
    requested, held_bytes = requested_bytes(error), _held_bytes(forecaster)
    traceback.clear_frames(error.__traceback__)  # their local variables are the tensors of the step that failed
    _free(forecaster)
    request = f"{readable_bytes(requested)} more were asked for" if requested is not None else "more was asked for"
    numbers = f"{request}, {readable_bytes(held_bytes)} were held and {_limit(forecaster)}; {_planned(forecaster)}"
    checkpoint = "nothing is saved yet" if saved is None else f"the newest checkpoint is {saved}"
    problem = f"the memory is used up {doing}: {numbers}; {checkpoint}"
    return MachineError(problem, where, _fix(_suggestions(forecaster), can_resume=saved is not None))


def _held_bytes(forecaster: Forecaster) -> int:
    return torch.cuda.memory_reserved() if forecaster.target.kind == "cuda" else resident_bytes()


def _free(forecaster: Forecaster) -> None:
    if forecaster.target.kind == "cuda":
        torch.cuda.empty_cache()
    else:
        release_free_memory()


def _limit(forecaster: Forecaster) -> str:
    """The memory of the device, or of this machine for this process, with a limit that was set for the process."""
    if forecaster.target.kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"{forecaster.target.name} has {readable_bytes(total)}, {readable_bytes(free)} of them free now"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    is_limited = limit != resource.RLIM_INFINITY
    limited = f" (its address space is limited to {readable_bytes(limit)})" if is_limited else ""
    return f"this process could hold {readable_bytes(attainable_bytes(forecaster.target.shared_by))} here{limited}"


def _planned(forecaster: Forecaster) -> str:
    try:
        return f"the plan was {readable_bytes(forecaster.memory().peak_bytes)}"
    except PLAN_ERRORS:
        return "there was no plan for this model"


def _suggestions(forecaster: Forecaster) -> list[Suggestion]:
    """Changes that need less, those that keep the result first."""
    try:
        suggestions = suggest(forecaster)
    except PLAN_ERRORS:
        return []
    return sorted(suggestions, key=lambda suggestion: not suggestion.keeps_result)[:SHOWN_SUGGESTIONS]


def _fix(suggestions: list[Suggestion], *, can_resume: bool) -> str:
    if not suggestions:
        return "`llmtune plan` says what a run needs and what to change"
    listed = "; or ".join(
        f"{suggestion.overrides} ({readable_bytes(suggestion.peak_bytes)} planned)" for suggestion in suggestions
    )
    if not can_resume:
        return f"start again with {listed}"
    return f"go on with `llmtune resume`, or, where that changes the model or its optimizer, start again, with {listed}"
