"""What a run under attack is doing: its phase and how many of its file operations it has made, told through memory that
outlives its kill.

A watched process is a forked one that is going to be killed; nothing here runs in a training that anybody wants to
keep.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

from llmtune.durable.system import Backend, SystemBackend, use_backend

__all__ = ["ATTACKED", "PHASES", "Marker", "watched"]

PHASES = (
    "start",
    "data",
    "loading",
    "creating",
    "resuming",
    "training",
    "evaluation",
    "generation",
    "saving",
    "retention",
    "finishing",
)
"""What a process does, in about the order in which it does it."""

ATTACKED = ("resuming", "saving", "retention", "finishing")
"""Phases whose file operations are counted and attacked one by one."""

_PLACES: tuple[tuple[str, str], ...] = (
    ("llmtune.training.train:prepare", "data"),
    ("llmtune.training.train:build_setup", "loading"),
    ("llmtune.training.checkpointer:create", "creating"),
    ("llmtune.runs.folder:RunFolder.open", "resuming"),
    ("llmtune.training.checkpointer:find_checkpoint", "resuming"),
    ("llmtune.training.training_run:Session.restore", "resuming"),
    ("llmtune.training.training_run:Session.go", "training"),
    ("llmtune.training.evaluator:Observer.look", "evaluation"),
    ("llmtune.training.evaluator:generate", "generation"),
    ("llmtune.training.evaluator:count_exact_answers", "generation"),
    ("llmtune.training.checkpointer:Keeper.save", "saving"),
    ("llmtune.training.checkpointer:Keeper.keep_best", "saving"),
    ("llmtune.runs.checkpoint:delete_old_checkpoints", "retention"),
    ("llmtune.training.checkpointer:Keeper.write_final", "finishing"),
    ("llmtune.training.training_run:Session._let_go", "finishing"),
)
"""Function -> the phase that lasts while it runs; the innermost one counts."""

# What Python tells its audit hooks of the file system; writes and syncs it does not tell, those the backend sees.
_AUDITED = (
    "open",
    "os.listdir",
    "os.scandir",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
)


class Marker:
    """Phase and count of a process, in memory shared with its parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _LAYOUT.size)

    @property
    def phase(self) -> str:
        """The phase the process is in, or was in when it ended."""
        return PHASES[self._read()[0]]

    @property
    def calls(self) -> int:
        """File operations of `ATTACKED` phases so far."""
        return self._read()[1]

    def enter(self, phase: str) -> str:
        """Note the phase, and return the one before."""
        before, calls = self._read()
        _LAYOUT.pack_into(self._memory, 0, PHASES.index(phase), calls)
        return PHASES[before]

    def count(self) -> int:
        """Note one more operation where the phase is attacked, and return how many there were; 0 elsewhere."""
        phase, calls = self._read()
        if PHASES[phase] not in ATTACKED:
            return 0
        _LAYOUT.pack_into(self._memory, 0, phase, calls + 1)
        return calls + 1

    def _read(self) -> tuple[int, int]:
        phase, calls = _LAYOUT.unpack_from(self._memory)
        return phase, calls


_LAYOUT = struct.Struct("=II")


class _Watching:
    """A backend that counts writes and syncs, and ends the process at a chosen operation: in the middle of it when it
    is a write.
    """

    def __init__(self, marker: Marker, kill_at: int | None) -> None:
        self._marker, self._kill_at = marker, kill_at
        self._below: Backend = SystemBackend()

    def call(self, operation: str, *arguments: Any) -> Any:
        """Perform, count what no audit hook is told of, or end."""
        if operation in ("write", "fsync") and self._is_next():
            if operation == "write":
                self._below.call("write", arguments[0], arguments[1][: len(arguments[1]) // 2])
            _die()
        return self._below.call(operation, *arguments)

    def audit(self, event: str, _: tuple[Any, ...]) -> None:
        """Count an operation that Python announces, or end before it."""
        if event in _AUDITED and self._is_next():
            _die()

    def _is_next(self) -> bool:
        return self._marker.count() == self._kill_at


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watched(function: Callable[[], object], marker: Marker, *, kill_at: int | None = None) -> Callable[[], object]:
    """Return `function` for a forked process of its own: it tells `marker` its phase and operations, and ends itself at
    one of them.

    What is put around our functions stays there, so it must not be called in a process that goes on.
    """

    def run() -> object:
        for place, phase in _PLACES:
            _put_around(place, phase, marker)
        watching = _Watching(marker, kill_at)
        sys.addaudithook(watching.audit)
        with use_backend(watching):
            return function()

    return run


def _put_around(place: str, phase: str, marker: Marker) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)

    @functools.wraps(original)
    def marked(*arguments: Any, **named: Any) -> Any:
        before = marker.enter(phase)
        try:
            return original(*arguments, **named)
        finally:
            marker.enter(before)

    setattr(owner, name, staticmethod(marked) if inspect.ismethod(original) else marked)
