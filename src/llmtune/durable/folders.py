"""Whole folders, filled beside their place, sealed with a manifest, renamed: one with a final name is complete or does
not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from socket import gethostname
from typing import Any

from llmtune.common.printing import PrintLine
from llmtune.common.text import printable
from llmtune.durable.files import (
    PART_PREFIX,
    UNFINISHED_PREFIX,
    Staging,
    best_effort,
    json_text,
    live_parts,
    make_folder,
    part_name,
    read_chunks,
    stagings,
    stamp_of,
    write_text,
)
from llmtune.durable.system import call, sync_file, sync_folder, translate_os_errors
from llmtune.errors import Problem

__all__ = [
    "MANIFEST",
    "BrokenSealError",
    "commit_file",
    "commit_folder",
    "has_digest",
    "read_manifest",
    "remove_file",
    "remove_leftovers",
    "remove_tree",
    "replace_target",
    "verify_manifest",
]

MANIFEST = "manifest.json"
OLD_PREFIX = f"{UNFINISHED_PREFIX}old-"
_SEAL = "manifest_sha256"
_HEAD = b'{\n "'
"""How each manifest begins, by which one that was cut short is known."""

_MARKS = re.compile(rb'"manifest_sha256"|\n   "sha256": "[0-9a-f]{64}"')
"""Two things that only a manifest of ours has, the second on the lines of each file: no one damaged byte takes both
away.
"""


class BrokenSealError(ValueError):
    """A manifest of ours is damaged, or was edited; a file of that name from another program is a plain ValueError."""


@contextlib.contextmanager
def commit_folder(
    target: Path | str, *, manifest: Mapping[str, Any] | None = None, sealed: bool = True, replace: bool = True
) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the body it becomes `target`, whole or not at all (P1).

    Every file in it is synced and gets the mode the umask gives; `manifest.json` (each file's bytes and sha256, and
    what `manifest` adds) is written last; the folders are synced; one rename; the parent is synced. An existing
    `target` is moved aside first and deleted afterwards, so that a crash at any moment leaves the old or the new one,
    where it belongs or where `remove_leftovers` finds it. `sealed=False` leaves the manifest out; `replace=False`
    refuses a `target` that is there. When the body or the commit fails nothing of it is left and the old `target`
    stands. Raises MachineError.
    """
    target = Path(target).absolute()
    staging = Staging(target.parent / part_name())
    live_parts.add(staging.folder.name)
    stagings.append(staging)
    try:
        with translate_os_errors("save", target):
            call("mkdir", os.fspath(staging.folder), 0o777)
            yield staging.folder
            _complete(staging, dict(manifest or {}) if sealed else None)
            stagings.remove(staging)
            _put_in_place(staging.folder, target, replace=replace)
    except BaseException:
        if staging in stagings:
            stagings.remove(staging)
        best_effort(_remove, staging.folder)
        raise
    finally:
        live_parts.discard(staging.folder.name)


@contextlib.contextmanager
def commit_file(target: Path | str) -> Iterator[Path]:
    """Yield a path of the same name, in a folder of its own beside `target`, for a library to fill.

    At the end it becomes `target`.

    It is synced and renamed, and the folder synced, so that a file of that name is whole or does not exist. Whatever
    else lies in that folder is scratch; when the body or the commit fails nothing is left and an old `target` stands.
    Raises MachineError.
    """
    target = Path(target).absolute()
    folder = target.parent / part_name()
    live_parts.add(folder.name)
    try:
        with translate_os_errors("save", target):
            call("mkdir", os.fspath(folder), 0o777)
            yield folder / target.name
            sync_file(folder / target.name)
            call("rename", os.fspath(folder / target.name), os.fspath(target))
            sync_folder(target.parent)
    finally:
        if folder.is_dir():
            best_effort(_remove, folder)
        live_parts.discard(folder.name)


def _complete(staging: Staging, manifest: dict[str, Any] | None) -> None:
    """Sync everything in the staging folder and seal it, the manifest last."""
    folder = staging.folder
    file_mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # what the umask gives a new file
    files: dict[str, dict[str, Any]] = {}
    folders = [folder]
    for path, status in _walk(folder):
        if stat.S_ISDIR(status.st_mode):
            folders.append(path)
            continue
        if stat.S_IMODE(status.st_mode) & 0o666 != file_mode:  # some libraries leave 0600
            call("chmod", os.fspath(path), stat.S_IMODE(status.st_mode) & 0o111 | file_mode)
        sync_file(path)
        known = staging.written.get(os.fspath(path))
        if known is not None and known.stamp == stamp_of(status):
            size, sha256 = (
                known.size,
                known.sha256,
            )  # of the bytes we meant, so that a disk that garbled them is found out
        else:
            size, sha256 = _measure(path)
        files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": sha256}
    if manifest is not None:
        write_text(folder / MANIFEST, _sealed({**manifest, "files": dict(sorted(files.items()))}))
        sync_file(folder / MANIFEST)
    for one in reversed(folders):
        sync_folder(one)


