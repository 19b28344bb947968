"""Another forward for one module, by a mixin put before its class.

The module stays the same object with the same parameters, so names, hooks, optimizers and saved files do not change.
"""

from __future__ import annotations

from functools import cache

from torch import nn

__all__ = ["original_class_name", "patch", "unpatch"]


def patch(module: nn.Module, mixin: type, prefix: str) -> None:
    """Put `mixin` before the module's class: its methods are found first, and `super()` in them is the module's class.

    prefix: with which the name of the new class begins.

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
    module.__class__ = _class_with(mixin, type(module), prefix)  # type: ignore[arg-type]


def unpatch(module: nn.Module, mixin: type) -> bool:
    """Undo the module's last `patch` if that was with `mixin`; returns whether it was."""
    patched = type(module)
    if vars(patched).get("_mixin") is not mixin:
        return False
    module.__class__ = vars(patched)["_original"]  # not by its place in the order: a mixin may have bases
    return True


def original_class_name(module: nn.Module) -> str:
    """Name of the class that the module had before its first `patch`: its library's name."""
    original = type(module)
    while "_mixin" in vars(original):
        original = vars(original)["_original"]
    return original.__name__


@cache  # modules of one class still have one class after it
def _class_with(mixin: type, original: type, prefix: str) -> type:
    marks = {"__doc__": mixin.__doc__, "_mixin": mixin, "_original": original}
    return type(f"{prefix}{original.__name__}", (mixin, original), marks)
