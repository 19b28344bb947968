"""A config, or one of its values -> dict, JSON and YAML; the YAML reads back to an equal one, here and elsewhere."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from llmtune.common.text import printable
from llmtune.config.keys import descriptions
from llmtune.config.schema import Config, SourceConfig

__all__ = ["config_to_dict", "config_to_yaml", "plain", "source_text", "value_text"]


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
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
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


_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+@=-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "~", ".inf", ".nan"}
_NUMBER_LIKE = re.compile(r"[+-]?\.?[0-9].*|.*[0-9]:[0-9].*")


def value_text(value: object) -> str:
    """Return a value of any declared type on one line.

    >>> value_text(("a.jsonl", "no", 1e-5, None))
    '[a.jsonl, "no", 1.0e-05, null]'
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 readers take `1e-05` for text; with a point every reader takes it for a number.
        mantissa, exponent, power = repr(value).partition("e")
        return f"{mantissa}{'' if '.' in mantissa or not exponent else '.0'}{exponent}{power}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(name)}: {value_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, SourceConfig):
        return source_text(value)
    return _text(value) if isinstance(value, str) else str(value)


def source_text(source: SourceConfig) -> str:
    """Return a data source: its path alone where every other key has its default, a mapping otherwise."""
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    default = SourceConfig()
    changed = {name: value for name, value in values.items() if value != getattr(default, name)}
    if set(changed) == {"path"}:
        return value_text(source.path)
    return "{" + ", ".join(f"{name}: {value_text(value)}" for name, value in changed.items()) + "}"


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not _NUMBER_LIKE.fullmatch(value):
        return value
    # JSON leaves characters such as U+0085 as they are; YAML and Python escape them alike.
    return printable(json.dumps(value, ensure_ascii=False))
