"""What each key means, read from the text under it in the schema, so that it is written once."""

from __future__ import annotations

import ast
import inspect
from functools import cache

from llmtune.config import convert
from llmtune.config.schema import Config, SourceConfig

__all__ = ["descriptions", "source_descriptions"]


@cache
def _texts(cls: type) -> dict[str, str]:
    """The text under every field of a dataclass of the schema, by the field's name."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            texts[statement.target.id] = inspect.cleandoc(str(below.value.value))
    return texts


@cache
def descriptions() -> dict[str, str]:
    """Return the description of every section and key by dotted name."""
    return {
        f"{section}.{name}" if section else name: text
        for section, cls in {"": Config, **convert.SECTIONS}.items()
        for name, text in _texts(cls).items()
    }


def source_descriptions() -> dict[str, str]:
    """Return the description of every key of one data source."""
    return _texts(SourceConfig)
