"""Single files: written beside, synced and renamed, so that a name always stands for a whole file, the old or the new
one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from socket import gethostname
from typing import Any, NamedTuple

from llmtune.durable.system import call, opened, sync_folder, translate_os_errors, write_fully
from llmtune.errors import LlmtuneError

__all__ = [
    "UNFINISHED_PREFIX",
    "json_text",
    "link_or_copy",
    "make_folder",
    "rename",
    "write_bytes",
    "write_json",
    "write_stream",
    "write_text",
]

UNFINISHED_PREFIX = ".llmtune-"
"""How the name of everything unfinished begins: what a process is writing, and what it is about to replace."""
PART_PREFIX = f"{UNFINISHED_PREFIX}part-"
_numbers = itertools.count(1)
live_parts: set[str] = set()  # names this process is working on now; a sweep leaves them alone


class Written(NamedTuple):
    """What was handed to the system for one file: bytes, sha256 in hex, and the stamp by which a later change is
    noticed.
    """

    size: int
    sha256: str
    stamp: tuple[int, int, int]


class Staging:
    """A folder being filled: plain files are written straight into it, because none of its names is final yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, Written] = {}


stagings: list[Staging] = []


def staging_of(path: Path) -> Staging | None:
    """Return the staging folder `path` lies in, if any."""
    parents = path.parents
    return next((one for one in stagings if one.folder in parents), None)


def part_name() -> str:
    """Return a new name for something unfinished: it tells the machine and the process that works on it."""
    machine = zlib.crc32(gethostname().encode("utf-8", "replace"))
    return f"{PART_PREFIX}{machine:08x}-{os.getpid()}-{next(_numbers)}"


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file is written again: inode, bytes, modification time in nanoseconds."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def write_stream(path: Path | str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write `chunks` as the file `path`, whole or not at all: beside it, synced, renamed, folder synced.

    The mode follows the umask. Inside a staging folder of `commit_folder` the file is written in place, because the
    commit syncs it. Raises MachineError, and then the old file, if there was one, is untouched.
    """
    path = Path(path).absolute()
    staging = staging_of(path)
    with translate_os_errors("write", path):
        if staging is not None:
            staging.written[os.fspath(path)] = _write_new(path, chunks, sync=False)
            return
        part = path.parent / part_name()
        live_parts.add(part.name)
        try:
            _write_new(part, chunks, sync=True)
            call("rename", os.fspath(part), os.fspath(path))
        except BaseException:
            with contextlib.suppress(OSError):
                call("unlink", os.fspath(part))
            raise
        finally:
            live_parts.discard(part.name)
        sync_folder(path.parent)


def _write_new(path: Path, chunks: Iterable[bytes | bytearray | memoryview], *, sync: bool) -> Written:
    digest = hashlib.sha256()
    size = 0
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as descriptor:
        for chunk in chunks:
            write_fully(descriptor, chunk)
            digest.update(chunk)
            size += memoryview(chunk).nbytes
        if sync:
            call("fsync", descriptor)
        return Written(size, digest.hexdigest(), stamp_of(os.fstat(descriptor)))


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` as the file `path`, whole or not at all. Raises MachineError."""
    write_stream(path, (data,))


def write_text(path: Path | str, text: str) -> None:
    r"""Write `text` as UTF-8, whole or not at all; what UTF-8 cannot carry is escaped (`\udc80`).

    Raises MachineError.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, keys in their order, whole or not at all.

    Raises MachineError; TypeError if it is not JSON.
    """
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False, compact: bool = False) -> str:
    """Return `value` as strict JSON, `compact` without spaces.

    Numbers that JSON does not have become the words `float()` reads.

    >>> json_text({"loss": float("nan"), "norm": -float("inf"), "ids": (1, 2)})
    '{"loss": "nan", "norm": "-inf", "ids": [1, 2]}'
    """
    separators = (",", ":") if compact else None
    return json.dumps(
        _strict(value), indent=indent, sort_keys=sort_keys, separators=separators, ensure_ascii=False, allow_nan=False
    )


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def make_folder(path: Path | str) -> None:
    """Make the folder and those above it, each one's name synced; nothing happens where it exists.

    Raises MachineError.
    """
    path = Path(path).absolute()
    with translate_os_errors("make the folder", path):
        missing = list(itertools.takewhile(lambda one: not one.is_dir(), (path, *path.parents)))
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError) if folder != path else contextlib.nullcontext():
                call("mkdir", os.fspath(folder), 0o777)
            sync_folder(folder.parent)


def rename(source: Path | str, target: Path | str) -> None:
    """Give `source` the name `target` (replacing a file there) and sync both folders. Raises MachineError."""
    source, target = Path(source).absolute(), Path(target).absolute()
    with translate_os_errors(f"rename to {target.name!r}", source):
        call("rename", os.fspath(source), os.fspath(target))
        sync_folder(target.parent)
        if source.parent != target.parent:
            sync_folder(source.parent)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Give the content of the file `source` a second name; a copy where the file system has no hard links.

    Raises MachineError.

    For files that are never changed in place, such as those of a committed folder.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    try:
        call("link", os.fspath(source), os.fspath(target))
    except OSError:
        with translate_os_errors("copy", source):
            write_stream(target, read_chunks(source))


def point_to(link: Path | str, target: str) -> None:
    """Make `link` a symbolic link to `target`, a path relative to its folder, replacing one of that name whole.

    Raises MachineError.
    """
    link = Path(link).absolute()
    part = link.with_name(part_name())
    with translate_os_errors("link", link):
        call("symlink", target, os.fspath(part))
        call("rename", os.fspath(part), os.fspath(link))
        sync_folder(link.parent)


def read_chunks(path: Path, chunk_bytes: int = 4 << 20, *, past_cache: bool = False) -> Iterator[bytes]:
    """Yield the content of `path` in chunks, `past_cache` from the disk itself where the system can be asked to.

    Raises OSError.
    """
    with path.open("rb", buffering=0) as file:
        if past_cache and sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(chunk_bytes):
            yield chunk


def best_effort(action: Any, *arguments: Any) -> LlmtuneError | None:
    """Run a clean-up that may fail; returns the refusal instead of raising it."""
    try:
        action(*arguments)
    except LlmtuneError as error:
        return error
    return None
