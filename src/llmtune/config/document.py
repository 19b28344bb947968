"""YAML text -> a tree in which every value has its line, with nothing converted yet.

PyYAML only splits the text into events; no tag is ever constructed. A scalar becomes a number, a truth value or text
later, by the type that the schema declares for its key, so `1e-5`, `010`, `no` and `12:30:45` cannot be misread.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from llmtune.common.text import excerpt
from llmtune.errors import Problem

__all__ = [
    "DEFAULT",
    "Entry",
    "Listing",
    "Node",
    "Origin",
    "Scalar",
    "Table",
    "Unreadable",
    "from_python",
    "parse_yaml",
    "read_text",
    "shown",
]

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 100_000
MAX_EXPANDED = 4_000_000
"""Characters and nodes that a file may have once its aliases are followed."""

CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
NULLS = {"", "~", "null", "Null", "NULL"}


class Unreadable(Exception):
    """A file or a value that cannot be read at all; holds the problem to report."""

    def __init__(self, problem: str, where: str | None = None, fix: str | None = None) -> None:
        self.problem = Problem(problem, where, fix)
        super().__init__(str(self.problem))


@dataclass(frozen=True)
class Origin:
    """The source of a value; printed as `where` alone.

    >>> print(Origin("file", "configs/dev.yaml:14"))
    configs/dev.yaml:14
    """

    kind: Literal["default", "file", "env", "flag", "override"]
    """The layer that the value is written in."""

    where: str
    """For people: `configs/dev.yaml:14`, `env LLMTUNE_DATA__MAX_LENGTH`, `--samples`, `command line` or `default`."""

    def __str__(self) -> str:
        return self.where


DEFAULT = Origin("default", "default")


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as it is written; `plain` where it has no quotes."""

    text: str
    plain: bool
    origin: Origin
    size: int = 1

    @property
    def is_null(self) -> bool:
        """Whether this is an empty value, `~` or `null` without quotes."""
        return self.plain and self.text in NULLS


