"""What each key means, read from the text under it in the schema, so that it is written once."""

from __future__ import annotations

import ast
import inspect
from functools import cache

from llmtune.config import convert, schema

__all__ = ["descriptions", "source_descriptions"]


@cache
def _class_fields() -> dict[str, dict[str, str]]:
    """The text under every field of every dataclass of the schema, by class and field name."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts: dict[str, str] = {}
        for statement, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                assert isinstance(below, ast.Expr)
                assert isinstance(below.value, ast.Constant)
                texts[statement.target.id] = inspect.cleandoc(str(below.value.value))
        found[node.name] = texts
    return found


@cache
def descriptions() -> dict[str, str]:
    """Return the description of every section and key by dotted name."""
    texts = {}
    for prefix, cls in {"": schema.Config, **convert.SECTIONS}.items():
        for name, text in _class_fields()[cls.__name__].items():
            texts[f"{prefix}.{name}" if prefix else name] = text
    return texts


def source_descriptions() -> dict[str, str]:
    """Return the description of every key of one data source."""
    return _class_fields()["SourceConfig"]
