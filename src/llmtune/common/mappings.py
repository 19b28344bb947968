"""Nested mappings, such as a config as plain values."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["flat_items"]


def flat_items(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Return the innermost values with dotted names.

    >>> flat_items({"a": {"b": 1}, "c": 2})
    [('a.b', 1), ('c', 2)]
    """
    items: list[tuple[str, object]] = []
    for key, value in values.items():
        items += flat_items(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return items
