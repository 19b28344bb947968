"""The set-up of a process that will compute, before torch is imported."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtune.common.environment import limit_spinning
from llmtune.common.text import excerpt, is_text
from llmtune.engine.allocator import bound_kernel_caches, grow_segments, tune_allocator
from llmtune.errors import MachineError, UsageError
from llmtune.runs.signals import deferred_signals, stop_with_launcher

__all__ = [
    "check_arguments",
    "check_surroundings",
    "check_working_folder",
    "escape_unencodable_output",
    "forbid_telemetry",
    "prepare_process",
    "yield_to_runs",
]

LIBRARY = "transformers.modeling_layers"
"""A module whose import imports torch and most of transformers."""


def prepare_process(*, trains: bool = False) -> None:
    """Set up threads and memory, and silence the progress bars and advice of the libraries.

    trains: the process takes many equal steps, so freed memory is kept for the next one, and the libraries that it will
    need in any case are imported. Not for a merge, whose peak memory is promised. Raises MachineError where the
    libraries cannot work.
    """
    if trains:
        stop_with_launcher()
    check_surroundings()
    # Before torch is imported: OpenMP reads its variables when it is loaded.
    limit_spinning()
    bound_kernel_caches()
    grow_segments()
    if trains:
        tune_allocator()
    # Its threads do not survive the fork of a data worker, and it warns at each one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Where a process of several is lost it prints C++ frames; the error that follows has the message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if trains:
        _import_libraries()


NICENESS = 10
"""Beside a thread that computes, such a process gets a tenth of a processor: a key is still answered at once."""


def yield_to_runs() -> None:
    """Lower the priority of this process: a run goes first where the processors do not suffice for both."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)


def _import_libraries() -> None:
    """Import the libraries of a training, and exempt their half a million objects from garbage collection.

    They live as long as the process, and each collection would walk them all: a fifth of the time of the import.
    """
    if LIBRARY in sys.modules:
        return
    from llmtune.models.read_config import garbage_collection_paused

    with deferred_signals(), garbage_collection_paused():
        # A signal in the middle of an import would leave half a library behind.
        importlib.import_module(LIBRARY)
        gc.freeze()


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UsageError for an argument with undecodable bytes: no config, prompt or report could repeat it."""
    for argument in arguments:
        if not is_text(argument):
            raise UsageError(
                f"`{excerpt(argument)}` holds bytes that are not {_encoding()}", "command line", _encoding_fix()
            )


def check_surroundings() -> None:
    """Raise MachineError where the libraries cannot work, before one of them fails with a message of its own."""
    check_working_folder()
    if sys.flags.optimize > 1:
        problem = (
            "Python was told to drop docstrings (-OO, PYTHONOPTIMIZE=2), and transformers cannot work without its own"
        )
        raise MachineError(problem, "this process", "start it without; -O and PYTHONOPTIMIZE=1 are fine")


def check_working_folder() -> None:
    """Raise MachineError for a working folder that was deleted (torch fails in it), or has undecodable bytes in it."""
    try:
        folder = Path.cwd()
    except OSError as error:
        fix = "go to a folder that exists (`cd`), then run the same command again"
        raise MachineError(f"the working folder cannot be entered: {error.strerror}", "this process", fix) from error
    if not is_text(str(folder)):
        problem = f"the name of the working folder holds bytes that are not {_encoding()}"
        raise MachineError(problem, excerpt(str(folder), 4096), _encoding_fix())


def _encoding() -> str:
    return sys.getfilesystemencoding().upper()


def _encoding_fix() -> str:
    if _encoding() == "UTF-8":
        return "give the file or folder a name in UTF-8"
    return "set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8"


def open_closed_streams() -> None:
    """Give a stream that the shell closed (`>&-`) nowhere to read from or write to, instead of none at all.

    Every command and library may then ask it whether it is a terminal. Its number is taken too, which the next file
    that is opened would get: a library that prints to number 1 would print into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - open as long as we run


def escape_unencodable_output() -> None:
    r"""Let stdout and stderr print characters outside their encoding as escapes (`\xe9`) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def forbid_telemetry() -> None:
    """Switch off the telemetry of the libraries."""
    os.environ.update(
        {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "DISABLE_TELEMETRY": "YES",
            "WANDB_ERROR_REPORTING": "false",
        }
    )
