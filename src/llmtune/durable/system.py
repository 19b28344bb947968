"""The operations that change a disk, one by one, through a backend that tests can replace.

Every write, sync, rename, link and deletion of the program passes `Backend.call`. The real backend calls the operating
system; the backends of the tests count, fail, kill or trace at a chosen operation. An OSError becomes a `MachineError`
with the attempted action, the path, the system's own words, and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from llmtune.common.text import printable
from llmtune.errors import MachineError

__all__ = ["OPERATIONS", "Backend", "SystemBackend", "errno_of", "machine_error", "translate_os_errors", "use_backend"]


class Backend(Protocol):
    """Performs one operation of `OPERATIONS` with the arguments its `os` function takes."""

    def call(self, operation: str, *arguments: object) -> Any:
        """Perform `operation`; raises OSError as the operating system does."""


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":  # fsync there stops at the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "open": os.open,
    "write": os.write,
    "fsync": _sync,
    "truncate": os.ftruncate,
    "chmod": os.chmod,
    "rename": os.rename,
    "link": os.link,
    "symlink": os.symlink,
    "unlink": os.unlink,
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
}


class SystemBackend:
    """The operating system itself."""

    def call(self, operation: str, *arguments: object) -> Any:
        """Call the `os` function of `operation`."""
        return OPERATIONS[operation](*arguments)


_backends: list[Backend] = [SystemBackend()]  # the last one is in use


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[Backend]:
    """Send every operation of this process (all threads) through `backend` while the context lasts."""
    _backends.append(backend)
    try:
        yield backend
    finally:
        _backends.remove(backend)


# What a person can do about an errno; `machine_error` has a general line for those not listed.
_FIXES: dict[int, str] = {
    errno.ENOSPC: "free disk space there, or choose a folder on another disk",
    errno.EDQUOT: "free some of your disk quota there, or choose a folder on another disk",
    errno.EROFS: "the file system is mounted read-only: choose another folder, or have it mounted writable",
    errno.EIO: (
        "the disk or its connection is failing: look at the system's log, and copy what you need to another disk"
    ),
    errno.EACCES: "choose a folder you may write to, or change its permissions",
    errno.EPERM: "choose a folder you may write to, or change its permissions",
    errno.ENOENT: "make the folder first, or correct the path",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "a folder stands there: choose another path",
    errno.EEXIST: "something of that name stands there: choose another name, or move it away",
    errno.ENOTEMPTY: "something of that name stands there: choose another name, or move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open: raise the limit (`ulimit -n`)",
    errno.ENFILE: "too many files are open on this machine: close other programs",
    errno.EFBIG: "this file system cannot hold a file this large: choose a folder on another disk",
    errno.EXDEV: "both paths must be on the same disk",
}


def machine_error(error: OSError, action: str, path: str | os.PathLike[str], *, fix: str | None = None) -> MachineError:
    """Return `error` as a MachineError with the action, the path, the system's words and the fix, by errno if None.

    >>> print(machine_error(OSError(28, "No space left on device"), "write", "runs/a/state.json"))
    runs/a/state.json: cannot write: No space left on device (ENOSPC)
      fix: free disk space there, or choose a folder on another disk
    """
    number = error.errno or 0
    words = error.strerror or str(error) or "the system gave no reason"
    code = errno.errorcode.get(number, f"errno {number}")
    fix = fix or _FIXES.get(number, "check that the folder exists, is writable and is on a healthy disk")
    return MachineError(f"cannot {action}: {words} ({code})", where=printable(path), fix=fix)


def errno_of(error: BaseException) -> int | None:
    """Return the errno of the OSError behind `error` (itself or along its causes), or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.errno
        cause = cause.__cause__
    return None


@contextlib.contextmanager
def translate_os_errors(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise an OSError of the body as a MachineError about `action` at `path`."""
    try:
        yield
    except OSError as error:
        raise machine_error(error, action, path) from error


def call(operation: str, *arguments: object) -> Any:
    """Perform one operation through the backend in use; raises OSError."""
    return _backends[-1].call(operation, *arguments)


@contextlib.contextmanager
def open_descriptor(path: Path, flags: int) -> Iterator[int]:
    """Open a file descriptor (mode by the umask) and close it at the end; raises OSError."""
    descriptor = call("open", os.fspath(path), flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


_LARGEST_WRITE_BYTES = 64 << 20  # some systems refuse single writes of 2 GiB and more
_FRUITLESS_WRITES = 3  # a disk that accepts nothing and gives no error would be written to for ever


def write_fully(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`, continuing after short writes.

    Raises OSError; EIO when the system accepts no byte several times in a row.
    """
    # As bytes, because a view of floats would count in floats.
    rest = memoryview(data).cast("B")
    fruitless = 0
    while rest:
        count = call("write", descriptor, rest[:_LARGEST_WRITE_BYTES])
        fruitless = 0 if count else fruitless + 1
        if fruitless == _FRUITLESS_WRITES:
            raise OSError(errno.EIO, "the system writes nothing and gives no error")
        rest = rest[count:]


def sync_file(path: Path) -> None:
    """Wait until the content of `path` is on the disk; raises OSError."""
    with open_descriptor(path, os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
        call("fsync", descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in the folder `path` are on the disk; raises OSError."""
    with open_descriptor(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        try:
            call("fsync", descriptor)
        except OSError as error:
            # Some network and FUSE file systems cannot sync a folder; they offer no other way to do it.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
