"""Folders: filled beside their target, completed with a manifest, renamed; one with a final name is always complete."""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from socket import gethostname

from llmtune.common.text import PrintLine, printable
from llmtune.durable.files import (
    PART_PREFIX,
    UNFINISHED_PREFIX,
    Staging,
    live_parts,
    make_folder,
    part_name,
    stagings,
    stamp_of,
    write_text,
)
from llmtune.durable.manifest import MANIFEST, FileEntry, manifest_text, measure_file, walk
from llmtune.durable.system import call, sync_file, sync_folder, translate_os_errors
from llmtune.errors import MachineError

__all__ = ["commit_file", "commit_folder", "prepare_target", "remove_leftovers", "remove_tree"]

OLD_PREFIX = f"{UNFINISHED_PREFIX}old-"


@contextlib.contextmanager
def commit_folder(
    target: Path | str,
    *,
    manifest: Mapping[str, object] | None = None,
    with_manifest: bool = True,
    replace: bool = True,
) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the body it becomes `target`, completely or not at all (P1).

    Every file in it is synced and gets the mode the umask gives; `manifest.json` (bytes and sha256 of each file, and
    the keys of `manifest`) is written last; the folders are synced; one rename; the parent is synced. An existing
    `target` is moved aside first and deleted afterwards, so that a crash at any moment leaves the old or the new one,
    under its name or where `remove_leftovers` finds it. `with_manifest=False` writes no manifest; `replace=False`
    refuses an existing `target`. When the body or the commit fails, the new folder is deleted and the old `target`
    remains. Raises MachineError.
    """
    target = Path(target).absolute()
    staging = Staging(target.parent / part_name())
    live_parts.add(staging.folder.name)
    stagings.append(staging)
    try:
        with translate_os_errors("save", target):
            call("mkdir", os.fspath(staging.folder), 0o777)
            yield staging.folder
            # Everything is on the disk before the name is: a power loss cannot leave a name without its content.
            _complete(staging, dict(manifest or {}) if with_manifest else None)
            stagings.remove(staging)
            _put_in_place(staging.folder, target, replace=replace)
    except BaseException:  # an interrupt too must leave nothing of the unfinished folder
        if staging in stagings:
            stagings.remove(staging)
        with contextlib.suppress(MachineError):  # the first error is the one to tell; a leftover is removed later
            _remove(staging.folder)
        raise
    finally:
        live_parts.discard(staging.folder.name)


@contextlib.contextmanager
def commit_file(target: Path | str) -> Iterator[Path]:
    """Yield a path of the same name in a scratch folder beside `target`, for a library to write.

    At the end of the body the file is synced and becomes `target`, completely or not at all. Other files in the scratch
    folder are deleted; when the body or the commit fails, an old `target` remains. Raises MachineError.
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
            with contextlib.suppress(MachineError):
                _remove(folder)
        live_parts.discard(folder.name)


def _complete(staging: Staging, manifest: dict[str, object] | None) -> None:
    """Sync everything in the staging folder and write its manifest."""
    folder = staging.folder
    file_mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # what the umask gives a new file
    files: dict[str, FileEntry] = {}
    folders = [folder]
    for path, status in walk(folder):
        if stat.S_ISDIR(status.st_mode):
            folders.append(path)
            continue
        if stat.S_IMODE(status.st_mode) & 0o666 != file_mode:  # some libraries leave 0600
            call("chmod", os.fspath(path), stat.S_IMODE(status.st_mode) & 0o111 | file_mode)
        sync_file(path)
        written = staging.written.get(os.fspath(path))
        if written is not None and written.stamp == stamp_of(status):
            # The digest of the bytes that were meant: a disk that garbled them on the way is then found out.
            entry: FileEntry = {"size": written.size, "sha256": written.sha256}
        else:
            entry = measure_file(path)
        files[path.relative_to(folder).as_posix()] = entry
    if manifest is not None:
        # Last, because its presence says that every other file of the folder is complete and synced.
        write_text(folder / MANIFEST, manifest_text({**manifest, "files": dict(sorted(files.items()))}))
        sync_file(folder / MANIFEST)
    # The deepest first, so that no synced folder names one that is not.
    for subfolder in reversed(folders):
        sync_folder(subfolder)


