"""The configurations of a data set in a folder, as the front matter of its README.md lists them.

The format is that of the `datasets` library: https://huggingface.co/docs/hub/datasets-manual-configuration
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llmtune.config.document import Listing, Node, Origin, Scalar, Table, Unreadable, parse_yaml, read_text

__all__ = ["CardConfig", "card_configs"]


class CardConfig(NamedTuple):
    """One entry of `configs:`."""

    name: str
    files: tuple[tuple[str | None, str], ...]
    """(split, pattern relative to the folder) of each line of `data_files`; None: the files' names say the split."""
    folder: str | None
    """`data_dir`: the folder of its files, where no patterns are given."""
    is_default: bool


def card_configs(card: Path) -> list[CardConfig]:
    """The configurations that a README.md lists; none where it has no front matter that can be read."""
    try:
        lines = read_text(card, str(card)).splitlines()
        if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
            return []
        end = next(number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---")
        root = parse_yaml("\n".join(lines[1:end]), lambda line: Origin("file", f"{card}:{line + 1}"), [])
    except Unreadable:
        return []
    entries = _items(_value(root, "configs"))
    return [config for entry in entries if (config := _config(entry)) is not None]


def _config(entry: Node) -> CardConfig | None:
    name = _text(_value(entry, "config_name"))
    if name is None:
        return None
    files: list[tuple[str | None, str]] = []
    given = _value(entry, "data_files")
    if isinstance(given, Table) and _value(given, "path") is None:  # {train: a.jsonl, test: [b.jsonl]}
        files += [(line.key, text) for line in given.entries for text in _texts(line.value)]
        given = None
    for item in _items(given):
        if isinstance(item, Table):
            files += [(_text(_value(item, "split")), text) for text in _texts(_value(item, "path"))]
        else:
            files += [(None, text) for text in _texts(item)]
    folder = _text(_value(entry, "data_dir"))
    is_default = name == "default" or (_text(_value(entry, "default")) or "").lower() == "true"
    return CardConfig(name, tuple(files), folder, is_default)


def _value(node: Node | None, key: str) -> Node | None:
    entries = node.entries if isinstance(node, Table) else ()
    return next((entry.value for entry in entries if entry.key == key), None)


def _items(node: Node | None) -> tuple[Node, ...]:
    return () if node is None else node.items if isinstance(node, Listing) else (node,)


def _text(node: Node | None) -> str | None:
    return node.text if isinstance(node, Scalar) and not node.is_null else None


def _texts(node: Node | None) -> list[str]:
    return [text for item in _items(node) if (text := _text(item)) is not None]
