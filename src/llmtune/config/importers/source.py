"""A foreign file -> the keys it gives: YAML, JSON, command lines of a shell script or a page, calls of Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llmtune.config.document import (
    Entry,
    Listing,
    Node,
    Origin,
    Scalar,
    Table,
    Unreadable,
    parse_yaml,
    read_text,
)
from llmtune.config.importers.command_lines import command_tables
from llmtune.config.importers.python_calls import notebook_table, script_table
from llmtune.config.json_document import parse_json
from llmtune.errors import ConfigError, Problem

__all__ = ["Given", "Source", "flatten", "read_sources", "script_of"]


@dataclass(frozen=True)
class Source:
    """One config found in a file; a script may hold several command lines."""

    file: str
    table: Table
    form: str
    """`config`, `command` or `calls`."""
    place: str
    """Where it begins, for people: the file, or `file:line`."""
    referenced: frozenset[str] = frozenset()
    """Keys that others take by `${key}`."""
    repeated: tuple[tuple[str, str, str], ...] = ()
    """(key, value, line) of keys that stand again further down in the same table."""


@dataclass(frozen=True)
class Given:
    """One value that a foreign file gives."""

    key: str
    """The dotted name with places in lists: `datasets[0].path`."""
    node: Node

    @property
    def name(self) -> str:
        """The key with empty brackets, as tables name it: `datasets[].path`."""
        return re.sub(r"\[\d+\]", "[]", self.key)


def read_sources(path: Path) -> list[Source]:
    """Return every config that a file holds, in its order.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    # A notebook holds its pictures too; only its code is read.
    notebook = path.suffix == ".ipynb"
    try:
        text = path.read_text(encoding="utf-8") if notebook and path.is_file() else read_text(path, str(path))
        sources = list(_sources(path, text))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read", str(path), "name a text file") from error
    except Unreadable as unreadable:
        raise ConfigError(*unreadable.problem) from unreadable
    if not sources:
        named = re.search(r"[\w./-]+\.(?:yaml|yml|json)\b", text)
        raise ConfigError(
            f"`{path.name}` holds no config, command line or call that trains",
            str(path),
            f"it names `{named[0]}`: import that file"
            if named
            else "name a YAML or JSON file, a script with a command of LLaMA-Factory, TRL, ms-swift or mlx-lm, or a "
            "script or notebook that calls Unsloth",
        )
    return sources


def script_of(path: Path) -> Table | None:
    """Return the first command or call that trains in a script, notebook or page; None where there is none."""
    if path.suffix not in (".ipynb", ".py", ".sh", ".md", ".bash"):
        return None
    try:
        return read_sources(path)[0].table
    except ConfigError:
        return None


def _sources(path: Path, text: str) -> Iterator[Source]:
    file = str(path)
    if path.suffix == ".ipynb":
        table = notebook_table(text, file)
        if table.entries:
            yield Source(file, table, "calls", file)
    elif path.suffix == ".py":
        table = script_table(text, file)
        if table.entries:
            yield Source(file, table, "calls", file)
        else:
            yield from _commands(file, text)
    elif path.suffix in (".sh", ".md", ".bash", ".txt"):
        yield from _commands(file, text)
    else:
        yield _parsed(text, file, path.suffix == ".json")


def _commands(file: str, text: str) -> Iterator[Source]:
    for place, table in command_tables(text, file):
        yield Source(file, table, "command", place)


def _parsed(text: str, file: str, is_json: bool) -> Source:
    problems: list[Problem] = []
    repeated: list[tuple[str, str, str]] = []

    def origin_of(line: int) -> Origin:
        return Origin("file", f"{file}:{line}")

    root = parse_json(text, origin_of, problems) if is_json else parse_yaml(text, origin_of, problems, repeated)
    if problems:
        raise Unreadable(problems[0].problem, problems[0].where, problems[0].fix)
    if not isinstance(root, Table):
        raise Unreadable("this is not a mapping of keys", file, "is it a config of another toolkit?")
    places = [(key, value, f"line {place.rpartition(':')[2]}") for key, value, place in repeated]
    table, referenced = _interpolated(root, is_json)
    return Source(file, table, "config", file, referenced, tuple(places))


def flatten(node: Node, key: str = "") -> Iterator[Given]:
    """Return every value under its dotted key; a list of plain values is one value, as is an empty mapping."""
    if isinstance(node, Table) and (node.entries or not key):
        for entry in node.entries:
            yield from flatten(entry.value, f"{key}.{entry.key}" if key else entry.key)
    elif isinstance(node, Listing) and any(isinstance(item, Table) for item in node.items):
        for index, item in enumerate(node.items):
            yield from flatten(item, f"{key}[{index}]")
    else:
        yield Given(key, node)


_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


_TRUE, _FALSE = ("yes", "Yes", "YES", "on", "On", "ON"), ("no", "No", "NO", "off", "Off", "OFF")
"""Truth values of YAML 1.1, which the readers of other toolkits know and ours does not."""


def _interpolated(root: Table, is_json: bool) -> tuple[Table, frozenset[str]]:
    """Replace `${key}` by the text of that key, as OmegaConf does for torchtune and oumi; with the keys so taken."""
    texts = {given.key: given.node.text for given in flatten(root) if isinstance(given.node, Scalar)}
    referenced = {name for text in texts.values() for name in _REFERENCE.findall(text)}

    def text_of(text: str, depth: int = 0) -> str:
        if depth > 5 or "${" not in text:
            return text
        return _REFERENCE.sub(lambda match: text_of(texts.get(match[1], match[0]), depth + 1), text)

    def walk(node: Node) -> Node:
        if isinstance(node, Scalar):
            if node.plain and not is_json and node.text in (*_TRUE, *_FALSE):
                return replace(node, text="true" if node.text in _TRUE else "false")
            return replace(node, text=text_of(node.text)) if "${" in node.text else node
        if isinstance(node, Listing):
            return Listing(tuple(walk(item) for item in node.items), node.origin, node.size)
        return table_of(node)

    def table_of(table: Table) -> Table:
        entries = tuple(Entry(entry.key, walk(entry.value), entry.origin) for entry in table.entries)
        return Table(entries, table.origin, table.size)

    return table_of(root), frozenset(referenced)
