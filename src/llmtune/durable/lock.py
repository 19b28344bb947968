"""File locks, for one writer (of a run) or many readers (of a cached folder); the death of a process frees them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname

from llmtune.common.text import printable
from llmtune.durable.folders import remove_tree
from llmtune.durable.system import call, machine_error, translate_os_errors, write_fully
from llmtune.errors import MachineError

__all__ = ["FileLock", "ReadLock", "delete_unless_locked", "is_locked", "waiting_lock"]

_TIMEOUT_S = 0.5  # `is_locked` in another process takes the lock for a moment
_NO_LOCKS = (
    "the file system must have file locks (Lustre: mounted with `-o flock`): have it so, or choose another folder"
)
_held_descriptors: set[int] = set()


def _close_inherited_locks() -> None:
    """Close the locks that a forked child inherits.

    A fork shares its parent's locks: a data worker that outlives the parent would keep the run locked.
    """
    for descriptor in _held_descriptors:
        os.close(descriptor)
    _held_descriptors.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)


class FileLock:
    """An exclusive lock on the file `path`, held until `release` or the end of the process."""

    def __init__(self, path: Path | str, subject: str) -> None:
        """Take the lock. Raises MachineError "`subject` is in use by process N" when a living process has it."""
        self.path = Path(path).absolute()
        with translate_os_errors("lock", self.path):
            self._descriptor = call(
                "open", os.fspath(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
            )
        try:
            try:
                is_free = _try_lock(self._descriptor, _TIMEOUT_S)
            except OSError as error:
                raise machine_error(error, "lock", self.path, fix=_NO_LOCKS) from error
            if not is_free:
                raise _in_use(self.path, subject, _owner(self._descriptor))
            with translate_os_errors("lock", self.path):
                # Written only for the message of others; the lock itself is the system's and ends with the process.
                call("truncate", self._descriptor, 0)
                write_fully(self._descriptor, json.dumps({"pid": os.getpid(), "machine": gethostname()}).encode())
        except BaseException:  # whatever happened, nothing else can close this descriptor
            os.close(self._descriptor)
            raise
        _held_descriptors.add(self._descriptor)

    def release(self) -> None:
        """Free the lock; a second call does nothing, nor does one in a forked child."""
        _close(self._descriptor)
        self._descriptor = -1


def is_locked(path: Path | str) -> bool:
    """Say whether a living process (this one counts) has an exclusive lock on the file `path`.

    True also where the file system has no locks: another machine, on which it has, may hold one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, 0)
    except OSError:
        return True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def waiting_lock(path: Path | str) -> Iterator[None]:
    """Run the body while no other process runs one for the file `path`; wait for their end first.

    Raises MachineError where the file cannot be made. On a file system without locks nobody waits.
    """
    with translate_os_errors("lock", Path(path)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with contextlib.suppress(OSError):
            while not _try_lock(descriptor, 1.0):  # in short waits, so that a signal is answered
                pass
        yield
    finally:
        os.close(descriptor)


class ReadLock:
    """A shared lock on the file `path` of a folder that is being read, held as long as this object lives.

    Raises FileNotFoundError when the file is missing, or is deleted while the lock is taken.
    """

    def __init__(self, path: Path | str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: `delete_unless_locked` deletes nothing
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Between open and lock another process may have deleted the folder; its lock would then be on a lost file.
            if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                raise FileNotFoundError(errno.ENOENT, "it was just deleted", os.fspath(path))
        except BaseException:  # whatever happened, nothing else can close this descriptor
            os.close(descriptor)
            raise
        _held_descriptors.add(descriptor)
        weakref.finalize(self, _close, descriptor)


def _close(descriptor: int) -> None:
    if descriptor in _held_descriptors:
        _held_descriptors.discard(descriptor)
        os.close(descriptor)


def delete_unless_locked(folder: Path, name: str) -> bool:
    """Delete `folder` unless a living process (this one counts) has a lock on its file `name`; say whether it did.

    Raises MachineError.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if not _try_lock(descriptor, 0):
            return False
        remove_tree(folder)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, timeout_s: float) -> bool:
    # Tried again and again, because flock has no time limit of its own.
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _owner(descriptor: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, OSError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(path: Path, subject: str, owner: dict[str, object]) -> MachineError:
    who = f"process {owner['pid']} on {owner['machine']}" if {"pid", "machine"} <= owner.keys() else "another process"
    return MachineError(
        f"{subject} is in use by {who}",
        where=printable(path.parent),
        fix="wait for it to end, or stop it (SIGTERM lets it save first)",
    )
