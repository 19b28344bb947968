"""YAML layers -> one config with the origin of every value, or all problems at once.

Later layers win key by key: defaults < the `extends` chain < the named file < environment < flags < KEY=VALUE. Lists
are replaced.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmtune.common.text import excerpt
from llmtune.config.arguments import environment_layer, flag_layer, override_layer
from llmtune.config.collect import Findings, Setting, collect
from llmtune.config.contradictions import contradictions
from llmtune.config.document import (
    DEFAULT,
    Entry,
    Listing,
    Origin,
    Scalar,
    Table,
    Unreadable,
    parse_yaml,
    read_text,
    shown,
)
from llmtune.config.importers.detect import looks_foreign
from llmtune.config.importers.source import script_of
from llmtune.config.importers.tables import peer_of
from llmtune.config.json_document import parse_json
from llmtune.config.keys import LEAVES
from llmtune.config.paths import shipped_path, shipped_presets
from llmtune.config.schema import Config
from llmtune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Section = TypeVar("Section", bound=DataclassInstance)

__all__ = ["ResolvedConfig", "find_config", "load_config", "parse_config", "read_table", "show_path"]

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILES = 50


@dataclass(frozen=True)
class ResolvedConfig:
    """A config and the origin of each of its values."""

    config: Config
    origins: Mapping[str, Origin]
    """The origin of every key's value, by dotted key."""

    notes: tuple[str, ...]
    """One line for each name of another toolkit that was read as one of ours."""

    name: str
    """The preset's name or the file's stem; fills `{config}` in `run.name`."""


def load_config(
    name_or_path: str | Sequence[str] | None,
    *,
    flags: Mapping[str, object] | None = None,
    overrides: Sequence[str] | Mapping[str, object] | Table = (),
    environ: Mapping[str, str] | None = None,
    apart: Collection[str] = (),
) -> ResolvedConfig:
    """Resolve a preset or file, or several of them of which a later one wins, and the layers above.

    `flags` maps dotted keys to values (None: not given); `overrides` are `KEY=VALUE` texts, or a mapping of
    dotted keys to values, or a table whose values have their own lines; `environ` is the process's when not given;
    `apart` are sections of the named files that the caller reads itself.
    Relative paths *in* a config (data files, output folders) are relative to the working folder, not to the file.

    Raises:
        ConfigError: with every problem of every layer at once, each with its line, variable or flag.
    """
    findings = Findings()
    layers: list[dict[str, Setting]] = []
    names = [name_or_path] if isinstance(name_or_path, str) else list(name_or_path or ())
    files = _Files(findings, apart)
    for name in names:
        path = _find_or_report(name, None, "--config", findings, [])
        if path is not None:
            named_layers = files.layers(path, [])
            _note_replaced(layers, named_layers, name, findings)
            layers += named_layers
    layers.append(environment_layer(os.environ if environ is None else environ, findings))
    layers.append(flag_layer(flags or {}, findings))
    layers.append(override_layer(overrides, findings))
    return _resolve(layers, findings, _config_name(names[-1] if names else None))


def _note_replaced(
    before: Sequence[Mapping[str, Setting]], layers: Sequence[Mapping[str, Setting]], name: str, findings: Findings
) -> None:
    """Note the keys of an earlier `--config` to which this one gives another value."""
    earlier = {key: setting.value for layer in before for key, setting in layer.items()}
    later = {key: setting.value for layer in layers for key, setting in layer.items()}
    keys = [key for key, value in later.items() if key in earlier and earlier[key] != value]
    if keys:
        listed = ", ".join(f"`{key}`" for key in keys)
        findings.note(f"--config: `{excerpt(name)}` comes last, so it sets {listed} again")


def parse_config(text: str, file: str = "config.yaml", *, is_json: bool = False) -> ResolvedConfig:
    """Resolve the text of one config file alone: no environment, no flags.

    Raises:
        ConfigError: with every problem at once, each at `file:line`.
    """
    findings = Findings()
    table = read_table(text, file, is_json, findings)
    layers = [] if table is None else [collect(table, findings)]
    return _resolve(layers, findings, Path(file).stem)


