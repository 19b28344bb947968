"""A foreign config -> one of ours, with what became of every key, and the peer's own defaults written out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmtune.common.text import excerpt
from llmtune.config import aliases
from llmtune.config.convert import Mismatch, convert
from llmtune.config.document import Entry, Listing, Node, Origin, Scalar, Table, shown
from llmtune.config.importers.answers import count_prompts
from llmtune.config.importers.arithmetic import Unknown, evaluate
from llmtune.config.importers.datasets import ALL_RULES, READS_VALUE
from llmtune.config.importers.detect import detect, is_read_here
from llmtune.config.importers.key_report import KeyReport, shown_value
from llmtune.config.importers.python_calls import is_code
from llmtune.config.importers.rules import NO_VALUE, Context, Outcome, Result, is_off, plain_text, words_of_row
from llmtune.config.importers.source import Given, Source, flatten
from llmtune.config.importers.tables import Default, Peer, Row, peer_names, peer_of
from llmtune.config.importers.unused import unused_settings
from llmtune.config.importers.yaml_text import Setting, write_yaml
from llmtune.config.keys import LEAVES
from llmtune.config.layers import parse_config
from llmtune.config.translation import Change
from llmtune.errors import ConfigError, UsageError

__all__ = ["Imported", "import_source"]


HOW = ("distributed.", "tracking.", "model.attention", "model.offload_weights", "training.compile")
"""Beginnings of keys that change how a step is computed or what is shown, and not what is trained."""
LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names for a kind of file where the path of a data set is expected: the file itself is named by another key."""
FORM_OF = dict.fromkeys(("dpo", "orpo", "simpo", "reward"), "preference") | {
    "kto": "unpaired",
    "grpo": "prompt",
    "classification": "classification",
}
"""Methods that do not learn answers -> the format of their rows."""


@dataclass
class Imported:
    """The result of an import."""

    peer: Peer
    recognised_by: tuple[str, ...]
    keys: list[KeyReport]
    settings: dict[str, Setting]
    """Values by our keys, those of the file and the peer's own defaults."""
    yaml: str = ""
    rejected: list[str] = field(default_factory=list)
    """Defaults of the peer that a config of ours cannot have, each with the reason."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is without an equivalent."""
        return not self.rejected and all(row.outcome is not Outcome.NONE for row in self.keys)


def import_source(source: Source, peer_id: str | None = None) -> Imported:
    """Translate one foreign config; its keys, in their order, decide, and the peer's defaults fill in.

    Raises:
        UsageError: `peer_id` is no toolkit that has a table.
        ConfigError: it was not given, and the keys speak for none.
    """
    peer, keys = _peer(source, peer_id)
    values = {given.key: given.node for given in flatten(source.table)}
    folders = tuple(str(folder) for folder in (Path(), *Path(source.file).resolve().parents))
    translation = _Translation(Context(peer, values, folders), source)
    for key, node in values.items():
        translation.take(Given(key, node))
    # What is learnt decides the form of the rows, and what is said of both decides the rest.
    translation.fill_in([default for default in peer.defaults if default.key == "objective.method"])
    translation.join_sources()
    translation.fill_in(peer.defaults)
    imported = Imported(peer, keys, translation.rows, translation.settings, rejected=translation.rejected)
    for key, said in count_prompts(imported.settings).items():
        for row in imported.keys:
            if key in row.ours:
                row.outcome, row.text = Outcome.COMPUTED, said
    for setting, outcome, text in unused_settings(imported.settings, translation.context.text):
        _remove(imported, setting, outcome, text)
    _make_valid(imported, source)
    return imported


def _peer(source: Source, peer_id: str | None) -> tuple[Peer, tuple[str, ...]]:
    if peer_id is not None:
        if peer_id not in peer_names():
            listed = ", ".join(peer_names())
            raise UsageError(f"no toolkit is called `{excerpt(peer_id)}`", "--from", f"the toolkits are {listed}")
        return peer_of(peer_id), ("--from",)
    found = detect(source.table)
    if found is None:
        name_it = f"name it with `--from`: {', '.join(peer_names())}"
        if is_read_here(source.table):
            as_is = f"configs take these keys as they are: `llmtune config show --config {shlex.quote(source.place)}`"
            raise ConfigError(
                "the keys of this file are those of no one toolkit", source.place, f"{as_is}; or {name_it}"
            )
        raise ConfigError("the keys of this file belong to no toolkit that has a table", source.place, name_it)
    return peer_of(found.peer), found.keys