def _put_in_place(folder: Path, target: Path, *, replace: bool) -> None:
    """Rename the complete `folder` to `target`; an existing `target` is moved aside before and deleted afterwards."""
    old = target.parent / f"{OLD_PREFIX}{target.name}"
    replaces = replace and os.path.lexists(target)
    if replaces:
        if os.path.lexists(old):
            _remove(old)
        # The name of the new folder must survive a power loss before the old one loses its name.
        sync_folder(target.parent)
        call("rename", os.fspath(target), os.fspath(old))
    try:
        if replaces:
            # Otherwise a power loss may keep the second rename without the first, and the old folder is nowhere.
            sync_folder(target.parent)
        call("rename", os.fspath(folder), os.fspath(target))
    except OSError:
        if replaces:
            # The second rename failed: the old folder gets its name back, as if nothing had begun.
            call("rename", os.fspath(old), os.fspath(target))
        raise
    sync_folder(target.parent)
    if replaces:
        with contextlib.suppress(MachineError):  # the new one is committed; the next start removes a leftover
            _remove(old)


def remove_tree(path: Path | str) -> None:
    """Delete a file, or a folder with its content; links are deleted, not followed; a missing path is no error.

    Raises MachineError.
    """
    path = Path(path).absolute()
    if os.path.lexists(path):
        _remove(path)


def _remove(path: Path) -> None:
    with translate_os_errors("delete", path):
        if not stat.S_ISDIR(path.lstat().st_mode):
            call("unlink", os.fspath(path))
            return
        doomed = path
        if not path.name.startswith(PART_PREFIX):
            # The name goes first: a crash in between leaves litter, never half a folder under a final name.
            doomed = path.parent / part_name()
            call("rename", os.fspath(path), os.fspath(doomed))
            sync_folder(path.parent)
        # What is inside goes before its folder.
        for inner, status in reversed(list(walk(doomed))):
            call("rmdir" if stat.S_ISDIR(status.st_mode) else "unlink", os.fspath(inner))
        call("rmdir", os.fspath(doomed))


def remove_leftovers(folder: Path | str, *, everything: bool = False) -> list[str]:
    """Finish or undo what a killed process left in `folder` (not below it) and return one line for each thing.

    Unfinished files and folders are deleted; a folder that was moved aside for a successor that never came gets its
    name back. Those of processes alive on this machine, and all of other machines, are left alone unless `everything`
    (the caller holds the lock of the folder). Raises MachineError.
    """
    folder = Path(folder).absolute()
    done: list[str] = []
    with translate_os_errors("sweep", folder):
        for name in sorted(path.name for path in folder.iterdir()):
            if name.startswith(OLD_PREFIX):
                done.append(_restore_or_remove(folder, name))
            elif name.startswith(PART_PREFIX) and name not in live_parts and (everything or _is_abandoned(name)):
                _remove(folder / name)
                done.append(f"removed what an interrupted save left: {printable(folder / name)}")
    return done


def prepare_target(target: Path | str, print_line: PrintLine) -> None:
    """Prepare the folder that `target` will be committed into: make it, and remove leftovers, printing each.

    Raises MachineError.
    """
    parent = Path(target).absolute().parent
    make_folder(parent)
    for line in remove_leftovers(parent):
        print_line(line)


def _restore_or_remove(folder: Path, name: str) -> str:
    """Give a folder that was moved aside its name back, or delete it where its successor was committed."""
    old, target = folder / name, folder / name.removeprefix(OLD_PREFIX)
    if os.path.lexists(target):
        _remove(old)
        return f"removed the predecessor of {printable(target)}"
    call("rename", os.fspath(old), os.fspath(target))
    sync_folder(folder)
    return f"put back {printable(target)}, whose successor was never finished"


def _is_abandoned(name: str) -> bool:
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
    except PermissionError:  # alive, and another user's
        return False
    return False
