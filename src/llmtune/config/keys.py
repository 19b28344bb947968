"""Every config key as the schema declares it: dotted name, type, default and the text under it."""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, reduce
from typing import Any, get_type_hints

from llmtune.config.schema import Config, SourceConfig

__all__ = [
    "FORMER_KEYS",
    "LEAVES",
    "SECTIONS",
    "SOURCE_FIELDS",
    "default_of",
    "descriptions",
    "field_types",
    "source_descriptions",
    "value_of",
]


@cache
def field_types(cls: type) -> dict[str, object]:
    """Return the declared type of every field of a schema dataclass, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _walk(cls: type, prefix: str = "") -> tuple[dict[str, object], dict[str, type]]:
    leaves: dict[str, object] = {}
    sections: dict[str, type] = {}
    for name, declared in field_types(cls).items():
        key = prefix + name
        if isinstance(declared, type) and is_dataclass(declared):
            inner_leaves, inner_sections = _walk(declared, key + ".")
            leaves |= inner_leaves
            sections |= {key: declared, **inner_sections}
        else:
            leaves[key] = declared
    return leaves, sections


LEAVES, SECTIONS = _walk(Config)
"""Every key by its dotted name with its declared type, and every section with its dataclass."""

FORMER_KEYS = {
    "model.weights_prepack": "frozen weights are no longer laid out beforehand, which changed speed and not one bit",
}
"""Keys of earlier versions that nothing reads, and why: the config of every run that was made with them names them."""

SOURCE_FIELDS = field_types(SourceConfig)
"""Every key of a data source with its declared type."""


@cache
def default_of(key: str) -> Any:
    """Return the default of the key with this dotted name."""
    section, _, name = key.rpartition(".")
    (field,) = (field for field in fields(SECTIONS[section] if section else Config) if field.name == name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default if field.default is not MISSING else None


def value_of(config: Config, key: str) -> object:
    """Return the value of the key with this dotted name."""
    return reduce(getattr, key.split("."), config)


@cache
def _texts(cls: type) -> dict[str, str]:
    """The text under every field of a schema dataclass, as one paragraph, by the field's name."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            texts[statement.target.id] = " ".join(str(below.value.value).split())
    return texts


@cache
def descriptions() -> dict[str, str]:
    """Return the description of every section and key by dotted name."""
    return {
        f"{section}.{name}" if section else name: text
        for section, cls in {"": Config, **SECTIONS}.items()
        for name, text in _texts(cls).items()
    }


def source_descriptions() -> dict[str, str]:
    """Return the description of every key of one data source."""
    return _texts(SourceConfig)
