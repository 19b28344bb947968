"""The cache of tokenized rows: one folder for each set of inputs.

A folder is named by a key over the bytes of the files, the renderer (tokenizer, template, mask rule), the rules about
rows, and the code in `data/`; nothing else, so moving a file or changing the learning rate costs nothing. A folder is
committed as a unit, and verified before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from llmtune import durable
from llmtune.common.decisions import Decision
from llmtune.common.text import printable, readable_bytes
from llmtune.config.dump import plain
from llmtune.config.schema import SourceConfig
from llmtune.data.dataset.row_result import Reason, RowResult
from llmtune.data.dataset.store import EXAMPLE, ROW, RowStore, StoreBuilder, Texts
from llmtune.data.reading.data_file import DataFile
from llmtune.data.rendering.row_warnings import RowWarning
from llmtune.errors import MachineError, in_one_line

__all__ = ["build_set", "cache_key", "code_digest", "open_or_build", "open_set", "set_folder"]

WORTH_SAYING_BYTES = 1_000_000
"""Deleting less than this is not worth a line in every command."""

SETS_KEPT = 24
"""Sets of tokenized rows that the cache keeps at most: those used last."""

BYTES_KEPT = 32 * 10**9
"""Bytes that the kept sets have together at most; the newest set is kept whatever its size."""

_OF_NO_ROW = ("path", "config", "split", "name", "repeat", "share")
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "datasets")


def code_files() -> list[Path]:
    """Every module of `data/`: a change in any of them may change what a row becomes."""
    return sorted(Path(__file__).parents[1].rglob("*.py"))


@cache
def code_digest() -> str:
    """sha256 over the code in `data/` and the versions of the libraries that read and tokenize."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(" ".join(version(name) for name in _LIBRARIES).encode())
    return digest.hexdigest()


def cache_key(files: Sequence[DataFile], digests: Sequence[str], facts: Mapping[str, object]) -> str:
    """sha256 in hex over the files' bytes and kinds, the settings of their sources, `facts` and the code.

    File names are not part of it.
    """
    sources = {file.source_index: _row_settings(file.source) for file in files}
    inputs = {
        "files": [
            [digest, file.kind, file.rows, file.source_index] for file, digest in zip(files, digests, strict=True)
        ],
        "sources": list(sources.items()),
        "facts": dict(facts),
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _row_settings(source: SourceConfig) -> dict[str, object]:
    """The settings of a source that decide what its rows become; where it lies and how it is mixed do not."""
    kept = {name: plain(value) for name, value in vars(source).items() if name not in _OF_NO_ROW}
    return kept | {"columns": list(source.columns.items())}  # order counts: two fields may be read from one column


def open_or_build(
    folder: Path | None,
    key: str,
    files: Sequence[DataFile],
    results: Callable[[], Iterable[RowResult]],
    *,
    must_be_cached: bool,
) -> tuple[RowStore, list[Decision]]:
    """Return the store of `key` below `folder`, built from `results()` if it is missing or damaged.

    Without a folder, or where it cannot be written and `must_be_cached` is false, the store is in memory and a decision
    says so. Raises MachineError where the folder cannot be used, and the errors of `results`.
    """
    decisions: list[Decision] = []

    def decide(value: str, reason: str) -> None:
        decisions.append(Decision("data.cache_dir", value, reason))

    if folder is None:
        decide("in memory", "there is no home folder to keep tokenized rows in")
        return _build_in_memory(files, results()), decisions
    target = set_folder(folder, key)
    try:
        store = _open_cached(target, files, decide)
        if store is not None:
            return store, decisions
        durable.make_folder(target.parent)
        with durable.waiting_lock(folder / f".tokenizing-{key[0]}"):
            # The processes of one run come here together: the first tokenizes, the others find its rows.
            decisions.clear()
            store = _open_cached(target, files, decide)
            if store is not None:
                return store, decisions
            durable.remove_leftovers(target.parent)  # of a process that was killed while it tokenized
            is_own = build_set(target, key, results())
            # Pruning deletes only folders that are not locked.
            store = _open(target, files, _lock(target)) if is_own else _open_cached(target, files, decide)
            if store is None:
                raise MachineError("another process has put damaged rows there", printable(target), "start again")
            return store, [*decisions, *_prune(target.parent)]
    except (MachineError, PermissionError) as error:
        if must_be_cached:
            raise
        decide("in memory", f"the cache folder cannot be used: {in_one_line(error)}")
        return _build_in_memory(files, results()), decisions


def set_folder(folder: Path, key: str) -> Path:
    """Give the folder of the set of `key` below the cache folder."""
    # 160 bits of the digest: short enough for file systems that limit paths, and no two inputs will share it.
    return folder / "rows" / key[:40]


def open_set(target: Path, files: Sequence[DataFile]) -> RowStore | None:
    """Open the set of rows in `target`; None where there is none, or a damaged one."""
    return _open_cached(target, files, lambda _value, _reason: None)


def _open_cached(target: Path, files: Sequence[DataFile], decide: Callable[[str, str], None]) -> RowStore | None:
    """Open the store in `target`; None where there is none, or a damaged one, which is then named."""
    lock = _lock(target)
    if lock is None:
        return None
    # Every byte is read: a flipped bit in a token id would train another model without a word.
    problems = durable.verify_manifest(target)
    if problems:
        decide("made again", f"the cached rows are damaged: {problems[0].problem}")
        return None
    _touch(target)
    decide(str(target), "the rows were tokenized before; nothing has changed")
    return _open(target, files, lock)


def _lock(target: Path) -> durable.ReadLock | None:
    """Lock the folder against deletion; None where there is none, or none with a manifest."""
    try:
        return durable.ReadLock(target / durable.MANIFEST)
    except PermissionError:
        raise
    except OSError:
        return None


def _touch(target: Path) -> None:
    """Record the use of a folder: pruning deletes those used longest ago."""
    with contextlib.suppress(OSError):  # another user's cache, which is only read
        os.utime(target)


def _prune(parent: Path) -> list[Decision]:
    """Delete the sets of rows that were used longest ago, down to `SETS_KEPT` and `BYTES_KEPT`; never one in use."""
    try:
        folders = [folder for folder in parent.iterdir() if not folder.name.startswith(".")]
        newest_first = sorted(
            (
                (folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir()), folder)
                for folder in folders
            ),
            reverse=True,
        )
    except OSError:  # another process is pruning
        return []
    room, deleted, freed = BYTES_KEPT, 0, 0
    for rank, (_, size, folder) in enumerate(newest_first):
        room -= size
        if rank >= SETS_KEPT or (room < 0 and rank > 0):
            with contextlib.suppress(MachineError):
                if durable.delete_unless_locked(folder, durable.MANIFEST):
                    deleted, freed = deleted + 1, freed + size
    if not deleted or freed < WORTH_SAYING_BYTES:
        return []
    choice = f"{deleted} older set{'s' * (deleted > 1)} of rows deleted ({readable_bytes(freed)})"
    reason = f"the {SETS_KEPT} used last are kept, of at most {BYTES_KEPT / 1e9:,.0f} GB together"
    return [Decision("data.cache_dir", choice, reason)]


