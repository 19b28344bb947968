"""What a process that will compute sets up before torch is imported."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtune.common.text import excerpt, is_text
from llmtune.common.threads import limit_spinning
from llmtune.engine.allocator import bound_kernel_caches, tune_allocator
from llmtune.errors import MachineError, UsageError

__all__ = [
    "allow_no_telemetry",
    "check_arguments",
    "check_surroundings",
    "check_working_folder",
    "prepare_process",
]

LIBRARY = "transformers.modeling_layers"
"""What brings torch and most of transformers with it."""


def prepare_process(*, trains: bool = False) -> None:
    """Quiet the libraries' progress bars and advice; llmtune says itself what it does.

    trains: the process takes many equal steps, so freed memory is kept for the next one, and the libraries it will need
    in any case are imported. Not for a merge, whose peak is promised. Raises what `check_surroundings` raises.
    """
    check_surroundings()
    limit_spinning()
    bound_kernel_caches()
    if trains:
        tune_allocator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if trains:
        _import_libraries()


def _import_libraries() -> None:
    """Import what every training needs, and take its half a million objects out of the collector's sight: they stay.

    Each of the collector's rounds would walk them all: a fifth of the time that importing takes.
    """
    if LIBRARY in sys.modules:
        return
    from llmtune.models.read_config import garbage_collection_paused
    from llmtune.runs.signals import deferred_signals

    with deferred_signals(), garbage_collection_paused():
        importlib.import_module(LIBRARY)
        gc.freeze()


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UsageError for an argument that holds bytes which are no text here: no config, prompt or report could
    repeat it.
    """
    for word in arguments:
        if not is_text(word):
            raise UsageError(
                f"`{excerpt(word)}` holds bytes that are not {_encoding()}", "command line", _encoding_fix()
            )


def check_surroundings() -> None:
    """Raise MachineError where the libraries we compute with cannot work, before one of them ends the process in its
    own way.
    """
    check_working_folder()
    if sys.flags.optimize > 1:
        problem = (
            "Python was told to drop docstrings (-OO, PYTHONOPTIMIZE=2), and transformers cannot work without its own"
        )
        raise MachineError(problem, "this process", "start it without; -O and PYTHONOPTIMIZE=1 are fine")


def check_working_folder() -> None:
    """Raise MachineError for a working folder that was deleted (torch could not be loaded), or whose name is no text
    here.
    """
    try:
        here = Path.cwd()
    except OSError as error:
        fix = "go to a folder that exists (`cd`), then run the same command again"
        raise MachineError(f"the working folder cannot be entered: {error.strerror}", "this process", fix) from error
    if not is_text(str(here)):
        problem = f"the name of the working folder holds bytes that are not {_encoding()}"
        raise MachineError(problem, excerpt(str(here), 4096), _encoding_fix())


def _encoding() -> str:
    return sys.getfilesystemencoding().upper()


def _encoding_fix() -> str:
    if _encoding() == "UTF-8":
        return "give the file or folder a name in UTF-8"
    return "set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8"


def allow_no_telemetry() -> None:
    """Tell the libraries below to report nothing home, whatever their default."""
    os.environ.update(
        {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "DISABLE_TELEMETRY": "YES",
            "WANDB_ERROR_REPORTING": "false",
        }
    )
