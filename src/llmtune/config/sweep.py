"""A config file with a section `sweep:` -> the config of each of its runs, or all problems at once.

sweep:
  keys:
    training.learning_rate: [1e-4, 3e-4]
    adapter.r: [8, 16]
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from llmtune.common.environment import home_expanded
from llmtune.common.text import excerpt
from llmtune.config import convert
from llmtune.config.collect import Findings, Setting, collect, nearest_key
from llmtune.config.document import Entry, Listing, Node, Scalar, Table, Unreadable, read_text, shown
from llmtune.config.keys import LEAVES, field_types
from llmtune.config.layers import ResolvedConfig, find_config, load_config, read_table, show_path
from llmtune.config.schema import SweepConfig
from llmtune.errors import ConfigError

__all__ = ["Sweep", "SweepRun", "load_sweep"]

SECTION = "sweep"
MAX_RUNS = 1_000
TRIES_PER_RUN = 1_000
"""Draws after which no further combination is expected."""

SET_BY_THE_SWEEP = ("run.name", "run.output_dir")
_LONGEST_NAME = 120

Draw = Callable[[random.Random], Node]


class SweepRun(NamedTuple):
    """One run of a sweep."""

    name: str
    """Name of its folder, made of its values: a run keeps it when other values are added."""

    values: Mapping[str, str]
    """The values of the swept keys as they are written."""

    resolved: ResolvedConfig

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return home_expanded(self.resolved.config.run.output_dir) / self.name


@dataclass(frozen=True)
class Sweep:
    """The runs that a file describes, in the order in which they are trained."""

    name: str
    runs: tuple[SweepRun, ...]


def load_sweep(name: str, *, environ: Mapping[str, str] | None = None) -> Sweep:
    """Read the file (or preset) `name`; the environment counts as in `load_config`.

    Raises:
        ConfigError: with every problem of the section and of the configs of all runs, each with its line.
    """
    path = find_config(name)
    if path is None:
        fix = f"name the YAML or JSON file with the section `{SECTION}:`"
        raise ConfigError(f"no file `{excerpt(name)}`", "command line", fix)
    findings = Findings()
    combinations, settings = _combinations(path, findings)
    if findings.problems:
        _add_problems_of_config(path, None, environ, findings)
        raise ConfigError.all(findings.problems)
    runs = []
    folder = settings.name or path.stem
    for values in combinations:
        resolved = _add_problems_of_config(path, values, environ, findings)
        if resolved is not None:
            runs.append(_run(values, resolved, folder))
    if findings.problems:
        raise ConfigError.all(findings.problems)
    return Sweep(folder, tuple(runs))


def _add_problems_of_config(
    path: Path, values: Table | None, environ: Mapping[str, str] | None, findings: Findings
) -> ResolvedConfig | None:
    """The config of the file with these values; None, and its problems in `findings`, where it has some."""
    try:
        return load_config(str(path), overrides=values or (), environ=environ, apart=(SECTION,))
    except ConfigError as error:
        for problem in error.problems:
            findings.problem(*problem)
        return None


def _run(values: Table, resolved: ResolvedConfig, folder: str) -> SweepRun:
    name = _run_name({entry.key: entry.value for entry in values.entries})
    own = replace(resolved.config.run, name=name, output_dir=str(Path(resolved.config.run.output_dir) / folder))
    written = {entry.key: shown(entry.value) for entry in values.entries}
    return SweepRun(name, written, replace(resolved, config=replace(resolved.config, run=own)))


def _run_name(values: Mapping[str, Node]) -> str:
    """The name of the run with these values, with a digest of them where they cannot all stand in it."""
    leaves = [key.rpartition(".")[2] for key in values]
    labels = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(values, leaves, strict=True)}
    name = ",".join(f"{labels[key]}={shown(value)}" for key, value in values.items())
    clean = re.sub(r"[^A-Za-z0-9.=,+_-]+", "-", name)[:_LONGEST_NAME]
    if clean == name:
        return name
    digest = hashlib.sha256(json.dumps({key: _plain(value) for key, value in values.items()}).encode())
    return f"{clean}-{digest.hexdigest()[:8]}"


def _plain(node: Node) -> object:
    if isinstance(node, Scalar):
        return node.text
    if isinstance(node, Listing):
        return [_plain(item) for item in node.items]
    return {entry.key: _plain(entry.value) for entry in node.entries}


def _combinations(path: Path, findings: Findings) -> tuple[list[Table], SweepConfig]:
    """The values of each run, and the settings of the sweep; problems go to `findings`."""
    where = show_path(path)
    try:
        root = read_table(read_text(path, where), where, path.suffix == ".json", findings)
    except Unreadable as unreadable:
        raise ConfigError(*unreadable.problem) from None
    section = next((entry for entry in root.entries if entry.key == SECTION), None) if root else None
    if section is None or not isinstance(section.value, Table):
        fix = "write for example `sweep: {keys: {training.learning_rate: [1e-4, 3e-4]}}`"
        findings.problem(f"no section `{SECTION}` says what to try", where, fix)
        return [], SweepConfig()
    entries = {entry.key: entry for entry in section.value.entries}
    settings = _settings(entries, findings)
    keys = entries.get("keys")
    if keys is None or not isinstance(keys.value, Table) or not keys.value.entries:
        fix = "write for example `keys: {training.learning_rate: [1e-4, 3e-4]}`"
        findings.problem(f"`{SECTION}.keys` names no key to try values of", section.origin.where, fix)
        return [], settings
    draws: dict[str, tuple[Node, ...] | Draw] = {}
    for entry in keys.value.entries:
        values = _values(entry, settings, findings)
        if values is not None:
            draws[entry.key] = values
    if findings.problems:
        return [], settings
    runs = _grid(draws) if settings.method == "grid" else _drawn(draws, settings)
    tables = [
        Table(tuple(Entry(key, value, value.origin) for key, value in run.items()), keys.origin)
        for run in itertools.islice(runs, MAX_RUNS + 1)
    ]
    wanted = settings.runs or len(tables)
    if len(tables) > MAX_RUNS or wanted > MAX_RUNS:
        findings.problem(f"more than {MAX_RUNS:,} runs", keys.origin.where, "name fewer values, or draw `runs: N`")
    elif len(tables) < wanted:
        problem = f"`{SECTION}.runs` is {wanted}, and the keys give {len(tables)} different runs"
        findings.problem(problem, entries["runs"].origin.where, f"write `runs: {len(tables)}`, or name more values")
    return tables, settings


def _settings(entries: Mapping[str, Entry], findings: Findings) -> SweepConfig:
    types = field_types(SweepConfig)
    given: dict[str, Any] = {}
    for key, entry in entries.items():
        if key == "keys":
            continue
        where = entry.value.origin.where
        if key not in types:
            nearest = difflib.get_close_matches(key, [*types, "keys"], n=1, cutoff=0.5)
            fix = f"did you mean `{nearest[0]}`?" if nearest else f"its keys are keys, {', '.join(types)}"
            findings.problem(f"unknown key `{SECTION}.{excerpt(key)}` (`{shown(entry.value)}`)", where, fix)
            continue
        try:
            given[key] = convert.convert(entry.value, types[key])
        except convert.Mismatch as mismatch:
            findings.problem(f"`{SECTION}.{key}` {mismatch}", where, mismatch.fix)
    settings = replace(SweepConfig(), **given)
    name = settings.name
    if name is not None and (not re.fullmatch(r"[A-Za-z0-9.=,+_-]+", name) or name.startswith((".", "-"))):
        fix = "write a plain name, such as my-sweep-1"
        findings.problem(f"`{SECTION}.name` must be the name of a folder, not `{excerpt(name)}`", _line(entries), fix)
    if settings.method == "grid" and (unused := [key for key in ("runs", "seed") if key in given]):
        problem = f"`{SECTION}.{unused[0]}` counts only with `method: random`"
        findings.problem(problem, entries[unused[0]].origin.where, "take it out, or write `method: random`")
    if settings.method == "random" and "runs" not in entries:
        findings.problem(f"`method: random` needs `{SECTION}.runs`", _line(entries), "write for example `runs: 8`")
    if settings.runs is not None and settings.runs < 1:
        findings.problem(
            f"`{SECTION}.runs` must be at least 1, not `{settings.runs}`", entries["runs"].origin.where, "write `1`"
        )
    return settings


def _line(entries: Mapping[str, Entry]) -> str:
    first = entries.get("name") or entries.get("method") or next(iter(entries.values()))
    return first.origin.where


def _values(entry: Entry, settings: SweepConfig, findings: Findings) -> tuple[Node, ...] | Draw | None:
    """The values of one key, or the draw from its range; None, and problems in `findings`, where it has none."""
    key, node, where = entry.key, entry.value, entry.origin.where
    if key not in LEAVES:
        findings.problem(f"unknown key `{excerpt(key)}` (`{shown(node)}`)", where, nearest_key(key))
        return None
    if key in SET_BY_THE_SWEEP:
        findings.problem(f"`{key}` is what the sweep sets for each run", where, f"take it out, or set `{SECTION}.name`")
        return None
    if isinstance(node, Table):
        return _range(entry, node, settings, findings)
    if not isinstance(node, Listing) or not node.items:
        findings.problem(f"`{key}` must be a list of values, not `{shown(node)}`", where, f"write `{key}: [..., ...]`")
        return None
    seen: list[Any] = []
    for item in node.items:
        setting = _setting(key, item, findings)
        if setting is not None and setting.value in seen:
            findings.problem(f"`{key}` has `{shown(item)}` twice", item.origin.where, "keep one of them")
        elif setting is not None:
            seen.append(setting.value)
    return node.items


def _setting(key: str, node: Node, findings: Findings) -> Setting | None:
    return collect(Table((Entry(key, node, node.origin),), node.origin), findings).get(key)


def _range(entry: Entry, node: Table, settings: SweepConfig, findings: Findings) -> Draw | None:
    key, where = entry.key, entry.origin.where
    parts = {part.key: part.value for part in node.entries}
    types = get_args(LEAVES[key]) or (LEAVES[key],)
    fix = f"write `{key}: {{min: ..., max: ...}}`, with `log: true` for even draws over orders of magnitude"
    if settings.method == "grid":
        findings.problem(
            f"`{key}` has a range, which only `method: random` draws from", where, "write a list of values"
        )
    elif not {int, float} & set(types):
        findings.problem(f"`{key}` has a range, and is not a number", where, "write a list of values")
    elif not {"min", "max"} <= set(parts) or set(parts) - {"min", "max", "log"}:
        findings.problem(f"`{key}` must be a list or a range, not `{shown(node)}`", where, fix)
    else:
        low, high = (_setting(key, parts[part], findings) for part in ("min", "max"))
        try:
            is_log = convert.convert(parts["log"], bool) if "log" in parts else False
        except convert.Mismatch as mismatch:
            findings.problem(f"`log` of `{key}` {mismatch}", where, fix)
            return None
        if low is None or high is None:
            return None
        if not all(isinstance(end.value, int | float) for end in (low, high)) or low.value >= high.value:
            findings.problem(f"`{key}` has no range from `{low.value}` to `{high.value}`", where, fix)
        elif is_log and low.value <= 0:
            findings.problem(f"`{key}` has a logarithmic range from `{low.value}`", where, "begin above 0")
        else:
            return _draw_between(low.value, high.value, entry, is_log=is_log, is_whole=float not in types)
    return None


def _draw_between(low: float, high: float, entry: Entry, *, is_log: bool, is_whole: bool) -> Draw:
    margin = 0.5 if is_whole else 0.0  # each whole number then has the same width, the ends too
    first, last = low - margin, high + margin

    def draw(generator: random.Random) -> Node:
        if is_log:
            value = math.exp(generator.uniform(math.log(first), math.log(last)))
        else:
            value = generator.uniform(first, last)
        # Four digits: the value stands in the name of the run. Rounding must not leave the range.
        rounded = round(value) if is_whole else float(f"{value:.4g}")
        return Scalar(str(min(max(rounded, low), high)), True, entry.origin)

    return draw


def _grid(choices: Mapping[str, tuple[Node, ...] | Draw]) -> Iterator[dict[str, Node]]:
    listed = [values for values in choices.values() if not callable(values)]
    return (dict(zip(choices, values, strict=True)) for values in itertools.product(*listed))


def _drawn(choices: Mapping[str, tuple[Node, ...] | Draw], settings: SweepConfig) -> Iterator[dict[str, Node]]:
    """Draw `settings.runs` combinations, no two alike; fewer where there are not so many."""
    generator = random.Random(settings.seed)  # noqa: S311 - no secret
    seen: set[str] = set()
    count = min(settings.runs or 0, MAX_RUNS + 1)
    for _ in range(count * TRIES_PER_RUN):
        if len(seen) == count:
            return
        run = {
            key: values(generator) if callable(values) else generator.choice(values) for key, values in choices.items()
        }
        name = _run_name(run)
        if name not in seen:
            seen.add(name)
            yield run
