"""A value as YAML on one line, such that llmtune and every other YAML reader read the same back."""

from __future__ import annotations

import json
import re
from dataclasses import fields

from llmtune.common.text import printable
from llmtune.config.schema import SourceConfig

__all__ = ["source_text", "value_text"]

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
    if isinstance(value, SourceConfig):
        return source_text(value)
    return _text(value) if isinstance(value, str) else str(value)


def source_text(source: SourceConfig) -> str:
    """Return a data source: its path alone where every other key has its default, a mapping otherwise."""
    values = {field.name: (getattr(source, field.name), field.default) for field in fields(source)}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    if set(changed) == {"path"}:
        return value_text(source.path)
    return "{" + ", ".join(f"{name}: {value_text(value)}" for name, value in changed.items()) + "}"


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not _NUMBER_LIKE.fullmatch(value):
        return value
    # JSON leaves characters such as U+0085 as they are; YAML and Python escape them alike.
    return printable(json.dumps(value, ensure_ascii=False))
