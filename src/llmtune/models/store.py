"""Where a resolved model lies on this machine."""

from __future__ import annotations

from pathlib import Path

from llmtune.errors import ModelError
from llmtune.models.catalog import ModelSource

__all__ = ["local_folder", "may_ignore_auto_map"]

_NATIVE_DESPITE_AUTO_MAP = frozenset({"microsoft/Phi-4-mini-instruct"})
"""Hub ids of the catalog that also ship code, and load with the library's own; theirs is never fetched or run."""


def local_folder(source: ModelSource, *, weights: bool = True, code: bool = False) -> Path:
    """The folder that holds the model: itself, its conversion in the cache (GGUF), or its snapshot in the hub cache, fetched when missing.

    weights=False fetches and compares only the small files. A from-scratch model has no folder: ModelError.
    """
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "gguf":
        from llmtune.models.gguf import converted_folder

        return converted_folder(Path(source.location), weights=weights)
    if source.kind == "hub":
        from llmtune.models.hub import fetch_snapshot

        return fetch_snapshot(source.location, source.revision, weights=weights, offline=source.offline, code=code)
    raise ModelError(f"`{source.name}` is built from scratch and has no folder", where="model.name", fix="name a folder or a hub id")


def may_ignore_auto_map(source: ModelSource) -> bool:
    """Whether this model's own code may simply be left aside."""
    return source.kind == "hub" and source.location in _NATIVE_DESPITE_AUTO_MAP
