"""The user's folders that llmtune keeps caches and crash files in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["cache_folder", "home_expanded", "state_folder", "user_cache_folder"]


def home_expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` expanded, or unchanged where there is no such home folder."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Llmtune's cache folder: `LLMTUNE_CACHE_DIR`, or `llmtune` in the user's cache folder; None without a home.

    >>> cache_folder({"XDG_CACHE_HOME": "/var/cache/me"}).as_posix()
    '/var/cache/me/llmtune'
    """
    if named := environ.get("LLMTUNE_CACHE_DIR"):
        return home_expanded(named)
    folder = user_cache_folder(environ)
    return folder / "llmtune" if folder else None


def user_cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The cache folder of all the user's programs: `XDG_CACHE_HOME` or `~/.cache`; None without a home."""
    return _user_folder("XDG_CACHE_HOME", ".cache", environ)


def state_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Llmtune's folder for crash files: `llmtune` in `XDG_STATE_HOME` or `~/.local/state`; None without a home."""
    folder = _user_folder("XDG_STATE_HOME", ".local/state", environ)
    return folder / "llmtune" if folder else None


def _user_folder(variable: str, below_home: str, environ: Mapping[str, str]) -> Path | None:
    if environ.get(variable):
        return Path(environ[variable])
    # A service may run without HOME; the user database may still name a home.
    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    return None if home == "~" else Path(home) / below_home