def _put_in_place(folder: Path, target: Path, *, replace: bool) -> None:
    """Rename the complete `folder` to `target`, moving away what stands there."""
    old = target.parent / f"{OLD_PREFIX}{target.name}"
    replaces = replace and os.path.lexists(target)
    if replaces:
        if os.path.lexists(old):
            _remove(old)
        sync_folder(target.parent)  # the new one must be findable before the old one loses its name
        call("rename", os.fspath(target), os.fspath(old))
    try:
        if replaces:
            sync_folder(target.parent)
        call("rename", os.fspath(folder), os.fspath(target))
    except OSError:
        if replaces:
            call("rename", os.fspath(old), os.fspath(target))
        raise
    sync_folder(target.parent)
    if replaces:
        best_effort(_remove, old)  # the new one stands; a leftover is swept at the next start


def remove_tree(path: Path | str) -> None:
    """Delete a file or a folder with all it holds; nothing happens where there is none.

    Links are deleted, not followed.

    A folder loses its name first, so that a crash in between leaves litter and never half a folder with a final name.
    Raises MachineError.
    """
    path = Path(path).absolute()
    if os.path.lexists(path):
        _remove(path)


def remove_file(path: Path | str) -> None:
    """Delete one file; nothing happens where there is none. Raises MachineError."""
    with translate_os_errors("delete", path), contextlib.suppress(FileNotFoundError):
        call("unlink", os.fspath(path))


def _remove(path: Path) -> None:
    with translate_os_errors("delete", path):
        if not stat.S_ISDIR(path.lstat().st_mode):
            call("unlink", os.fspath(path))
            return
        doomed = path
        if not path.name.startswith(PART_PREFIX):
            doomed = path.parent / part_name()
            call("rename", os.fspath(path), os.fspath(doomed))
            sync_folder(path.parent)
        for one, status in reversed(list(_walk(doomed))):
            call("rmdir" if stat.S_ISDIR(status.st_mode) else "unlink", os.fspath(one))
        call("rmdir", os.fspath(doomed))


def remove_leftovers(folder: Path | str, *, everything: bool = False) -> list[str]:
    """Finish or undo what a killed process left in `folder` (not below it) and say so, one line each.

    Unfinished files and folders are deleted; a folder that was moved aside for a successor that never came gets its
    name back. Those of processes alive on this machine, and all of other machines, are left alone unless `everything`
    (the caller holds the lock of the folder). Raises MachineError.
    """
    folder = Path(folder).absolute()
    done: list[str] = []
    with translate_os_errors("sweep", folder):
        for name in sorted(one.name for one in folder.iterdir()):
            if name.startswith(OLD_PREFIX):
                done.append(_settle(folder, name))
            elif name.startswith(PART_PREFIX) and name not in live_parts and (everything or _is_dead(name)):
                _remove(folder / name)
                done.append(f"removed what an interrupted save left: {printable(folder / name)}")
    return done


def replace_target(target: Path | str, print_line: PrintLine) -> None:
    """Make the folder that `target` will stand in, and sweep what killed processes left there, saying each.

    Raises MachineError.
    """
    parent = Path(target).absolute().parent
    make_folder(parent)
    for line in remove_leftovers(parent):
        print_line(line)


def _settle(folder: Path, name: str) -> str:
    old, target = folder / name, folder / name.removeprefix(OLD_PREFIX)
    if os.path.lexists(target):
        _remove(old)
        return f"removed the predecessor of {printable(target)}"
    call("rename", os.fspath(old), os.fspath(target))
    sync_folder(folder)
    return f"put back {printable(target)}, whose successor was never finished"


