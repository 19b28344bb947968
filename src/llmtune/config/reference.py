"""The reference page of every config key: `python -m llmtune.config.reference > docs/config.md`."""

from __future__ import annotations

import re
import sys

from llmtune.config import convert
from llmtune.config.alias_refusals import NOT_HERE, UNUSED
from llmtune.config.aliases import other_names
from llmtune.config.checks import RANGES, SOURCE_RANGES, Range
from llmtune.config.contradictions import CONTRADICTIONS
from llmtune.config.dump import value_text
from llmtune.config.keys import LEAVES, SECTIONS, SOURCE_FIELDS, default_of, descriptions, source_descriptions
from llmtune.config.schema import SourceConfig

__all__ = ["reference_page"]

_HEAD = """\
# Config

One YAML (or JSON) file describes a run. This page is made from the schema by `python -m llmtune.config.reference`;
`llmtune config schema` prints the same as a JSON Schema, and a first line `# yaml-language-server: $schema=schema.json`
makes an editor complete and check the file.

## Layers

Later layers win, key by key. Lists are replaced, never joined.

1. **Defaults**: the tables below.
2. **`extends: production`**: a preset, a path, or a list of them (the last wins), looked for beside the file first.
3. **The named file**, `--config dev.yaml`: a path as given, then `configs/` under the working folder, then the presets
   that come with llmtune. A run folder stands for the `config.yaml` in it. `--config a.yaml --config b.yaml` are two
   layers, of which the last wins; a line names the keys that it sets again.
4. **Environment**: `LLMTUNE_TRAINING__LEARNING_RATE=1e-4`. A variable that is nearly one, such as
   `LLMTUNE_LEARNING_RATE`, is refused with the name that works; any other `LLMTUNE_` name that is not used is said.
5. **Flags** of the command: `--samples 50`.
6. **Command line**: `training.batch_size=4 'data.train=[a.jsonl,b.jsonl]'`.

`llmtune config show --origin` prints each value with the file and line, variable or flag it came from;
`llmtune config diff A B` compares two configs or runs; `llmtune config validate FILE...` checks files.

## Values

- A value is read as the type its key declares, not as YAML guesses it: `1e-5` is a number, `010` is ten, `no` is the
  text "no" where text is declared. Quotes matter for text alone: `"null"` is the word, `null` is nothing.
- A single value may stand where a list is declared. A data source is a path, or a mapping with `path` and more.
- **Relative paths are relative to the working folder**, wherever the config file lies. A leading `~` is the home
  folder; `$VAR` in a path is refused, because nothing fills it in.
- Unknown keys, keys that stand twice, values of the wrong type or out of range, and keys that contradict each other are
  refused, all at once, each with its line.
- A file has at most 1 MB. Tags such as `!!python/...` are refused; anchors and merge keys (`<<`) work. Top-level keys
  that begin with `x-` are ignored, so they can hold anchors.
- A config holds no secrets. `trust_remote_code` is a flag of the command line only.
- The column "also read as" holds the names other toolkits use; each is accepted with one line that says ours.
"""


def reference_page() -> str:
    """Return the whole page as Markdown."""
    sections = [_section(name) for name in SECTIONS if "." not in name]
    return "\n".join([_HEAD, *sections, _sources(), _contradictions(), _refused()])


def _section(section: str) -> str:
    lines = [
        f"## `{section}`",
        "",
        _cell(descriptions()[section]),
        "",
        "| key | value | default | meaning | also read as |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, declared in LEAVES.items():
        if key.startswith(f"{section}."):
            names = ", ".join(f"`{name}`" for name in other_names(key))
            default = f"`{value_text(default_of(key))}`"
            lines.append(
                f"| `{key}` | {_type(declared, RANGES.get(key))} | {default} | {_cell(descriptions()[key])} | {names} |"
            )
    return "\n".join(lines) + "\n"


def _sources() -> str:
    lines = [
        "## A data source",
        "",
        "Each entry of `data.train` and `data.eval` is a path, or a mapping of these keys.",
        "",
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    default = SourceConfig()
    for name, declared in SOURCE_FIELDS.items():
        shown = "required" if name == "path" else f"`{value_text(getattr(default, name))}`"
        meaning = _cell(source_descriptions()[name])
        lines.append(f"| `{name}` | {_type(declared, SOURCE_RANGES.get(name))} | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


def _contradictions() -> str:
    lines = ["## What contradicts itself", "", "| keys | problem | fix |", "| --- | --- | --- |"]
    joined: dict[tuple[str, str], list[str]] = {}
    for row in CONTRADICTIONS:
        keys = joined.setdefault((row.problem, row.fix), [])
        keys += [key for key in row.keys if key not in keys]
    lines += [
        f"| {', '.join(f'`{key}`' for key in keys)} | {_cell(problem)} | {_cell(fix)} |"
        for (problem, fix), keys in joined.items()
    ]
    return "\n".join(lines) + "\n"


def _refused() -> str:
    lines = ["## Names of other toolkits that are refused", "", "| name | because | instead |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {_cell(reason)} | {_cell(fix)} |" for name, (reason, fix) in NOT_HERE.items()]
    lines += ["", "## Names of other toolkits that change nothing", ""]
    lines += ["Each is read, named in a line, and not used.", "", "| name | because |", "| --- | --- |"]
    lines += [f"| `{name}` | {_cell(reason)} |" for name, reason in UNUSED.items()]
    return "\n".join(lines) + "\n"


def _type(declared: object, bounds: Range | None) -> str:
    words = convert.expected(declared).replace("one of ", "")
    words = re.sub(r" or null$", "", words)
    return _cell(f"{words}, {bounds}" if bounds else words)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(reference_page())
