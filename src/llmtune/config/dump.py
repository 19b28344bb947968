"""A config -> dict, JSON and YAML; the YAML reads back to an equal config."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from llmtune.config.keys import descriptions
from llmtune.config.schema import Config, SourceConfig
from llmtune.config.value_text import source_text, value_text

__all__ = ["config_to_dict", "config_to_yaml", "plain"]


def config_to_dict(config: Config) -> dict[str, object]:
    """Return a config as nested dicts of plain values, every key present; JSON can hold it."""
    return {field.name: plain(getattr(config, field.name)) for field in fields(config)}


def config_to_yaml(config: Config, *, commented: bool = False) -> str:
    """Return a config as YAML that llmtune reads back to an equal one, every key present.

    With `commented`, the description of each section and key stands above it. Any YAML reader reads the same numbers
    and texts.
    """
    lines: list[str] = []
    _write_section(config, "", 0, lines, descriptions() if commented else {})
    return "\n".join(lines) + "\n"


def plain(value: object) -> object:
    """Return a value of any declared type as data that JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def _write_section(section: Any, prefix: str, depth: int, lines: list[str], comments: Mapping[str, str]) -> None:
    indent = "  " * depth
    for field in fields(section):
        key, value = prefix + field.name, getattr(section, field.name)
        if depth == 0 and lines:
            lines.append("")
        if key in comments:
            lines += textwrap.wrap(
                comments[key],
                120,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
                break_long_words=False,
            )
        if is_dataclass(value):
            lines.append(f"{indent}{field.name}:")
            _write_section(value, key + ".", depth + 1, lines, comments)
        elif isinstance(value, tuple) and value and isinstance(value[0], SourceConfig):
            lines.append(f"{indent}{field.name}:")
            for source in value:
                lines.append(f"{indent}  - {source_text(source)}")
        else:
            lines.append(f"{indent}{field.name}: {value_text(value)}")
