"""The layers above the config files: environment variables, flags, and KEY=VALUE of the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmtune.common.text import excerpt, is_text
from llmtune.config import aliases
from llmtune.config.collect import Findings, Setting, collect
from llmtune.config.document import (
    DEFAULT,
    Entry,
    Node,
    Origin,
    Scalar,
    Table,
    Unreadable,
    from_python,
    parse_yaml,
)
from llmtune.config.keys import LEAVES
from llmtune.config.paths import shipped_presets

__all__ = ["FLAGS", "PROCESS_VARIABLES", "environment_layer", "flag_layer", "override_layer"]

FLAGS = {
    "model.name": "--model",
    "data.max_samples": "--samples",
    "tracking.project": "--project",
    "run.output_dir": "--output-dir",
    "run.name": "--name",
}
ENVIRONMENT_PREFIX = "LLMTUNE_"
PROCESS_VARIABLES = frozenset(
    f"{ENVIRONMENT_PREFIX}{name}" for name in ("CACHE_DIR", "MODELS", "OFFLINE", "PYTHON", "TEST_WORKERS", "VENV")
)
"""Variables of the program and its scripts that are no config keys."""


def environment_layer(environ: Mapping[str, str], findings: Findings) -> dict[str, Setting]:
    """Return the settings of `LLMTUNE_SECTION__KEY` variables; other `LLMTUNE_` names are problems or noted."""
    entries = []
    for name, text in sorted(environ.items()):
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if key == name or name in PROCESS_VARIABLES:
            continue
        if "__" not in key:
            _unused_variable(name, findings)
            continue
        origin = Origin("env", f"env {excerpt(name)}")
        node = _argument(text, origin, findings)
        entries += [Entry(key.lower().replace("__", "."), node, origin)] if node is not None else []
    return collect(Table(tuple(entries), DEFAULT), findings)


def _unused_variable(name: str, findings: Findings) -> None:
    """Report a variable that is nearly a config key; note any other one, which may belong to a user's script."""
    nearest = _variables_meant_by(name)
    where = f"env {excerpt(name)}"
    if nearest:
        fix = f"did you mean {' or '.join(f'`{variable}`' for variable in nearest)}? Set that one, or unset this one"
        findings.problem(f"`{excerpt(name)}` sets no config key", where, fix)
    else:
        findings.note(f"{where}: it sets no config key (`{ENVIRONMENT_PREFIX}SECTION__KEY` does), so it is not used")


def _variables_meant_by(name: str) -> list[str]:
    """The variables that a name without `__` nearly is.

    >>> _variables_meant_by("LLMTUNE_LR"), _variables_meant_by("LLMTUNE_TRAINING_LERNING_RATE")
    (['LLMTUNE_TRAINING__LEARNING_RATE'], ['LLMTUNE_TRAINING__LEARNING_RATE'])
    >>> _variables_meant_by("LLMTUNE_CACHEDIR"), _variables_meant_by("LLMTUNE_IMAGE")
    (['LLMTUNE_CACHE_DIR'], [])
    """
    word = name.removeprefix(ENVIRONMENT_PREFIX).lower()
    flat_names = {key.replace(".", "_"): key for key in LEAVES}
    keys = [flat_names[word]] if word in flat_names else [key for key in LEAVES if key.rpartition(".")[2] == word]
    keys = keys or ([aliases.NAMES[word]] if word in aliases.NAMES else [])
    if not keys and f"{word}.name" in LEAVES:  # `model`, `run`: the section for its name
        keys = [f"{word}.name"]
    variables = [ENVIRONMENT_PREFIX + key.upper().replace(".", "__") for key in keys]
    if variables:
        return variables
    known = {variable.removeprefix(ENVIRONMENT_PREFIX).lower(): variable for variable in PROCESS_VARIABLES}
    for key in LEAVES:
        for spelling in (key.rpartition(".")[2], key.replace(".", "_")):
            known.setdefault(spelling, ENVIRONMENT_PREFIX + key.upper().replace(".", "__"))
    return [known[match] for match in difflib.get_close_matches(word, known, n=1, cutoff=0.8)]


def flag_layer(flags: Mapping[str, object], findings: Findings) -> dict[str, Setting]:
    """Return the settings of flags that are given."""
    entries = []
    for key, value in flags.items():
        if value is not None:
            origin = Origin("flag", FLAGS.get(key, "--" + key.rpartition(".")[2].replace("_", "-")))
            entries.append(Entry(key, from_python(value, origin), origin))
    return collect(Table(tuple(entries), DEFAULT), findings)


def override_layer(overrides: Sequence[str] | Mapping[str, object] | Table, findings: Findings) -> dict[str, Setting]:
    """Return the settings of `KEY=VALUE` texts, a mapping or a table; the last text of a key wins, with a note."""
    if isinstance(overrides, Table):
        return collect(overrides, findings)
    if isinstance(overrides, Mapping):
        origin = Origin("override", "overrides")
        given = (Entry(str(key), from_python(value, origin), origin) for key, value in overrides.items())
        return collect(Table(tuple(given), origin), findings)
    origin = Origin("override", "command line")
    entries: dict[str, Entry] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_.\-]+", key.strip()):
            findings.problem(f"`{excerpt(text)}` is not KEY=VALUE", origin.where, _written_as(text))
            continue
        key = key.strip()
        if key in entries:
            findings.note(f"command line: `{excerpt(key)}` is given twice; the last one wins: `{excerpt(value)}`")
        node = _argument(value, origin, findings)
        if node is not None:
            entries[key] = Entry(key, node, origin)
    return collect(Table(tuple(entries.values()), DEFAULT), findings)


def _written_as(text: str) -> str:
    """The fix for a bare word, which is most often a config or a data file without its key."""
    word = excerpt(text)
    if text in shipped_presets() or text.endswith((".yaml", ".yml")):
        return f"did you mean `--config {word}`?"
    if text.endswith(".gguf") or Path(text, "config.json").is_file():
        return f"did you mean `model.name={word}`?"
    if "=" not in text and (Path(text).exists() or text.startswith("example:")):
        return f"did you mean `data.train={word}`?"
    slip = re.fullmatch(r"([\w.]+)(\[\w*\]|\+|:)=?(.*)", text, re.DOTALL)  # as in other programs
    if slip is not None and slip[1] in LEAVES:
        is_list = "tuple[" in str(LEAVES[slip[1]])
        is_part = is_list and slip[2] != ":" and slip[3] and slip[3][0] not in "[{"
        return f"write `{slip[1]}={excerpt(f'[{slip[3]}]' if is_part else slip[3])}`"
    return "write for example `training.batch_size=4`"


def _argument(text: str, origin: Origin, findings: Findings) -> Node | None:
    """Read a value of the command line or the environment: lists, mappings and quotes as in YAML, else plain text.

    None for a value that begins as YAML and is none, which is a problem.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'") and is_text(text):
        try:
            return parse_yaml(text, lambda _: origin, findings.problems)
        except Unreadable as unreadable:
            fix = "put the whole setting in single quotes, and inside of them each text with marks in double quotes"
            findings.problem(f"{unreadable.problem.problem} (`{excerpt(text)}`)", origin.where, fix)
            return None
    return Scalar(text, True, origin)
