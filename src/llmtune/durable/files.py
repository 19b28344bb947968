"""Single files: written beside their target, synced and renamed, so that a name always stands for a complete file."""

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
from types import TracebackType
from typing import Any, NamedTuple

from llmtune.durable.system import call, open_descriptor, sync_folder, translate_os_errors, write_fully

__all__ = [
    "UNFINISHED_PREFIX",
    "AppendLog",
    "append_line",
    "json_text",
    "link_or_copy",
    "make_folder",
    "read_lines",
    "rename",
    "replace_symlink",
    "write_bytes",
    "write_json",
    "write_stream",
    "write_text",
]


UNFINISHED_PREFIX = ".llmtune-"
"""How the names of unfinished things begin: of what a process is writing, and of what it is about to replace."""
PART_PREFIX = f"{UNFINISHED_PREFIX}part-"
_part_numbers = itertools.count(1)
live_parts: set[str] = set()
"""Names of parts this process is working on; `remove_leftovers` leaves them alone."""


class WrittenFile(NamedTuple):
    """Size and sha256 (in hex) of the bytes handed to the system for one file, and its stamp just after."""

    size: int
    sha256: str
    stamp: tuple[int, int, int]
    """See `stamp_of`; another stamp means that somebody wrote the file again."""


class Staging:
    """A folder being filled by `commit_folder`, and the files written into it through this module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, WrittenFile] = {}


stagings: list[Staging] = []
"""The staging folders that are being filled now."""


def staging_of(path: Path) -> Staging | None:
    """Return the staging folder `path` lies in, if any."""
    parents = path.parents
    return next((staging for staging in stagings if staging.folder in parents), None)


def part_name() -> str:
    """Return a new name for something unfinished, with the machine and the process that work on it."""
    # Of the machine too, because on a shared file system two machines have processes of the same number.
    machine = zlib.crc32(gethostname().encode("utf-8", "replace"))
    return f"{PART_PREFIX}{machine:08x}-{os.getpid()}-{next(_part_numbers)}"


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """Return inode, bytes and modification time in nanoseconds, one of which changes when a file is written again."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def write_stream(path: Path | str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write `chunks` as the file `path`, completely or not at all: beside it, synced, renamed, folder synced.

    The mode follows the umask. Inside a staging folder of `commit_folder` the file is written in place, because none of
    the names there is final and the commit syncs them all. Raises MachineError; a file that was there before is then
    untouched.
    """
    path = Path(path).absolute()
    staging = staging_of(path)
    with translate_os_errors("write", path):
        if staging is not None:
            # The commit syncs all files of the folder.
            staging.written[os.fspath(path)] = _write_new(path, chunks, sync=False)
            return
        part = path.parent / part_name()
        live_parts.add(part.name)
        try:
            # Sync before the rename: otherwise a power loss may leave the final name on a file without its content.
            _write_new(part, chunks, sync=True)
            call("rename", os.fspath(part), os.fspath(path))
        except BaseException:  # an interrupt too must leave no part behind
            with contextlib.suppress(OSError):
                call("unlink", os.fspath(part))
            raise
        finally:
            live_parts.discard(part.name)
        sync_folder(path.parent)  # the rename itself is durable only now


def _write_new(path: Path, chunks: Iterable[bytes | bytearray | memoryview], *, sync: bool) -> WrittenFile:
    digest = hashlib.sha256()
    size = 0
    with open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as descriptor:
        for chunk in chunks:
            write_fully(descriptor, chunk)
            digest.update(chunk)
            size += memoryview(chunk).nbytes
        if sync:
            call("fsync", descriptor)
        # From the open file: a name could be another file by now.
        return WrittenFile(size, digest.hexdigest(), stamp_of(os.fstat(descriptor)))


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` as the file `path`, completely or not at all. Raises MachineError."""
    write_stream(path, (data,))


