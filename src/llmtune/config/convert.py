"""A written value -> a value of the type that its key declares, or the reason why it has none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from llmtune.common.text import is_text
from llmtune.config.document import Listing, Node, Scalar, Table, shown
from llmtune.config.keys import SOURCE_FIELDS
from llmtune.config.schema import SourceConfig
from llmtune.config.sources import SOURCE_HINTS

__all__ = ["Mismatch", "convert", "expected"]

_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?([0-9]+(_[0-9]+)*)?|\.[0-9]+(_[0-9]+)*)([eE][+-]?[0-9]{1,5})?")
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_LARGEST = 2**63 - 1


class Mismatch(Exception):
    """A value that is not of the declared type; `expected` describes one that is, `fix` is how to write it.

    `others` are the further mismatches of the same value: several keys of several data sources may be wrong.
    """

    others: tuple[Mismatch, ...] = ()

    def __init__(self, expected_text: str, node: Node, fix: str | None = None) -> None:
        self.expected = expected_text
        self.node = node
        self.fix = fix
        super().__init__(f"must be {expected_text}, not `{shown(node)}`")


def expected(declared: object) -> str:
    """Describe a value of this declared type in words.

    >>> expected(int | Literal["auto"])
    'a whole number or `auto`'
    """
    if declared in _SCALARS:
        return _SCALARS[declared][1]
    if declared is SourceConfig:
        return "a path or a mapping with `path`"
    if declared is NoneType:
        return "null"
    arguments = get_args(declared)
    kind = get_origin(declared)
    if kind is Literal:
        words = [f"`{str(choice).lower() if isinstance(choice, bool) else choice}`" for choice in arguments]
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    if kind in (Union, UnionType):
        return " or ".join(expected(option) for option in arguments)
    if kind is Mapping:
        return f"a mapping of names to {expected(arguments[1])}"
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list, each {expected(arguments[0])}"
    return f"a list of {len(arguments)}, each {expected(arguments[0])}"


def convert(node: Node, declared: object) -> Any:
    """Turn a written value into the declared type, without loss.

    Quotes matter for text alone (`"null"` is text, `null` is nothing); a single value may stand for a list of one.

    Raises:
        Mismatch: it is not of that type.
    """
    if declared in _SCALARS:
        return _SCALARS[declared][0](node)
    if declared is SourceConfig:
        return _source(node)
    kind, arguments = get_origin(declared), get_args(declared)
    if kind is Literal:
        return _choice(node, declared)
    if kind in (Union, UnionType):
        return _union(node, declared)
    if kind is Mapping:
        return _mapping(node, declared)
    assert kind is tuple, f"no conversion to {declared}"
    return _list(node, declared, arguments)


def _union(node: Node, declared: object) -> object:
    options = get_args(declared)
    if NoneType in options and isinstance(node, Scalar) and node.is_null:
        return None
    # null was answered above; here it would only appear in the message.
    options = tuple(option for option in options if option is not NoneType)
    if str in options and isinstance(node, Scalar) and not node.plain:
        return _text(node)
    if len(options) == 1:
        return convert(node, options[0])  # its own mismatch is more precise than one of the union
    fix = None
    for option in options:
        try:
            return convert(node, option)
        except Mismatch as mismatch:
            fix = fix or mismatch.fix
    raise Mismatch(expected(declared), node, fix)


def _choice(node: Node, declared: object) -> object:
    for choice in get_args(declared):
        if isinstance(node, Scalar) and (
            node.text == choice or (isinstance(choice, bool) and _TRUTHS.get(node.text.lower()) is choice)
        ):
            return choice
    raise Mismatch(expected(declared), node)


def _list(node: Node, declared: object, arguments: tuple[object, ...]) -> tuple[object, ...]:
    is_open = len(arguments) == 2 and arguments[1] is Ellipsis
    if isinstance(node, Scalar) and node.is_null and is_open:
        return ()
    items = node.items if isinstance(node, Listing) else (node,)
    if is_open:
        return tuple(_convert_each([(item, arguments[0]) for item in items]))
    if len(items) != len(arguments):
        raise Mismatch(expected(declared), node)
    return tuple(convert(item, declared_item) for item, declared_item in zip(items, arguments, strict=True))


def _mapping(node: Node, declared: object) -> dict[str, object]:
    if isinstance(node, Scalar) and node.is_null:
        return {}
    if not isinstance(node, Table):
        raise Mismatch(expected(declared), node)
    value_type = get_args(declared)[1]
    values = _convert_each([(entry.value, value_type) for entry in node.entries])
    return dict(zip((entry.key for entry in node.entries), values, strict=True))


def _convert_each(pairs: Sequence[tuple[Node, object]]) -> list[object]:
    """Convert every node to the type beside it. Raises Mismatch with those of all of them."""
    values: list[object] = []
    mismatches: list[Mismatch] = []
    for node, declared in pairs:
        try:
            values.append(convert(node, declared))
        except Mismatch as mismatch:
            mismatches += [mismatch, *mismatch.others]
    _raise_all(mismatches)
    return values


def _raise_all(mismatches: Sequence[Mismatch]) -> None:
    if mismatches:
        first, *others = mismatches
        first.others = tuple(others)
        raise first


def _source(node: Node) -> SourceConfig:
    if isinstance(node, Scalar):
        return SourceConfig(path=_text(node))
    if isinstance(node, Listing):
        raise Mismatch(expected(SourceConfig), node)
    names = ", ".join(f"`{name}`" for name in SOURCE_FIELDS)
    mismatches = [
        Mismatch(f"a mapping of {names}", Scalar(entry.key, True, entry.origin), SOURCE_HINTS.get(entry.key))
        for entry in node.entries
        if entry.key not in SOURCE_FIELDS
    ]
    known = [entry for entry in node.entries if entry.key in SOURCE_FIELDS]
    values: list[object] = []
    try:
        values = _convert_each([(entry.value, SOURCE_FIELDS[entry.key]) for entry in known])
    except Mismatch as mismatch:
        for each in (mismatch, *mismatch.others):
            key = next((entry.key for entry in known if entry.value is each.node), None)
            said = f"a mapping with `{key}` {each.expected}" if key else each.expected
            mismatches.append(Mismatch(said, each.node, each.fix))
    _raise_all(mismatches)
    fields: dict[str, Any] = dict(zip((entry.key for entry in known), values, strict=True))
    if not fields.get("path"):
        raise Mismatch("a mapping with `path`", node, "write `{path: rows.jsonl}`, with other keys beside it")
    return SourceConfig(**fields)


def _text(node: Node) -> str:
    if not isinstance(node, Scalar) or node.is_null:
        raise Mismatch("text", node)
    if not is_text(node.text):
        raise Mismatch("valid Unicode text", node)
    return node.text


def _truth(node: Node) -> bool:
    if not isinstance(node, Scalar) or node.text.lower() not in _TRUTHS:
        raise Mismatch("true or false", node)
    return _TRUTHS[node.text.lower()]


def _number(node: Node) -> float:
    text = node.text if isinstance(node, Scalar) else ""
    if text.endswith("%") and _NUMBER.fullmatch(text[:-1]) and float(text[:-1]) < 100:
        raise Mismatch("a number", node, f"write the fraction: {float(text[:-1]) / 100:g}")
    if not _NUMBER.fullmatch(text):
        raise Mismatch("a number", node)
    value = float(text.replace("_", ""))
    if not math.isfinite(value):
        raise Mismatch("a finite number", node)
    return value


def _whole(node: Node) -> int:
    text = node.text if isinstance(node, Scalar) else ""
    if _WHOLE.fullmatch(text) and len(text) < 40:  # a number of a million digits would take seconds to convert
        value = int(text.replace("_", ""))
    # `1e3` and `2.0` are whole numbers too, as far as a float holds them exactly.
    elif _NUMBER.fullmatch(text) and abs(exact := float(text.replace("_", ""))) < 2**53 and exact == int(exact):
        value = int(exact)
    else:
        raise Mismatch("a whole number", node)
    if abs(value) > _LARGEST:
        raise Mismatch(f"a whole number of at most {_LARGEST}", node)
    return value


_SCALARS: dict[object, tuple[Callable[[Node], object], str]] = {
    str: (_text, "text"),
    bool: (_truth, "true or false"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
}
