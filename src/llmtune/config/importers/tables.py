"""The tables of other toolkits ("peers"): one file each in `peers/`, with tabs between the columns.

A line is one key: the key, the rule that reads it (`rules.RULES`), what the rule needs, and a text for people. A key
may hold `[]` for the items of a list and `*` for any rest. Lines that begin with `@` are about the toolkit itself:

| line | is |
| --- | --- |
| `@name` | its name for people |
| `@url` | where its keys are documented |
| `@detect` | keys by which a file of it is recognised; `+` before a key counts five times, `-` speaks against it |
| `@include` | another table whose keys it also reads, and a prefix they stand under |
| `@unknown` | what becomes of a key that is not in the table: `ignored` where the toolkit reads past it |
| `@assume` | the toolkit's own default of one of its keys, used where arithmetic needs it |
| `@default` | our key, the toolkit's own value, when (`rules.holds`), and where that value comes from |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import NamedTuple

__all__ = ["Default", "Peer", "Row", "own_table", "peer_names", "peer_of"]


class Row(NamedTuple):
    """How one key of a peer is read."""

    key: str
    rule: str
    """A name in `rules.RULES`."""
    argument: str = ""
    """What the rule needs: mostly one of our keys."""
    text: str = ""
    """A reason, words with their translations, or arithmetic, as the rule reads it."""
    prefix: str = ""
    """What stands before the key, and before the keys that its rule names, where the table is included."""


class Default(NamedTuple):
    """A value that a peer takes where a file gives none."""

    key: str
    """One of our keys."""
    value: str
    """A value, or `=` and arithmetic over our keys."""
    when: str
    """Words that must all hold; see `rules.holds`."""
    text: str


@dataclass
class Peer:
    """One toolkit, as its table says."""

    id: str
    name: str = ""
    url: str = ""
    detect: dict[str, int] = field(default_factory=dict)
    """Key -> how much it speaks for this peer."""
    unknown: str = "none"
    includes: list[tuple[str, str]] = field(default_factory=list)
    """Other tables, each with the prefix that its keys have."""
    assume: dict[str, str] = field(default_factory=dict)
    defaults: list[Default] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    patterns: list[tuple[re.Pattern[str], Row]] = field(default_factory=list)
    """The rows whose key holds a `*`, in the order of the table."""

    def row(self, key: str) -> Row | None:
        """Return the row of a key (`[]` for each place in a list); the whole name comes before patterns."""
        if key in self.rows:
            return self.rows[key]
        return next((row for pattern, row in self.patterns if pattern.fullmatch(key)), None)

    def add(self, row: Row) -> None:
        """Add a row, unless the table has one of this key already: its own rows stand before those it includes."""
        if "*" in row.key:
            self.patterns.append((re.compile(re.escape(row.key).replace(r"\*", ".*")), row))
        else:
            self.rows.setdefault(row.key, row)


@cache
def peer_names() -> tuple[str, ...]:
    """Return the ids of all peers, in the order of their names."""
    folder = resources.files(__package__) / "peers"
    names = (entry.name.removesuffix(".tsv") for entry in folder.iterdir() if entry.name.endswith(".tsv"))
    return tuple(sorted(name for name in names if not name.startswith("_")))


@cache
def peer_of(peer_id: str) -> Peer:
    """Return a peer with the rows of its own table and of those it includes."""
    peer = own_table(peer_id)
    for name, prefix in peer.includes:
        for columns in table_lines(name):
            if columns[0] == "@assume":
                peer.assume.setdefault(prefix + columns[1], columns[2])
            elif columns[0] == "@default" or not columns[0].startswith("@"):
                _read_line(peer, columns, prefix)
    return peer


def own_table(name: str) -> Peer:
    """Return a peer with the rows of its own table alone."""
    peer = Peer(name)
    for columns in table_lines(name):
        if columns[0] == "@include":
            peer.includes.append((columns[1], columns[2] if len(columns) > 2 else ""))
        elif columns[0] == "@unknown":
            peer.unknown = columns[1]
        else:
            _read_line(peer, columns, "")
    return peer


def table_lines(name: str) -> list[list[str]]:
    """Return the columns of every line of a table, without comments."""
    text = (resources.files(__package__) / "peers" / f"{name}.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _read_line(peer: Peer, columns: list[str], prefix: str) -> None:
    kind, *rest = columns
    if kind == "@name":
        peer.name = rest[0]
    elif kind == "@url":
        peer.url = rest[0]
    elif kind == "@detect":
        for word in " ".join(rest).split():
            peer.detect[word.lstrip("+-")] = {"+": 5, "-": -5}.get(word[0], 1)
    elif kind == "@assume":
        peer.assume[rest[0]] = rest[1]
    elif kind == "@default":
        peer.defaults.append(Default(*([*rest, "", "", ""])[:4]))
    else:
        # Several keys with spaces between them may share one line.
        rule, argument, text = [*rest, "", "", ""][:3]
        for key in kind.split(" "):
            peer.add(Row(prefix + key, rule, argument, text, prefix))
