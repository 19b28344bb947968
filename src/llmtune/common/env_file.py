"""The `.env` file of a working folder, in which people keep keys that belong to no config."""

from __future__ import annotations

from pathlib import Path

__all__ = ["value_in_env_file"]


def value_in_env_file(name: str) -> str | None:
    """Return the value of `name` in a file of `NAME=VALUE` lines; None without the file or the name.

    `export` before a name and quotes around a value are taken off; nothing else is interpreted.
    """
    try:
        lines = Path(".env").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        key, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and key.strip() == name:
            value = value.strip()
            is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            return (value[1:-1] if is_quoted else value) or None
    return None