def build_set(target: Path, key: str, results: Iterable[RowResult]) -> bool:
    """Commit the results of all rows, in their order, as the set in `target`, in the place of a damaged one.

    Returns False where another process has committed a valid set meanwhile, which stays. Raises MachineError.
    """
    builder = StoreBuilder()
    manifest = {"kind": "tokenized rows", "key": key}
    try:
        # Never in the place of a valid set: on a file system without locks nobody waits, and another process, on
        # another machine perhaps, has its files mapped. On a network drive deleted files are gone for that one too.
        with durable.commit_folder(target, manifest=manifest, replace=False) as staging:
            durable.write_stream(staging / "words.i32", _words(builder, results))
            for name, table in builder.tables().items():
                durable.write_bytes(staging / f"{name}.table", table)
            durable.write_json(staging / "about.json", builder.texts())
            if os.path.lexists(target) and durable.verify_manifest(target):
                durable.remove_tree(target)
    except MachineError as error:
        if durable.errno_of(error) not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def _words(builder: StoreBuilder, results: Iterable[RowResult]) -> Iterator[bytes]:
    """The words of all results in pieces of about a megabyte."""
    pending = bytearray()
    for result in results:
        pending += builder.add(result)
        # A write for each row would be a call of the system for each row.
        if len(pending) >= 2**20:
            yield bytes(pending)
            pending.clear()
    yield bytes(pending)


def _build_in_memory(files: Sequence[DataFile], results: Iterable[RowResult]) -> RowStore:
    builder = StoreBuilder()
    words = b"".join(builder.add(result) for result in results)
    tables = builder.tables()
    return _store(tables["rows"], tables["examples"], np.frombuffer(words, dtype="<i4"), builder.texts(), files)


def _open(folder: Path, files: Sequence[DataFile], lock: durable.ReadLock | None) -> RowStore:
    words = folder / "words.i32"
    # An empty file cannot be mapped.
    mapped = np.memmap(words, dtype="<i4", mode="r") if words.stat().st_size else np.zeros(0, dtype="<i4")
    texts = cast("Texts", json.loads((folder / "about.json").read_text(encoding="utf-8")))
    rows, examples = ((folder / f"{name}.table").read_bytes() for name in ("rows", "examples"))
    return replace(_store(rows, examples, mapped, texts, files), folder=folder, lock=lock)


def _store(
    rows: bytes, examples: bytes, words: npt.NDArray[np.int32], texts: Texts, files: Sequence[DataFile]
) -> RowStore:
    return RowStore(
        labels=tuple(file.label for file in files),
        numberings=tuple(file.numbering for file in files),
        sources=tuple(file.source_index for file in files),
        source_configs={file.source_index: file.source for file in files},
        rows=np.frombuffer(rows, dtype=ROW),
        examples=np.frombuffer(examples, dtype=EXAMPLE),
        words=words,
        reasons=tuple(Reason._make(fields) for fields in texts["reasons"]),
        warnings=tuple(tuple(RowWarning._make(fields) for fields in warnings) for warnings in texts["notes"]),
        classes=tuple(texts["classes"]),
    )
