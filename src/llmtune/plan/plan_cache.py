"""Cache of traces, counts and measured rates in the user's cache folder: one small JSON file for each key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmtune import durable
from llmtune.common.folders import cache_folder
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["cached", "read_entry", "write_entry"]

Entry = TypeVar("Entry", bound="DataclassInstance")


def cached(kind: type[Entry], key: str, compute: Callable[[], Entry]) -> Entry:
    """The entry of that key; where there is none, the one that `compute` returns, which is then written."""
    entry = read_entry(kind, key)
    if entry is None:
        entry = compute()
        write_entry(key, entry)
    return entry


def read_entry(kind: type[Entry], key: str) -> Entry | None:
    """The entry of that key, a dataclass of plain values; None when there is none, or none that can be read."""
    path = _path(key)
    if path is None:
        return None
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # missing, not JSON, or of other fields
        return None


def write_entry(key: str, entry: DataclassInstance) -> None:
    """Write an entry; a cache that cannot be written only costs the next process its time."""
    path = _path(key)
    if path is None:
        return
    try:
        durable.make_folder(path.parent)
        durable.write_json(path, asdict(entry))
    except LlmtuneError:
        return


def _path(key: str) -> Path | None:
    folder = cache_folder()
    return folder / "plan" / f"{key}.json" if folder is not None else None
