"""The settings of an import as YAML: each line with its origin, and the peer's own defaults in a block of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmtune.common.text import printable
from llmtune.config.dump import source_text, value_text
from llmtune.config.importers.tables import Peer
from llmtune.config.keys import LEAVES

__all__ = ["Setting", "write_yaml"]


class Setting(NamedTuple):
    """A value of one of our keys, and where it comes from."""

    value: Any
    where: str
    """The line; empty for a default of the peer."""
    written: str
    """The key as the peer calls it."""
    said: str = ""
    """The arithmetic, or the source of a default."""
    weak: bool = False
    is_default: bool = False
    item_places: tuple[str, ...] = ()
    """The line of each data set."""


def write_yaml(
    settings: Mapping[str, Setting], peer: Peer, file: str, unmatched: Sequence[str]
) -> tuple[str, dict[int, str]]:
    """Return the YAML and, by line number, the key that stands there.

    `unmatched`: a line for each key without an equivalent, written at the top.
    """
    lines = [f"# {printable(file)}: a config of {peer.name}, translated by `llmtune config import`."]
    if unmatched:
        lines.append(f"# Without an equivalent here ({len(unmatched)}):")
        lines += [f"#   {_comment(row)}" for row in unmatched]
    places: dict[int, str] = {}
    section = None
    for key, marks_defaults in _ordered(settings):
        name, _, leaf = key.partition(".")
        if name != section:
            lines += ["", f"{name}:"]
            section = name
        if marks_defaults:
            lines.append(f"  # {peer.name}'s own defaults, which the file leaves out:")
        first = len(lines) + 1
        _write_setting(key, leaf, settings[key], lines)
        places |= dict.fromkeys(range(first, len(lines) + 1), key)
    return "\n".join(lines) + "\n", places


def _ordered(settings: Mapping[str, Setting]) -> list[tuple[str, bool]]:
    """The keys in the order of the schema; in each section those of the file come first, then the defaults.

    With each: whether it is the first default of its section.
    """
    order = {key: place for place, key in enumerate(LEAVES)}
    sections = list(dict.fromkeys(key.partition(".")[0] for key in LEAVES))
    rows: list[tuple[str, bool]] = []
    for section in sections:
        keys = sorted((key for key in settings if key.partition(".")[0] == section), key=order.__getitem__)
        rows += [(key, False) for key in keys if not settings[key].is_default]
        rows += [(key, not place) for place, key in enumerate(key for key in keys if settings[key].is_default)]
    return rows


def _write_setting(key: str, leaf: str, setting: Setting, lines: list[str]) -> None:
    if key in ("data.train", "data.eval"):
        lines.append(f"  {leaf}:")
        for source, place in zip(setting.value, setting.item_places, strict=True):
            lines.append(f"    - {source_text(source)}  # {_comment(place)}")
        return
    origin = f"{setting.where}: {setting.written}" if setting.where else ""
    said = "; ".join(part for part in (origin, setting.said) if part)
    lines.append(f"  {leaf}: {value_text(setting.value)}  # {_comment(said)}".rstrip(" #"))


def _comment(text: str) -> str:
    """Text that stays within its comment."""
    return printable(" ".join(text.split()))
