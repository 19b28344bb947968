"""A config -> dict and YAML, and back to an equal one."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from llmtune.config.describe import descriptions
from llmtune.config.layers import parse_config
from llmtune.config.schema import Config, SourceConfig

__all__ = ["config_from_dict", "config_to_dict", "config_to_yaml"]

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+@=-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "~", ".inf", ".nan"}
_NUMBER_LIKE = re.compile(r"\.?[0-9].*|0[xob].*|.*[0-9]:[0-9].*", re.IGNORECASE)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return a config as nested dicts of plain values, every key present; JSON can hold it."""
    plain: dict[str, Any] = _plain(config)
    return plain


def config_from_dict(values: Mapping[str, Any], place: str = "config") -> Config:
    """Return the config that a dict from `config_to_dict` (or a part of one) stands for.

    Raises:
        ConfigError: with every problem at once.
    """
    return parse_config(json.dumps(values), place, is_json=True).config


def config_to_yaml(config: Config, *, commented: bool = False) -> str:
    """Return a config as YAML that llmtune reads back to an equal one, every key present.

    With `commented`, the description of each section and key stands above it. Any YAML reader reads the same numbers and texts.
    """
    lines: list[str] = []
    _write_section(config, "", 0, lines, descriptions() if commented else {})
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _write_section(section: Any, prefix: str, depth: int, lines: list[str], comments: Mapping[str, str]) -> None:
    indent = "  " * depth
    for each in fields(section):
        key, value = prefix + each.name, getattr(section, each.name)
        if depth == 0 and lines:
            lines.append("")
        if key in comments:
            lines += textwrap.wrap(
                comments[key], 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_long_words=False
            )
        if is_dataclass(value):
            lines.append(f"{indent}{each.name}:")
            _write_section(value, key + ".", depth + 1, lines, comments)
        elif isinstance(value, tuple) and value and isinstance(value[0], SourceConfig):
            lines.append(f"{indent}{each.name}:")
            for source in value:
                lines.append(f"{indent}  - {_source(source)}")
        else:
            lines.append(f"{indent}{each.name}: {_value(value)}")


def _source(source: SourceConfig) -> str:
    given = {
        each.name: getattr(source, each.name)
        for each in fields(source)
        if each.default is MISSING or getattr(source, each.name) != each.default
    }
    if set(given) == {"path"}:
        return _value(source.path)
    return "{" + ", ".join(f"{name}: {_value(value)}" for name, value in given.items()) + "}"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 readers take `1e-05` for text; with a point every reader takes it for a number.
        mantissa, exponent, power = repr(value).partition("e")
        return f"{mantissa}{'' if '.' in mantissa or not exponent else '.0'}{exponent}{power}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return _text(value) if isinstance(value, str) else str(value)


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not _NUMBER_LIKE.fullmatch(value):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(char) for char in quoted)


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