class _Translation:
    """Collects the settings and the report, key by key."""

    def __init__(self, context: Context, source: Source) -> None:
        self.context = context
        self.source = source
        self.rows = [
            KeyReport(key, value, "", place, Outcome.IGNORED, (), "it stands again below, and the last one counts")
            for key, value, place in source.repeated
        ]
        self.rejected: list[str] = []
        self.settings: dict[str, Setting] = {}
        self.sources: dict[str, dict[int, dict[str, Change]]] = {}
        self.betas: dict[int, tuple[Node, KeyReport]] = {}
        self.of_source: dict[str, list[KeyReport]] = {}

    def take(self, given: Given) -> None:
        """Read one key by its row, and report what became of it."""
        row = self.context.peer.row(given.name)
        result = self.result(given, row)
        report = KeyReport(given.key, *shown_value(given), self.place(given.node), result.outcome, (), result.text)
        self.rows.append(report)
        for change in result.changes:
            self.apply(change, given, report)

    def place(self, node: Node) -> str:
        """Where a value stands in the file, for people: its line, or the cell of a notebook."""
        place = node.origin.where.removeprefix(f"{self.source.file}:")
        return f"line {place}" if place.isdigit() else place

    def result(self, given: Given, row: Row | None) -> Result:
        """What the row makes of the value; a value that cannot be read yet is named, and null is not set."""
        if row is None:
            return self.unknown(given)
        rule = ALL_RULES[row.rule]
        if rule in READS_VALUE:
            known = words_of_row(row)
            said = shown(given.node).lower()
            if isinstance(given.node, Scalar) and given.node.is_null and "null" not in known:
                return Result(Outcome.DROPPED, NO_VALUE)
            if is_code(said) and said not in known:
                return Result(Outcome.NEEDS, "only running the script tells its value: write it by hand")
            if re.search(r"\$[{(]*\w", plain_text(given.node)):
                return Result(Outcome.NEEDS, "the value comes from outside the file: write it by hand")
        try:
            return rule(replace(self.context, prefix=row.prefix), given, row)
        except Mismatch as mismatch:
            return Result(Outcome.NONE, f"it must be {mismatch.expected}")

    def unknown(self, given: Given) -> Result:
        """A key that the table does not have."""
        name = self.context.peer.name
        if self.context.peer.unknown == "ignored":
            return Result(Outcome.IGNORED, f"{name} has no such key and reads past it")
        is_empty = isinstance(given.node, Listing | Table) and is_off(given.node)
        if is_empty or (isinstance(given.node, Scalar) and given.node.is_null):
            return Result(Outcome.DROPPED, NO_VALUE)
        if given.key in self.source.referenced:
            return Result(Outcome.DROPPED, f"other keys take it by `${{{given.key}}}`")
        return Result(Outcome.NONE, f"the table of {name} does not have this key")

    def apply(self, change: Change, given: Given, report: KeyReport) -> None:
        """Keep one value, unless the file says it already; what cannot be a value here has no equivalent."""
        part = re.fullmatch(r"(data\.(?:train|eval))\[(\d*)\]\.(.+)", change.key)
        if part:
            place = re.search(r"\[(\d+)\]", given.key)
            index = int(part[2] or (place[1] if place else 0))
            fields = self.sources.setdefault(part[1], {}).setdefault(index, {})
            before = fields.get(part[3])
            if before is None or before.weak or plain_text(before.value) in LOADERS:
                fields[part[3]] = change
            self.of_source.setdefault(part[1], []).append(report)
            report.ours = tuple(dict.fromkeys((*report.ours, f"{part[1]}[].{part[3]}")))
            return
        if change.key.startswith("training.betas["):
            index = int(change.key[-2])
            self.betas[index] = (change.value, report)
            self.join_betas(report)
            return
        self.settle(change, report)

    def join_betas(self, report: KeyReport) -> None:
        """Adam's betas that are given one by one; the other one is the peer's own default."""
        assumed = (
            self.context.peer.assume.get("adam_beta1", "0.9"),
            self.context.peer.assume.get("adam_beta2", "0.999"),
        )
        origin = next(iter(self.betas.values()))[0].origin
        items = tuple(
            self.betas[index][0] if index in self.betas else Scalar(assumed[index], True, origin) for index in (0, 1)
        )
        self.settings.pop("training.betas", None)
        self.settle(Change("training.betas", Listing(items, origin)), report)

    def settle(self, change: Change, report: KeyReport) -> None:
        """Convert one value and keep it; a weak one gives way."""
        before = self.settings.get(change.key)
        if before is not None and change.weak:
            return
        try:
            value = _converted(change.key, change.value)
        except Mismatch as mismatch:
            report.outcome, report.text = Outcome.NONE, f"`{change.key}` must be {mismatch.expected}"
            return
        if before is not None and isinstance(value, Mapping):
            value = {**before.value, **value}
        elif before is not None and not before.weak and before.value != value:
            report.outcome = Outcome.NONE
            report.text = f"`{before.written}` has set `{change.key}` to another value"
            return
        report.ours = (*report.ours, change.key)
        said = report.text if report.outcome is Outcome.COMPUTED else ""
        self.settings[change.key] = Setting(value, self.place(change.value), report.name, said, change.weak)

    def join_sources(self) -> None:
        """Put the parts of each data set together; one without a path cannot be read."""
        for key, by_index in self.sources.items():
            rows = []
            for index, fields in sorted(by_index.items()):
                trained = self.sources.get("data.train", {}).get(index, {})
                if key == "data.eval" and "path" not in fields and "path" in trained:
                    own = ("split", "max_samples", "share")
                    fields = {name: change for name, change in trained.items() if name not in own} | fields
                if "path" in fields:
                    rows.append(_source_table({name: change.value for name, change in fields.items()}))
            paths = {plain_text(fields["path"].value) for fields in by_index.values() if "path" in fields}
            for report in self.of_source[key]:
                kind = report.value.lower()
                if f"{key}[].path" in report.ours and kind in LOADERS and kind not in paths:
                    report.outcome, report.text, report.ours = Outcome.DROPPED, "another key names the file", ()
            if not rows:
                for report in self.of_source[key]:
                    report.outcome, report.text = Outcome.NEEDS, f"no rows are named beside it: write `{key}` by hand"
                    report.ours = tuple(ours for ours in report.ours if not ours.startswith(key))
                continue
            rows = [self.for_method(row) for row in rows]
            written = self.of_source[key][0]
            try:
                value = convert(Listing(tuple(rows), rows[0].origin), LEAVES[key])
            except Mismatch as mismatch:
                written.outcome, written.text = Outcome.NONE, f"`{key}` must be {mismatch.expected}"
                continue
            places = tuple(self.place(row) for row in rows)
            self.settings[key] = Setting(value, places[0], written.key, "", item_places=places)

    def for_method(self, row: Table) -> Table:
        """A data set whose rows have the form that the method learns from: a family of chats may hold pairs."""
        method = self.settings.get("objective.method")
        form = FORM_OF.get(str(method.value)) if method else None
        if form is None:
            return row
        entries = [entry for entry in row.entries if entry.key not in ("format", "train_on")]
        return Table((*entries, Entry("format", Scalar(form, True, row.origin), row.origin)), row.origin)

    def fill_in(self, defaults: list[Default]) -> None:
        """Write the peer's own default of every key that the file leaves out."""
        for default in defaults:
            if default.key in self.settings or not self.holds(default.when):
                continue
            text = default.value
            said = default.text
            if text.startswith("="):
                try:
                    number, arithmetic = evaluate(text[1:], self.number)
                except Unknown:
                    continue
                text, said = repr(number), f"{said}: {arithmetic}"
            origin = Origin("default", f"default of {self.context.peer.name}")
            try:
                value = convert(_default_node(text, origin), LEAVES[default.key])
            except Mismatch as mismatch:
                self.rejected.append(f"`{default.key}`: {text} ({said}) must be {mismatch.expected}")
                continue
            self.settings[default.key] = Setting(value, "", "", said, is_default=True)

    def number(self, key: str) -> float | None:
        """A number under one of our keys, or one of the peer's."""
        value = self.settings[key].value if key in self.settings else None
        return float(value) if isinstance(value, int | float) else self.context.lookup(key)

    def holds(self, when: str) -> bool:
        """Whether every word holds: `lora`, `full`, `KEY=VALUE`, `KEY!=VALUE`, `has:KEY`, `no:KEY` (theirs or ours)."""
        return all(self._holds(word) for word in when.split())

    def _holds(self, word: str) -> bool:
        if word in ("lora", "full"):
            method = self.settings.get("adapter.method")
            return (method is not None and method.value == "lora") == (word == "lora")
        if word.startswith(("has:", "no:")):
            kind, _, key = word.partition(":")
            is_given = key in self.settings or isinstance(self.context.values.get(key), Listing)
            is_given = is_given or bool(self.context.text(key))
            is_given = is_given or any(name.startswith((f"{key}.", f"{key}[")) for name in self.context.values)
            return is_given == (kind == "has")
        key, wrong, value = word.partition("!=")
        if wrong:
            return not self._holds(f"{key}={value}")
        key, _, value = word.partition("=")
        if key in self.settings:
            return str(self.settings[key].value).lower() in value.split("|")
        return self.context.assumed(key) in value.split("|")