def write_text(path: Path | str, text: str) -> None:
    r"""Write `text` as UTF-8, completely or not at all; surrogates, which UTF-8 does not have, are escaped (`\udc80`).

    Raises MachineError.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def append_line(path: Path | str, line: str) -> None:
    """Add a line to a text file that nothing depends on: not synced, lost with a power loss. Raises MachineError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with translate_os_errors("append to", path), open_descriptor(Path(path), flags) as descriptor:
        write_fully(descriptor, (line + "\n").encode("utf-8", "backslashreplace"))


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON, keys in their order, completely or not at all.

    Raises MachineError; TypeError if it is not JSON.
    """
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: object, *, indent: int | None = None, sort_keys: bool = False, compact: bool = False) -> str:
    """Return `value` as strict JSON, `compact` without spaces.

    Numbers that JSON does not have become the words `float()` reads.

    >>> json_text({"loss": float("nan"), "norm": -float("inf"), "ids": (1, 2)})
    '{"loss": "nan", "norm": "-inf", "ids": [1, 2]}'
    """
    separators = (",", ":") if compact else None
    return json.dumps(
        _to_strict_json(value),
        indent=indent,
        sort_keys=sort_keys,
        separators=separators,
        ensure_ascii=False,
        allow_nan=False,
    )


def _to_strict_json(value: object) -> object:
    # NaN and Infinity are no JSON, and most readers refuse the file for one of them.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _to_strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_strict_json(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def make_folder(path: Path | str) -> None:
    """Make the folder and its missing parents, and sync the name of each; an existing folder is left as it is.

    Raises MachineError.
    """
    path = Path(path).absolute()
    with translate_os_errors("make the folder", path):
        missing = list(itertools.takewhile(lambda folder: not folder.is_dir(), (path, *path.parents)))
        for folder in reversed(missing):
            try:
                call("mkdir", os.fspath(folder), 0o777)
            except FileExistsError:  # another process made it in this moment, or a file is in the way
                if folder == path and not path.is_dir():
                    raise
            sync_folder(folder.parent)


def rename(source: Path | str, target: Path | str) -> None:
    """Give `source` the name `target` (replacing a file there) and sync both folders. Raises MachineError."""
    source, target = Path(source).absolute(), Path(target).absolute()
    with translate_os_errors(f"rename to {target.name!r}", source):
        call("rename", os.fspath(source), os.fspath(target))
        # The new name first: a power loss in between may leave both names, never none.
        sync_folder(target.parent)
        if source.parent != target.parent:
            sync_folder(source.parent)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Give the content of the file `source` a second name; a copy where the file system has no hard links.

    For files that are never changed in place, such as those of a committed folder. Raises MachineError.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    try:
        call("link", os.fspath(source), os.fspath(target))
    except OSError:
        with translate_os_errors("copy", source):
            write_stream(target, read_chunks(source))


def replace_symlink(link: Path | str, target: str) -> None:
    """Make `link` a symbolic link to `target`, a path relative to its folder; an older link of that name is replaced.

    Raises MachineError.
    """
    link = Path(link).absolute()
    part = link.with_name(part_name())
    with translate_os_errors("link", link):
        # A link cannot be replaced in one call, but a rename over it is one.
        call("symlink", target, os.fspath(part))
        call("rename", os.fspath(part), os.fspath(link))
        sync_folder(link.parent)


def read_chunks(path: Path, *, past_cache: bool = False) -> Iterator[bytes]:
    """Yield `path` in chunks of 4 MiB; `past_cache` reads from the disk where the system allows to ask for it.

    Raises OSError.
    """
    with path.open("rb", buffering=0) as file:
        if past_cache and sys.platform == "linux":
            # Drop the pages that the system remembers from the write, which may differ from what the disk stored.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(4 << 20):
            yield chunk


class AppendLog:
    """A file of JSON objects, one a line, that grows at its end.

    Each line goes to the system completely before `append` returns, so a killed process loses no appended line; `sync`
    makes them survive a power loss too. Opening cuts off the remains of an interrupted write: a line without its
    newline, or lines that are not JSON objects. For one writer at a time. Every method raises MachineError when the
    system refuses; a refused line leaves no trace.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        with translate_os_errors("open", self.path):
            is_new = not self.path.exists()
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor: int | None = call("open", os.fspath(self.path), flags, 0o666)
            if is_new:
                # Or a power loss could take the name of the file with all its lines.
                sync_folder(self.path.parent)
        self.lines = 0
        """Lines in the file."""
        self._size = 0
        try:
            self._cut()
        except BaseException:  # the caller gets no object that it could close
            self.close()
            raise

    def append(self, value: Mapping[str, object]) -> None:
        """Add `value` as one line."""
        line = (json_text(value) + "\n").encode("utf-8", "backslashreplace")
        descriptor = self._open_descriptor()
        with translate_os_errors("append to", self.path):
            try:
                write_fully(descriptor, line)
            except OSError:
                call("truncate", descriptor, self._size)  # half a line would hide the next one from every reader
                raise
        self._size += len(line)
        self.lines += 1

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        with translate_os_errors("sync", self.path):
            call("fsync", self._open_descriptor())

    def truncate_to(self, lines: int) -> int:
        """Keep the first `lines` lines and return the number of dropped ones."""
        before = self.lines
        self._cut(lines)
        return before - self.lines

    def close(self) -> None:
        """Close the file; appending is an error afterwards."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> AppendLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_descriptor(self) -> int:
        assert self._descriptor is not None, f"{self.path} is closed"
        return self._descriptor

    def _cut(self, most_lines: int | None = None) -> None:
        """Cut the file after `most_lines` lines, and before the first line that is torn or no JSON object."""
        size = lines = 0
        with translate_os_errors("read", self.path), self.path.open("rb") as file:
            for line in file:
                if lines == most_lines or parse_line(line) is None:
                    break
                size += len(line)
                lines += 1
        descriptor = self._open_descriptor()
        with translate_os_errors("cut", self.path):
            if os.fstat(descriptor).st_size != size:
                call("truncate", descriptor, size)
                # Synced at once, so that a power loss cannot bring cut lines back behind those appended later.
                call("fsync", descriptor)
        self._size, self.lines = size, lines


def parse_line(line: bytes) -> dict[str, Any] | None:
    r"""Return the JSON object of one complete line; None when it is torn or no JSON object.

    >>> parse_line(b'{"step": 1}\n'), parse_line(b'{"step": 1}'), parse_line(b'[1]\n')
    ({'step': 1}, None, None)
    """
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """Return the complete lines of a log that another process may be writing; a missing file has none.

    Raises MachineError.
    """
    path = Path(path)
    with translate_os_errors("read", path):
        if not path.exists():
            return []
        lines = path.read_bytes().splitlines(keepends=True)
    return [value for line in lines if (value := parse_line(line)) is not None]
