"""A lock that one living process holds; that of a dead process is free at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
import weakref
from pathlib import Path
from socket import gethostname
from typing import Any

from llmtune.common.text import printable
from llmtune.durable.folders import remove_tree
from llmtune.durable.system import call, translate_os_errors, write_fully
from llmtune.errors import MachineError

__all__ = ["FileLock", "ReadHold", "delete_unless_held", "is_locked"]

_PATIENCE_S = 0.5  # `is_locked` in another process holds the lock for a moment
_held: set[int] = set()


def _leave_to_the_parent() -> None:
    """Close the locks a forked child inherits: a data worker that outlives its parent must not keep the parent's run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


class FileLock:
    """The lock of the file `path`, held until `release` or the end of the process, however it ends."""

    def __init__(self, path: Path | str, what: str) -> None:
        """Take the lock. Raises MachineError "`what` is in use by process N" when a living process has it."""
        self.path = Path(path).absolute()
        with translate_os_errors("lock", self.path):
            self._descriptor = call(
                "open", os.fspath(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
            )
        try:
            if not _take(self._descriptor, _PATIENCE_S):
                raise _in_use(self.path, what, _owner(self._descriptor))
            with translate_os_errors("lock", self.path):
                call("truncate", self._descriptor, 0)
                write_fully(self._descriptor, json.dumps({"pid": os.getpid(), "machine": gethostname()}).encode())
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self._descriptor)

    def release(self) -> None:
        """Let another process have it; nothing happens the second time, or in a forked child."""
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1


def is_locked(path: Path | str) -> bool:
    """Say whether a living process (this one counts) has the lock of the file `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _take(descriptor, 0)
    finally:
        os.close(descriptor)


class ReadHold:
    """Says that a folder is being read, by a lock that many may share on one of its files, until the end of the
    holder's life.

    Raises FileNotFoundError when the file is not there, or goes while it is taken.
    """

    def __init__(self, path: Path | str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: then nobody can ask either
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                raise FileNotFoundError(errno.ENOENT, "it was just deleted", os.fspath(path))
        except BaseException:
            os.close(descriptor)
            raise
        _held.add(descriptor)
        weakref.finalize(self, _let_go, descriptor)


def _let_go(descriptor: int) -> None:
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def delete_unless_held(folder: Path, name: str) -> bool:
    """Delete `folder` unless a living process (this one counts) holds its file `name`; says whether it did.

    Raises MachineError.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if not _take(descriptor, 0):
            return False
        remove_tree(folder)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _take(descriptor: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, OSError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(path: Path, what: str, owner: dict[str, Any]) -> MachineError:
    who = f"process {owner['pid']} on {owner['machine']}" if {"pid", "machine"} <= owner.keys() else "another process"
    return MachineError(
        f"{what} is in use by {who}",
        where=printable(path.parent),
        fix="wait for it to end, or stop it (SIGTERM lets it save first)",
    )
