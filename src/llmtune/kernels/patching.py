"""Another forward for one module, by a subclass of its class: weights, names and what is saved stay as they are."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

__all__ = ["original_class_name", "patch", "unpatch"]


def patch(module: nn.Module, before: type, word: str) -> None:
    """Put the class `before` before the module's own: its methods are found first, `super()` is the module's own class.

    word: what the new class's name begins with.

    >>> class Doubled:
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> module = nn.Identity()
    >>> patch(module, Doubled, "Doubled")
    >>> type(module).__name__, original_class_name(module), module(3)
    ('DoubledIdentity', 'Identity', 6)
    >>> class Negated:
    ...     def forward(self, x):
    ...         return -super().forward(x)
    >>> patch(module, Negated, "Negated")
    >>> original_class_name(module), module(3)
    ('Identity', -6)
    >>> unpatch(module, Doubled), unpatch(module, Negated), unpatch(module, Doubled)
    (False, True, True)
    >>> module(3)
    3
    """
    module.__class__ = _class_with(before, type(module), word)  # type: ignore[arg-type]


def unpatch(module: nn.Module, before: type) -> bool:
    """Give the module back the class it had; returns whether `before` was what had been put before it, last of all."""
    kind = type(module)
    if vars(kind).get("_put_before") is not before:
        return False
    module.__class__ = kind.__mro__[2]  # after itself and `before`
    return True


def original_class_name(module: nn.Module) -> str:
    """Name of the class that the module had before anything was put before it, as its library calls it."""
    kind = type(module)
    while "_put_before" in vars(kind):
        kind = kind.__mro__[2]
    return kind.__name__


@cache
def _class_with(before: type, own: type, word: str) -> Any:
    return type(f"{word}{own.__name__}", (before, own), {"__doc__": before.__doc__, "_put_before": before})
