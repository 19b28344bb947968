"""Arithmetic in the tables: `train.global_batch_size / train.micro_batch_size` over a file's own numbers."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

__all__ = ["Unknown", "evaluate"]


class Unknown(Exception):
    """A name of the expression has no number."""


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor}


def evaluate(expression: str, lookup: Callable[[str], float | None]) -> tuple[float | int, str]:
    """Return the value (whole numbers as `int`) and the expression with the numbers in place of the names.

    >>> evaluate("a.total / b", {"a.total": 8.0, "b": 4.0}.get)
    (2, '8 / 4')

    Raises:
        Unknown: with the first name that has no number, or where it is divided by zero.
    """
    tree = ast.parse(expression, mode="eval").body
    try:
        value = _value(tree, lookup)
    except ZeroDivisionError as error:
        raise Unknown(expression) from error
    said = ast.unparse(_Numbers(lookup).visit(tree))
    return (int(value) if value == int(value) else float(f"{value:.12g}")), said


def _name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := _name(node.value)) is not None:
        return f"{inner}.{node.attr}"
    return None


def _value(node: ast.expr, lookup: Callable[[str], float | None]) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, lookup), _value(node.right, lookup))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](*(_value(argument, lookup) for argument in node.args))
    name = _name(node)
    assert name is not None, "the tables hold nothing else"
    number = lookup(name)
    if number is None:
        raise Unknown(name)
    return number


class _Numbers(ast.NodeTransformer):
    """Replaces names by their numbers."""

    def __init__(self, lookup: Callable[[str], float | None]) -> None:
        self.lookup = lookup

    def visit_Name(self, node: ast.Name) -> ast.expr:
        number = self.lookup(node.id)
        return node if number is None else ast.Name(f"{number:g}")

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        name = _name(node)
        number = self.lookup(name) if name else None
        return node if number is None else ast.Name(f"{number:g}")