def _resolve(layers: Sequence[Mapping[str, Setting]], findings: Findings, name: str) -> ResolvedConfig:
    values: dict[str, object] = {}
    origins = dict.fromkeys(LEAVES, DEFAULT)
    written: dict[str, str] = {}
    for layer in layers:
        for key, setting in layer.items():
            values[key] = setting.value
            origins[key] = setting.origin
            written[key] = setting.written
    config = _build(values)
    if written.get("adapter.r", "adapter.r") != "adapter.r" and "adapter.alpha" not in values:
        findings.note(
            f"{origins['adapter.r'].where}: `{excerpt(written['adapter.r'])}` alone keeps "
            f"`adapter.alpha: {config.adapter.alpha:g}`, so updates count {config.adapter.alpha / config.adapter.r:g} "
            f"times; for LLaMA-Factory's twice the rank write `adapter.alpha: {2 * config.adapter.r}` here"
        )
    # Not for keys that could not be read: their default would contradict by accident.
    problems = findings.problems + contradictions(config, origins, findings.failed)
    if findings.hidden:
        problems.append(
            Problem(f"and {findings.hidden} more problems", None, "is this a config? It may be a data file")
        )
    toolkit = findings.toolkit
    if problems:
        raise ConfigError.all([*problems, toolkit] if toolkit is not None else problems)
    if toolkit is not None:
        findings.note(f"{toolkit.where}: {toolkit.problem}: {toolkit.fix}")
    return ResolvedConfig(config, origins, tuple(findings.notes), name)


def _build(values: Mapping[str, object]) -> Config:
    config = Config()
    for key, value in values.items():
        config = _with(config, key.split("."), value)
    return config


def _with(section: Section, names: list[str], value: object) -> Section:
    name, *inner = names
    return replace(section, **{name: _with(getattr(section, name), inner, value) if inner else value})


def _config_name(name_or_path: str | None) -> str:
    if name_or_path is None:
        return "default"
    path = Path(name_or_path)
    return path.stem if path.suffix in SUFFIXES else path.name or "default"


# --- files


def find_config(name: str, *, beside: Path | None = None, skip: Path | None = None) -> Path | None:
    """Find a preset or file: as given, then in `configs/` under the working folder, then among the shipped presets.

    In `extends`, the folder of the extending file (`beside`) comes first, and that file itself (`skip`) is skipped, so
    that a user's `configs/test.yaml` may extend the shipped `test`. A run folder stands for its `config.yaml`.
    """
    folders = [Path(), Path("configs"), shipped_path("configs")]
    if beside is not None:
        folders.insert(0, beside)
    for folder in folders:
        try:
            for candidate in _spellings(folder / name):
                if candidate.is_file() and not (skip is not None and candidate.samefile(skip)):
                    return candidate
        except (OSError, ValueError):  # a name that no file can have
            continue
    # A pipe or a device is returned too: `read_text` refuses it with a better message than "no such file".
    path = Path(name)
    is_path = os.sep in name and "\0" not in name
    return path if is_path and path.exists() and not path.is_dir() and not path.is_file() else None


def _spellings(path: Path) -> list[Path]:
    if path.suffix in SUFFIXES:
        return [path]
    named = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)] if path.name else []
    return [*named, path / "config.yaml"]


def _find_or_report(name: str, beside: Path | None, where: str, findings: Findings, chain: list[Path]) -> Path | None:
    path = find_config(name, beside=beside, skip=chain[-1] if chain else None)
    if path is None and chain and find_config(name, beside=beside) is not None:
        findings.problem(f"`extends: {excerpt(name)}` names this file itself", where, "remove it")
    elif path is None:
        presets = sorted({*shipped_presets(), *(path.stem for path in Path("configs").glob("*.y*ml"))} - {"schema"})
        nearest = difflib.get_close_matches(name, presets, n=1, cutoff=0.5)
        hint = f"did you mean `{nearest[0]}`? " if nearest else ""
        hint = next((f"did you mean `{other}`? " for other in _other_endings(name) if other.is_file()), hint)
        fix = f"{hint}the presets are {', '.join(presets)}" if presets else "name a YAML or JSON file"
        inside = _configs_in(Path(name))
        if inside is not None:
            fix = f"name a file in it: {', '.join(inside[:3])}" if inside else fix
            findings.problem(f"`{excerpt(name)}` is a folder, not a config", where, fix)
        else:
            findings.problem(f"no preset or file `{excerpt(name)}`", where, fix)
    return path


def _configs_in(folder: Path) -> list[str] | None:
    """The config files in a folder; None where it is no folder."""
    try:
        return sorted(str(path) for path in folder.iterdir() if path.suffix in SUFFIXES)
    except (OSError, ValueError):  # ValueError: a NUL
        return None


def _other_endings(name: str) -> list[Path]:
    """The paths beside `name` that differ in the ending alone: `c.yaml` for `c.yml`."""
    path = Path(name)
    return [path.with_suffix(suffix) for suffix in SUFFIXES if path.suffix not in ("", suffix)]


