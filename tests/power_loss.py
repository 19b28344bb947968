"""The states in which a power loss can leave a disk, derived from a trace of operations.

The model is deliberately worse than common file systems. What a sync has not made durable may be there, be missing, or
(a write) be there by half, independently of everything else and in any order: the content of a file until the file is
synced; a name (made, renamed, linked, deleted) until its folder is synced. Syncing a file does not save its name. One
rename is atomic: it happened or it did not. Compare Pillai et al., "All File Systems Are Not Created Equal" (OSDI
2014), section 3.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from disk_faults import Operation

__all__ = ["DiskState", "disk_states", "put_on_disk", "read_tree"]

Tree = dict[str, bytes | None]  # relative path -> content, None for a folder

_ALL_SUBSETS_UP_TO = 7
_RANDOM_SUBSETS = 24


class DiskState(NamedTuple):
    """What is on the disk after the power came back, and what had been promised before it went."""

    tree: Tree
    promises: tuple[str, ...]
    after: int
    """Number of operations that had been asked for."""


class _Change(NamedTuple):
    """One change of the disk, on inodes instead of paths; `saved_by` is the inode whose sync makes it durable."""

    kind: str
    saved_by: int
    inode: int
    name: str = ""
    folder: int = 0
    new_name: str = ""
    new_folder: int = 0
    data: bytes = b""
    offset: int = 0


class _Disk:
    """Folders as tables of names, files as bytes."""

    def __init__(self) -> None:
        self.names: dict[int, dict[str, int]] = {0: {}}
        self.content: dict[int, bytes] = {}

    def copy(self) -> _Disk:
        """Another disk with the same content."""
        other = _Disk()
        other.names = {inode: dict(names) for inode, names in self.names.items()}
        other.content = dict(self.content)
        return other

    def apply(self, change: _Change, *, by_half: bool = False) -> None:
        """Make one change, unless what it needs is not there."""
        names = self.names.setdefault(change.folder, {})
        if change.kind in ("file", "folder", "link"):
            names[change.name] = change.inode
            if change.kind == "folder":
                self.names.setdefault(change.inode, {})
            else:
                self.content.setdefault(change.inode, b"")
        elif change.kind == "gone":
            if names.get(change.name) == change.inode:
                del names[change.name]
        elif change.kind == "rename":
            if names.get(change.name) == change.inode:
                del names[change.name]
                self.names.setdefault(change.new_folder, {})[change.new_name] = change.inode
        elif change.kind == "write":
            data = change.data[: len(change.data) // 2] if by_half else change.data
            old = self.content.get(change.inode, b"").ljust(change.offset, b"\0")
            self.content[change.inode] = old[: change.offset] + data + old[change.offset + len(data) :]
        else:
            assert change.kind == "truncate"
            self.content[change.inode] = self.content.get(change.inode, b"")[: change.offset].ljust(
                change.offset, b"\0"
            )

    def find(self, parts: Sequence[str]) -> int | None:
        """The inode of a path given in its parts; None where there is none."""
        inode = 0
        for part in parts:
            below = self.names.get(inode, {}).get(part)
            if below is None:
                return None
            inode = below
        return inode

    def tree(self, inode: int = 0, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
        """(path, content) of everything below a folder, by name; the content of a folder is None."""
        for name, below in sorted(self.names[inode].items()):
            if below in self.names:
                yield f"{prefix}{name}", None
                yield from self.tree(below, f"{prefix}{name}/")
            else:
                yield f"{prefix}{name}", self.content[below]


class _Replay:
    """Turns a trace into changes of inodes and syncs, following the names as they were at each moment."""

    def __init__(self, root: Path, before: Mapping[str, bytes | None]) -> None:
        self.root = root
        self.now = _Disk()
        self.steps: list[_Change | int | str] = []  # a change, the inode of a sync, or a promise
        self._inodes = itertools.count(1)
        for path, content in before.items():
            folder, name = self._place(str(root / path))
            inode = next(self._inodes)
            self.now.apply(_Change("folder" if content is None else "file", folder, inode, name, folder))
            if content is not None:
                self.now.content[inode] = content
        self.start = self.now.copy()

    def _parts(self, path: str) -> tuple[str, ...]:
        return Path(path).relative_to(self.root).parts

    def _place(self, path: str) -> tuple[int, str]:
        parts = self._parts(path)
        folder = self.now.find(parts[:-1])
        assert folder is not None, f"{path} was traced before its folder"
        return folder, parts[-1]

    def _add(self, change: _Change) -> None:
        self.now.apply(change)
        self.steps.append(change)

    def _file(self, path: str) -> int:
        found = self.now.find(self._parts(path))
        if found is not None:
            return found
        folder, name = self._place(path)
        inode = next(self._inodes)
        self._add(_Change("file", folder, inode, name, folder))
        return inode

    def add(self, operation: Operation) -> None:
        """Follow one traced operation."""
        kind = operation.kind
        if kind == "mark":
            self.steps.append(operation.path)
        elif kind == "open":
            inode = self._file(operation.path)
            if operation.size & os.O_TRUNC and self.now.content[inode]:
                self._add(_Change("truncate", inode, inode))
        elif kind == "write":
            inode = self._file(operation.path)
            self._add(_Change("write", inode, inode, data=operation.data, offset=len(self.now.content[inode])))
        elif kind == "truncate":
            inode = self._file(operation.path)
            self._add(_Change("truncate", inode, inode, offset=operation.size))
        elif kind == "fsync":
            inode = self._file(operation.path)
            if self.now.content[inode] != operation.data:  # written by a library, past the backend
                self._add(_Change("write", inode, inode, data=operation.data))
            self.steps.append(inode)
        elif kind == "fsync folder":
            found = self.now.find(self._parts(operation.path))
            assert found is not None
            self.steps.append(found)
        elif kind == "mkdir":
            folder, name = self._place(operation.path)
            self._add(_Change("folder", folder, next(self._inodes), name, folder))
        elif kind != "chmod":
            self._names(operation)

    def _names(self, operation: Operation) -> None:
        folder, name = self._place(operation.path)
        inode = self.now.names[folder][name]
        if operation.kind in ("unlink", "rmdir"):
            self._add(_Change("gone", folder, inode, name, folder))
            return
        new_folder, new_name = self._place(operation.target)
        if operation.kind == "link":
            self._add(_Change("link", new_folder, inode, new_name, new_folder))
        else:
            self._add(_Change("rename", new_folder, inode, name, folder, new_name, new_folder))


def disk_states(
    root: Path,
    before: Mapping[str, bytes | None],
    operations: Sequence[Operation],
    *,
    seed: int = 0,
    last_first: bool = False,
) -> Iterator[DiskState]:
    """Yield each different state in which a power loss during or after `operations` can leave the folder `root`.

    `before` is its tree before them, all of it durable (`read_tree`). After every operation all subsets of the changes
    not yet durable are taken when they are few; otherwise none, all, each prefix, each one alone, all but each one, and
    some at random. Writes are dropped, torn and kept. `last_first` begins with the states after the last operation.
    """
    replay = _Replay(root, before)
    for operation in operations:
        replay.add(operation)
    chance = random.Random(seed)
    seen: set[int] = set()
    ends = range(len(replay.steps) + 1)
    for end in reversed(ends) if last_first else ends:
        steps = replay.steps[:end]
        promises = tuple(step for step in steps if isinstance(step, str))
        changes = [(index, step) for index, step in enumerate(steps) if isinstance(step, _Change)]
        synced = {step: index for index, step in enumerate(steps) if isinstance(step, int)}
        pending = [index for index, change in changes if synced.get(change.saved_by, -1) < index]
        writes = {index for index, change in changes if change.kind == "write"}
        for lost in _subsets(pending, chance):
            for torn in (False, True) if lost & writes else (False,):
                disk = replay.start.copy()
                for index, change in changes:
                    if index not in lost:
                        disk.apply(change)
                    elif torn and change.kind == "write":
                        disk.apply(change, by_half=True)
                tree = dict(disk.tree())
                mark = hash((promises, tuple(tree.items())))
                if mark not in seen:
                    seen.add(mark)
                    yield DiskState(tree, promises, end)


def _subsets(items: Sequence[int], chance: random.Random) -> Iterator[frozenset[int]]:
    if len(items) <= _ALL_SUBSETS_UP_TO:
        for size in range(len(items) + 1):
            yield from map(frozenset, itertools.combinations(items, size))
        return
    everything = frozenset(items)
    yield from (frozenset(), everything)
    for place, item in enumerate(items):
        yield frozenset(items[place:])
        yield frozenset({item})
        yield everything - {item}
    for _ in range(_RANDOM_SUBSETS):
        yield frozenset(item for item in items if chance.random() < 0.5)


def read_tree(root: Path) -> Tree:
    """Return everything below `root`: relative path -> content, None for a folder, a folder before what it holds."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def put_on_disk(tree: Mapping[str, bytes | None], root: Path) -> None:
    """Make `root` and in it what `tree` describes."""
    root.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
