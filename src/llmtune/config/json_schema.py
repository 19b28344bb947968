"""The config file as a JSON Schema, for editors: types, ranges, choices, defaults and descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from llmtune.config.checks import RANGES, SOURCE_RANGES, Range
from llmtune.config.keys import SECTIONS, SOURCE_FIELDS, default_of, descriptions, field_types, source_descriptions
from llmtune.config.schema import Config, SourceConfig

__all__ = ["json_schema"]

Schema = dict[str, Any]

_SIMPLE: dict[object, str] = {str: "string", bool: "boolean", int: "integer", float: "number", NoneType: "null"}


def json_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a config file.

    Names of other toolkits, which are accepted too, are not in it.
    """
    schema = _section(Config, "")
    schema["properties"] = {
        "extends": {
            "description": "A preset or a file that this one builds on, or a list of them.",
            "type": ["string", "array"],
            "items": {"type": "string"},
        },
        **schema["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmtune config",
        "patternProperties": {"^x-": {"description": "Ignored; a place for anchors."}},
        **schema,
        "$defs": {"source": _source()},
    }


def _section(cls: type, prefix: str) -> Schema:
    properties: Schema = {}
    for name, declared in field_types(cls).items():
        key = prefix + name
        if key in SECTIONS:
            inner = _section(SECTIONS[key], key + ".")
            properties[name] = {"description": descriptions()[key], **inner, "type": ["object", "null"]}
            continue
        value = _type(declared, RANGES.get(key))
        default = default_of(key)
        properties[name] = {
            "description": descriptions()[key],
            **value,
            "default": list(default) if isinstance(default, tuple) else default,
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _source() -> Schema:
    properties = {
        name: {"description": source_descriptions()[name], **_type(declared, SOURCE_RANGES.get(name))}
        for name, declared in SOURCE_FIELDS.items()
    }
    return {
        "anyOf": [
            {"type": "string"},
            {"type": "object", "properties": properties, "required": ["path"], "additionalProperties": False},
        ]
    }


def _type(declared: object, bounds: Range | None) -> Schema:
    """The schema of one declared type; `bounds` go to the numbers in it."""
    if declared in _SIMPLE:
        return {"type": _SIMPLE[declared], **(_bounds(bounds) if declared in (int, float) else {})}
    if declared is SourceConfig:
        return {"$ref": "#/$defs/source"}
    kind, arguments = get_origin(declared), get_args(declared)
    if kind is Literal:
        return {"enum": list(arguments)}
    if kind in (Union, UnionType):
        return {"anyOf": [_type(each, bounds) for each in arguments]}
    if kind is Mapping:
        return {"type": "object", "additionalProperties": _type(arguments[1], bounds)}
    if arguments[1] is Ellipsis:
        item = _type(arguments[0], bounds)
        return {"anyOf": [item, {"type": "array", "items": item}]}
    return {
        "type": "array",
        "items": _type(arguments[0], bounds),
        "minItems": len(arguments),
        "maxItems": len(arguments),
    }


def _bounds(bounds: Range | None) -> dict[str, float]:
    if bounds is None:
        return {}
    named = {
        "minimum": bounds.minimum,
        "exclusiveMinimum": bounds.above,
        "maximum": bounds.maximum,
        "exclusiveMaximum": bounds.below,
    }
    return {name: value for name, value in named.items() if value is not None}