class _Files:
    """Reads a file and the chain it extends, bases first; every file is read once."""

    def __init__(self, findings: Findings, apart: Collection[str]) -> None:
        self.findings = findings
        self.apart = apart
        self.tables: dict[Path, Table | None] = {}
        self.count = 0

    def layers(self, path: Path, chain: list[Path]) -> list[dict[str, Setting]]:
        """The settings of the files it extends in their order, then those of the file.

        `chain`: the files that extend this one, the named one first.
        """
        before = len(self.findings.problems)
        table = self.table(path)
        if table is None:
            self.name_toolkit(path, script_of(path), before)
            return []
        layers: list[dict[str, Setting]] = []
        for entry in table.entries:
            if entry.key == "extends":
                for base in _bases(entry, self.findings):
                    layers += self.base(base, path, [*chain, path])
        before = len(self.findings.problems)
        # After its bases: a later layer wins.
        # Of the named file alone: nobody would read such a section of a base.
        own = [entry for entry in table.entries if chain or entry.key not in self.apart]
        layers.append(collect(replace(table, entries=tuple(own)), self.findings))
        self.name_toolkit(path, table, before)
        return layers

    def name_toolkit(self, path: Path, table: Table | None, before: int) -> None:
        """Replace the problems of a file that is another toolkit's config by one that says so; else note it."""
        found = looks_foreign(table) if table is not None else None
        if found is None:
            return
        peer = peer_of(found.peer)
        count = len(self.findings.problems) - before + self.findings.hidden
        keys = ", ".join(f"`{key}`" for key in found.keys[:3])
        looks = f"this looks like a config of {peer.name} ({keys})"
        fix = f"translate it: `llmtune config import {shlex.quote(str(path))} --output FILE`"
        if not count:
            self.findings.toolkit = Problem(f"{looks}, whose own defaults are others", show_path(path), fix)
            return
        del self.findings.problems[before:]
        self.findings.hidden = 0
        # What it would have meant here is not what it means there.
        self.findings.notes.clear()
        said = f"{looks}: {count} of its keys or values mean nothing here"
        self.findings.problem(said, show_path(path), fix)

    def base(self, name: Scalar, path: Path, chain: list[Path]) -> list[dict[str, Setting]]:
        """The layers of one file named in an `extends`.

        None, and a problem, where the file is missing, extends itself through others, or exceeds `MAX_FILES`.
        """
        where = name.origin.where
        base = _find_or_report(name.text, path.parent, where, self.findings, chain)
        if base is None:
            return []
        self.count += 1
        # By file and not by name, which links and `..` can spell in several ways.
        if any(base.samefile(file) for file in chain):
            self.findings.problem(f"`extends: {excerpt(name.text)}` comes back to this file", where, "remove it")
            return []
        if self.count > MAX_FILES:
            self.findings.problem(f"more than {MAX_FILES} files are extended", where, "extend fewer")
            return []
        return self.layers(base, chain)

    def table(self, path: Path) -> Table | None:
        """The content of the file; None, and one problem, where it cannot be read."""
        # Read once, though several files may extend it, so that its problems are reported once.
        if path not in self.tables:
            shown_path = show_path(path)
            try:
                text = read_text(path, shown_path)
                self.tables[path] = read_table(text, shown_path, path.suffix == ".json", self.findings)
            except Unreadable as unreadable:
                self.findings.problem(*unreadable.problem)
                self.tables[path] = None
        return self.tables[path]


def _bases(entry: Entry, findings: Findings) -> list[Scalar]:
    items = entry.value.items if isinstance(entry.value, Listing) else (entry.value,)
    bases = []
    for item in items:
        if isinstance(item, Scalar) and item.text and not item.is_null:
            bases.append(item)
        else:
            findings.problem(
                f"`extends` must be a preset, a path or a list of them, not `{shown(item)}`", item.origin.where
            )
    return bases


def read_table(text: str, file: str, is_json: bool, findings: Findings) -> Table | None:
    """Return the tree of a config's text; None, and a problem in `findings`, where it is none."""
    origin_of: Callable[[int], Origin] = lambda line: Origin("file", f"{file}:{line}")  # noqa: E731 - typed here
    try:
        root = (parse_json if is_json else parse_yaml)(text, origin_of, findings.problems)
    except Unreadable as unreadable:
        problem, where, fix = unreadable.problem
        if file.endswith(".toml"):
            problem, fix = "a config is YAML or JSON, and this is TOML", "write it as YAML, a key for each section"
        findings.problem(problem, where, fix)
        return None
    if isinstance(root, Scalar) and root.is_null:
        findings.note(f"{file}: the file is empty, so every key has its default")
        return Table((), root.origin)
    if not isinstance(root, Table):
        findings.problem(
            f"a config is a mapping of sections, not `{shown(root)}`",
            root.origin.where,
            "begin with a section, for example `data:`",
        )
        return None
    return root


def show_path(path: Path) -> str:
    """Return `preset NAME` for a shipped file, else the path, relative where it is below the working folder."""
    if path.parent == shipped_path("configs"):
        return f"preset {path.stem}"
    try:
        return excerpt(str(path.resolve().relative_to(Path.cwd().resolve())), 200)
    except (ValueError, OSError):
        return excerpt(str(path), 200)
