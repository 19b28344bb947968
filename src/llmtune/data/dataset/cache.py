"""The tokenized rows of one side of a run, kept so that they are made once: folders named by everything that decides
what is in them.

The key covers the bytes of the files, the renderer (tokenizer, template, mask rule), the rules about rows, and the code
of this room; nothing else, so moving a file or changing the learning rate costs nothing. A folder is committed whole,
and verified before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llmtune import durable
from llmtune.common.bytes import readable_bytes
from llmtune.common.decisions import Decision
from llmtune.data.dataset.store import EXAMPLE, ROW, RowStore, StoreBuilder
from llmtune.data.reading.data_files import DataFile
from llmtune.data.rendering.row_warnings import RowWarning
from llmtune.data.rows.row_result import Reason, RowResult
from llmtune.errors import MachineError, in_one_line

__all__ = ["cache_key", "code_digest", "open_or_build"]

SETS_KEPT = 24
"""Tokenized sets of rows that the cache keeps at most: those used last."""

BYTES_KEPT = 32 * 10**9
"""Bytes that the kept sets have together at most; the set just made is kept whatever its size."""

_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "datasets")


@cache
def code_digest() -> str:
    """sha256 over the code of this room and the versions of the libraries that read and tokenize."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(" ".join(version(name) for name in _LIBRARIES).encode())
    return digest.hexdigest()


def cache_key(files: Sequence[DataFile], digests: Sequence[str], facts: Mapping[str, Any]) -> str:
    """sha256 in hex over the files' bytes and kinds, what the config says about their sources, `facts` and the code.

    Not over names.
    """
    sources = {file.source_index: (file.source.weight, file.source.max_samples) for file in files}
    known = [[digest, file.kind, file.source_index] for file, digest in zip(files, digests, strict=True)]
    everything = {
        "files": known,
        "sources": [[key, *value] for key, value in sources.items()],
        "facts": dict(facts),
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def open_or_build(
    folder: Path | None,
    key: str,
    files: Sequence[DataFile],
    outcomes: Callable[[], Iterable[RowResult]],
    *,
    must_be_cached: bool,
) -> tuple[RowStore, list[Decision]]:
    """Return the store of `key` below `folder`, made from `outcomes()` if it is not there.

    What was changed on disk since it was made is made again. Without a folder, or where it cannot be written and
    `must_be_cached` is false, the store is in memory and a decision says so. Raises MachineError, and whatever
    `outcomes` raises.
    """
    decisions: list[Decision] = []
    if folder is not None:
        target = folder / "rows" / key[:40]
        try:
            hold = _hold(target)
            if hold is not None:
                problems = durable.verify_manifest(target)
                if not problems:
                    _note_use(target)
                    return _open(target, files, hold), [
                        Decision("data.cache_dir", str(target), "the rows were tokenized before; nothing has changed")
                    ]
                decisions.append(
                    Decision("data.cache_dir", "made again", f"the cached rows are damaged: {problems[0].problem}")
                )
            durable.make_folder(target.parent)
            durable.remove_leftovers(target.parent)
            _build(target, key, outcomes())
            store = _open(target, files, _hold(target))
            return store, [*decisions, *_prune(target.parent)]
        except (MachineError, PermissionError) as error:
            if must_be_cached:
                raise
            decisions.append(
                Decision("data.cache_dir", "in memory", f"the cache folder cannot be used: {in_one_line(error)}")
            )
    else:
        decisions.append(Decision("data.cache_dir", "in memory", "there is no home folder to keep tokenized rows in"))
    builder = StoreBuilder()
    words = b"".join(builder.add(outcome) for outcome in outcomes())
    tables = builder.tables()
    about = json.loads(json.dumps(builder.about()))
    return _store(tables["rows"], tables["examples"], np.frombuffer(words, dtype="<i4"), about, files), decisions


def _hold(target: Path) -> durable.ReadLock | None:
    """Keep the folder from being deleted; None where there is nothing to keep (also: a folder without its manifest)."""
    try:
        return durable.ReadLock(target / durable.MANIFEST)
    except PermissionError:
        raise
    except OSError:
        return None


def _note_use(target: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's cache, which is only read
        os.utime(target)


def _prune(folder: Path) -> list[Decision]:
    """Delete the sets of rows that were used longest ago, until no more than `SETS_KEPT` and `BYTES_KEPT` are left.

    None that is in use.
    """
    try:
        places = [one for one in folder.iterdir() if not one.name.startswith(".")]
        sets = sorted(
            ((one.stat().st_mtime, sum(file.stat().st_size for file in one.iterdir()), one) for one in places),
            reverse=True,
        )
    except OSError:  # another process is at it
        return []
    room, deleted, freed = BYTES_KEPT, 0, 0
    for place, (_, size, one) in enumerate(sets):
        room -= size
        if place >= SETS_KEPT or (room < 0 and place > 0):
            with contextlib.suppress(MachineError):
                if durable.delete_unless_locked(one, durable.MANIFEST):
                    deleted, freed = deleted + 1, freed + size
    if not deleted:
        return []
    what = f"{deleted} older set{'s' * (deleted > 1)} of rows deleted ({readable_bytes(freed)})"
    return [
        Decision(
            "data.cache_dir",
            what,
            f"the {SETS_KEPT} used last are kept, of at most {BYTES_KEPT / 1e9:,.0f} GB together",
        )
    ]


def _build(target: Path, key: str, outcomes: Iterable[RowResult]) -> None:
    builder = StoreBuilder()
    with durable.commit_folder(target, manifest={"kind": "tokenized rows", "key": key}) as staging:
        durable.write_stream(staging / "words.i32", _words(builder, outcomes))
        for name, table in builder.tables().items():
            durable.write_bytes(staging / f"{name}.table", table)
        durable.write_json(staging / "about.json", builder.about())


def _words(builder: StoreBuilder, outcomes: Iterable[RowResult]) -> Iterator[bytes]:
    """The words of all outcomes in pieces of about a megabyte."""
    pending = bytearray()
    for outcome in outcomes:
        pending += builder.add(outcome)
        if len(pending) >= 2**20:
            yield bytes(pending)
            pending.clear()
    yield bytes(pending)


def _open(folder: Path, files: Sequence[DataFile], hold: durable.ReadLock | None) -> RowStore:
    words = folder / "words.i32"
    mapped = np.memmap(words, dtype="<i4", mode="r") if words.stat().st_size else np.zeros(0, dtype="<i4")
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    rows, examples = ((folder / f"{name}.table").read_bytes() for name in ("rows", "examples"))
    return replace(_store(rows, examples, mapped, about, files), folder=folder, hold=hold)


def _store(rows: bytes, examples: bytes, words: Any, about: dict[str, Any], files: Sequence[DataFile]) -> RowStore:
    return RowStore(
        labels=tuple(file.label for file in files),
        numberings=tuple(file.numbering for file in files),
        source_paths=tuple(file.source.path for file in files),
        rows=np.frombuffer(rows, dtype=ROW),
        examples=np.frombuffer(examples, dtype=EXAMPLE),
        words=words,
        reasons=tuple(Reason(*one) for one in about["reasons"]),
        notes=tuple(tuple(RowWarning(*note) for note in one) for one in about["notes"]),
    )