def _is_dead(name: str) -> bool:
    """Say whether the process that made the part `name` is known to be gone."""
    machine, _, rest = name.removeprefix(PART_PREFIX).partition("-")
    process = rest.partition("-")[0]
    if machine != f"{zlib.crc32(gethostname().encode('utf-8', 'replace')):08x}" or not process.isdecimal():
        return False
    if int(process) == os.getpid():
        return True  # not in live_parts, so it is from an earlier process of the same number
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield everything below `folder`, a folder before what it holds, by name; links are not followed.

    Raises OSError.
    """
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(path)


def _measure(path: Path, *, past_cache: bool = False) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    for chunk in read_chunks(path, past_cache=past_cache):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def has_digest(data: bytes, sha256: str) -> bool:
    """Say whether `data` are the bytes with this sha256 (in hex)."""
    return hashlib.sha256(data).hexdigest() == sha256


def _sealed(manifest: dict[str, Any]) -> str:
    """Return the text of a manifest with its own digest in it; any other text with the same meaning is not valid."""
    body = {key: value for key, value in manifest.items() if key != _SEAL}
    seal = hashlib.sha256(json_text(body, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()
    return json_text({**body, _SEAL: seal}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Return the manifest of a committed folder, its seal checked.

    Raises ValueError (what is wrong with it), BrokenSealError where it was one of ours, or OSError.
    """
    raw = (Path(folder) / MANIFEST).read_bytes()
    ours = _MARKS.search(raw) is not None
    try:
        manifest = json.loads(raw)
        whole = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and _SEAL in manifest
        unchanged = whole and _sealed(manifest).encode("utf-8", "backslashreplace") == raw
    except (ValueError, RecursionError) as error:
        raise _invalid(f"is not JSON: {error}", ours=ours or raw.startswith(_HEAD[: len(raw)])) from error
    if not whole:
        raise _invalid("is not a manifest", ours=ours)
    if not unchanged:
        raise _invalid("was changed: its seal does not fit its content", ours=True)
    return manifest


def _invalid(what: str, *, ours: bool) -> ValueError:
    return (BrokenSealError if ours else ValueError)(f"manifest.json {what}")


def verify_manifest(
    folder: Path | str, *, only: str = "*", unread: str = "", past_cache: bool = False, links: bool = False
) -> list[Problem]:
    """Compare every file of a committed folder with its manifest and return what is wrong.

    An empty list means: as committed (P5).

    Found are: a changed byte, a cut, a missing, added or exchanged file, a link in place of a file, an edited manifest.
    `only` is a pattern (`*.safetensors`) for the names looked at, relative to `folder` and at any depth; files of other
    names are not read. Of files named like `unread`, which whoever opens them will compare, only presence and size are
    looked at. `past_cache` asks the system to read from the disk what it may still hold in memory. With `links` a link
    is what it points to.
    """
    folder = Path(folder)
    fix = "use another checkpoint or copy, or restore this folder from a backup"
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return [
            Problem(
                "manifest.json is missing: the folder was never committed, or was taken apart", printable(folder), fix
            )
        ]
    except (ValueError, OSError) as error:
        return [Problem(str(error), printable(folder / MANIFEST), fix)]
    expected: dict[str, dict[str, Any]] = {
        name: entry for name, entry in manifest["files"].items() if fnmatchcase(name, only)
    }
    inhabited = {parent.as_posix() for name in manifest["files"] for parent in Path(name).parents}
    problems: list[str] = []
    found: set[str] = set()
    try:
        for path, status in _walk(folder):
            name = path.relative_to(folder).as_posix()
            if name != MANIFEST and not fnmatchcase(name, only):
                continue
            if links:
                status = path.stat()
            if name == MANIFEST:
                if not stat.S_ISREG(status.st_mode):
                    problems.append(f"`{MANIFEST}` is not a plain file")
            elif stat.S_ISDIR(status.st_mode):
                if name not in inhabited:
                    problems.append(f"`{printable(name)}` does not belong here")
            else:
                found.add(name)
                problems.extend(
                    _compare(
                        path,
                        status,
                        expected.get(name),
                        name,
                        read=not fnmatchcase(name, unread),
                        past_cache=past_cache,
                    )
                )
    except OSError as error:
        problems.append(f"cannot read: {error.strerror}")
    problems.extend(f"`{printable(name)}` is missing" for name in expected if name not in found)
    return [Problem(one, printable(folder), fix) for one in problems]


def _compare(
    path: Path, status: os.stat_result, expected: dict[str, Any] | None, name: str, *, read: bool, past_cache: bool
) -> Iterator[str]:
    """Yield what is wrong with one file."""
    if expected is None:
        yield f"`{printable(name)}` does not belong here"
    elif not stat.S_ISREG(status.st_mode):
        yield f"`{printable(name)}` is not a plain file"
    elif status.st_size != expected["size"]:
        yield f"`{printable(name)}` has {status.st_size} bytes instead of {expected['size']}"
    elif read and _measure(path, past_cache=past_cache)[1] != expected["sha256"]:
        yield f"`{printable(name)}` was changed: its sha256 does not fit"
