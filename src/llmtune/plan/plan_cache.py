"""What was traced or measured once, kept in the user's cache folder: one small JSON file each, named by what decides
its content.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtune import durable
from llmtune.common.folders import cache_folder
from llmtune.errors import LlmtuneError

__all__ = ["read_entry", "write_entry"]


def read_entry(key: str) -> dict[str, Any] | None:
    """The entry of that name; None when there is none, or none that can be read."""
    path = _path(key)
    if path is None:
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def write_entry(key: str, entry: dict[str, Any]) -> None:
    """Keep an entry; a cache that cannot be written only costs the next process its time."""
    path = _path(key)
    if path is None:
        return
    try:
        durable.make_folder(path.parent)
        durable.write_json(path, entry)
    except LlmtuneError:
        return


def _path(key: str) -> Path | None:
    folder = cache_folder()
    return folder / "plan" / f"{key}.json" if folder is not None else None