def _default_node(text: str, origin: Origin) -> Node:
    if text.startswith("["):
        return Listing(tuple(Scalar(item.strip(), True, origin) for item in text[1:-1].split(",")), origin)
    return Scalar(text, True, origin)


def _converted(key: str, node: Node) -> object:
    spelling = aliases.own_spelling(key, node)
    return convert(node if spelling is None else spelling, LEAVES[key])


def _source_table(fields: Mapping[str, Node]) -> Table:
    """One data set as a table; `columns.prompt` goes into `columns`."""
    first = next(iter(fields.values()))
    inner: dict[str, list[Entry]] = {}
    entries = []
    for name, node in fields.items():
        outer, _, rest = name.partition(".")
        if rest:
            inner.setdefault(outer, []).append(Entry(rest, node, node.origin))
        else:
            entries.append(Entry(name, node, node.origin))
    entries += [Entry(name, Table(tuple(items), first.origin), first.origin) for name, items in inner.items()]
    return Table(tuple(entries), fields["path"].origin)


# --- what our own checks say


def _make_valid(imported: Imported, source: Source) -> None:
    """Write the YAML; a value that our own checks refuse has no equivalent, with their reason."""
    for _ in range(len(imported.settings) + 1):
        imported.yaml, lines = write_yaml(
            imported.settings, imported.peer, Path(source.file).name, _unmatched(imported)
        )
        try:
            parse_config(imported.yaml, "import.yaml")
        except ConfigError as error:
            problem = error.problems[0]
            keys = [lines[int(number)] for number in re.findall(r"import\.yaml:(\d+)", problem.where or "")]
            assert keys, f"the import cannot be written: {problem}"
            # How a step is computed gives way to what it is, a default to what the file says, and what is said later
            # to what is said first.
            way = next((key for key in keys if key.startswith(HOW)), None)
            key = way or next((key for key in reversed(keys) if imported.settings[key].is_default), keys[-1])
            _remove(imported, key, Outcome.DROPPED if way else Outcome.NONE, problem.problem)
        else:
            return


def _unmatched(imported: Imported) -> list[str]:
    rows = [f"{row.name}: {row.said} ({row.text})" for row in imported.keys if row.outcome is Outcome.NONE]
    return rows + imported.rejected


def _remove(imported: Imported, key: str, outcome: Outcome, text: str) -> None:
    setting = imported.settings.pop(key)
    if setting.is_default:
        if outcome is Outcome.NONE:
            imported.rejected.append(f"{imported.peer.name}'s own `{key}`: {text}")
        return
    for row in imported.keys:
        if key in row.ours or any(ours.startswith(f"{key}[") for ours in row.ours):
            row.ours = tuple(ours for ours in row.ours if ours != key)
            if not row.ours:
                row.outcome, row.text = outcome, text