@dataclass(frozen=True, slots=True)
class Listing:
    """A list of values."""

    items: tuple[Node, ...]
    origin: Origin
    size: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value` of a table; the key is always text."""

    key: str
    value: Node
    origin: Origin


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping, in the order it is written, without duplicate keys."""

    entries: tuple[Entry, ...]
    origin: Origin
    size: int = 1


Node = Scalar | Listing | Table


def shown(node: Node) -> str:
    """Return a value as one short line for a message."""
    if isinstance(node, Scalar):
        return excerpt(node.text)
    if isinstance(node, Listing):
        return excerpt(
            "[" + ", ".join(shown(item) for item in node.items[:8]) + ("" if len(node.items) <= 8 else ", ...") + "]"
        )
    return excerpt("{" + ", ".join(f"{entry.key}: {shown(entry.value)}" for entry in node.entries[:8]) + "}")


def read_text(path: Path, file: str) -> str:
    """Return the text of a config file of at most a megabyte, called `file` in errors.

    Raises:
        Unreadable: it is not a regular file, too large (found without reading it), or not UTF-8 (names the line).
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("a config must be a file", file, "name a YAML or JSON file, or a preset")
        if status.st_size > MAX_BYTES:
            raise Unreadable(
                f"this file has {status.st_size:,} bytes; a config has at most {MAX_BYTES:,}",
                file,
                "is this a data file? Name it with `data.train`",
            )
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}", file) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Unreadable(
            f"byte {content[error.start]:#04x} is not UTF-8", f"{file}:{line}", "save the file as UTF-8"
        ) from error


def parse_yaml(
    text: str,
    origin_of: Callable[[int], Origin],
    problems: list[Problem],
    earlier: list[tuple[str, str, str]] | None = None,
) -> Node:
    """Turn one YAML document into a tree; `origin_of(line)` returns the origin of a value on that 1-based line.

    Duplicate keys, tags and keys that are not text are added to `problems`; the tree holds the rest. With `earlier` the
    last of equal keys counts, as for PyYAML's own loaders, and (key, value, place) of those before it are added there.

    Raises:
        Unreadable: the text is not YAML, refers to itself, nests or expands without bound, or holds several documents.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    composer = _Composer(origin_of, problems, earlier)
    try:
        # Events and not objects: PyYAML's objects know neither their line nor that a key came twice.
        return composer.document(yaml.parse(text, Loader=loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "it cannot be read"
        line = mark.line if mark else 0
        has_tab = line <= text.count("\n") and "\t" in text.split("\n")[line]
        fix = (
            "indent with spaces, not tabs"
            if has_tab
            else "check the indentation, quotes and brackets here and one line above"
        )
        raise Unreadable(f"not valid YAML: {reason}", origin_of(line + 1).where, fix) from error
    except yaml.YAMLError as error:
        position = getattr(error, "position", 0) or 0
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 1
        character = excerpt(text[position : position + 1]) if isinstance(position, int) else ""
        raise Unreadable(
            f"character `{character}` is not allowed in YAML", origin_of(line).where, "remove it"
        ) from error


class _Composer:
    """Builds the tree from parser events; anchors are shared, never copied, and their expanded size is counted."""

    def __init__(
        self,
        origin_of: Callable[[int], Origin],
        problems: list[Problem],
        earlier: list[tuple[str, str, str]] | None,
    ) -> None:
        self.origin_of = origin_of
        self.problems = problems
        self.earlier = earlier
        self.anchors: dict[str, Node] = {}
        self.open_anchors: set[str] = set()
        self.values = 0

    def document(self, events: Iterable[yaml.Event]) -> Node:
        stream = iter(events)
        root: Node | None = None
        for event in stream:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise Unreadable(
                        "a second document starts here", self._origin(event).where, "keep one document in a config file"
                    )
                root = self._node(next(stream), stream, depth=0)
        return root if root is not None else Scalar("", True, self.origin_of(1))

    def _origin(self, event: yaml.Event) -> Origin:
        mark = event.start_mark
        return self.origin_of(mark.line + 1 if mark else 1)

    def _node(self, event: yaml.Event, stream: Iterator[yaml.Event], depth: int) -> Node:
        origin = self._origin(event)
        if depth > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} levels deep", origin.where)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor or "", origin)
        self.values += 1
        if self.values > MAX_VALUES:
            raise Unreadable(
                f"more than {MAX_VALUES:,} values", origin.where, "is this a data file? Name it with `data.train`"
            )
        tag = getattr(event, "tag", None)
        self._check_tag(tag, origin)
        anchor = getattr(event, "anchor", None)
        if anchor:
            # Open until its value is complete: an alias to it inside would be a circle.
            self.open_anchors.add(anchor)
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = Scalar(event.value, not event.style and tag != "tag:yaml.org,2002:str", origin, 1 + len(event.value))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._listing(stream, origin, depth)
        else:
            node = self._table(stream, origin, depth)
        # A few lines of nested aliases expand to billions of values (the billion laughs attack).
        if node.size > MAX_EXPANDED:
            raise Unreadable("aliases expand this value beyond all bounds", origin.where, "write it out")
        if anchor:
            self.open_anchors.discard(anchor)
            self.anchors[anchor] = node
        return node

    def _alias(self, name: str, origin: Origin) -> Node:
        if name in self.open_anchors:
            raise Unreadable(f"`*{excerpt(name)}` refers to itself", origin.where)
        if name not in self.anchors:
            raise Unreadable(f"`*{excerpt(name)}` refers to an anchor that is not defined above", origin.where)
        return self.anchors[name]

    def _check_tag(self, tag: str | None, origin: Origin) -> None:
        if tag is None or tag in CORE_TAGS or tag == "!":
            return
        name = tag.replace("tag:yaml.org,2002:", "!!")
        if "python" in name:
            raise Unreadable(f"`{excerpt(name)}` would run code; a config is only data", origin.where, "remove the tag")
        self.problems.append(
            Problem(
                f"tag `{excerpt(name)}` means nothing here",
                origin.where,
                "remove it; values take the type their key declares",
            )
        )

    def _listing(self, stream: Iterator[yaml.Event], origin: Origin, depth: int) -> Listing:
        items: list[Node] = []
        for event in stream:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self._node(event, stream, depth + 1))
        return Listing(tuple(items), origin, 1 + sum(item.size for item in items))

    def _table(self, stream: Iterator[yaml.Event], origin: Origin, depth: int) -> Table:
        entries: dict[str, Entry] = {}
        merged: list[Node] = []
        for event in stream:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._node(event, stream, depth + 1)
            value = self._node(next(stream), stream, depth + 1)
            if not isinstance(key, Scalar):
                self.problems.append(Problem(f"`{shown(key)}` cannot be a key", key.origin.where, "write a name"))
            elif key.plain and key.text == "<<":
                merged.extend(value.items if isinstance(value, Listing) else [value])
            elif key.text in entries and self.earlier is not None:
                before = entries.pop(key.text)
                self.earlier.append((key.text, shown(before.value), before.origin.where))
                entries[key.text] = Entry(key.text, value, key.origin)
            elif key.text in entries:
                first = entries[key.text].origin.where
                self.problems.append(
                    Problem(
                        f"key `{excerpt(key.text)}` stands twice (`{shown(value)}` here; first at {first})",
                        key.origin.where,
                        "keep one of them",
                    )
                )
            else:
                # The value of an alias has the origin of its anchor: there it is written.
                entries[key.text] = Entry(key.text, value, key.origin)
        # After the mapping's own keys, which win over merged ones wherever `<<` is written.
        for source in merged:
            if not isinstance(source, Table):
                self.problems.append(Problem(f"`<<` needs a mapping, not `{shown(source)}`", source.origin.where))
                continue
            for entry in source.entries:
                entries.setdefault(entry.key, entry)
        return Table(
            tuple(entries.values()), origin, 1 + sum(len(entry.key) + entry.value.size for entry in entries.values())
        )


def from_python(value: object, origin: Origin) -> Node:
    """Turn a plain Python value (of a flag or a dict) into a tree in which every node has the same origin."""
    if value is None:
        return Scalar("null", True, origin)
    # Before the numbers: a bool is an int in Python.
    if isinstance(value, bool):
        return Scalar("true" if value else "false", True, origin)
    if isinstance(value, dict):
        return Table(tuple(Entry(str(key), from_python(item, origin), origin) for key, item in value.items()), origin)
    if isinstance(value, list | tuple):
        return Listing(tuple(from_python(item, origin) for item in value), origin)
    return Scalar(str(value), not isinstance(value, str), origin)
