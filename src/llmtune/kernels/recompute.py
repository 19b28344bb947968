"""How a tensor was made, kept beside it: whoever needs it in the backward pass may make it again and store nothing.

The output of a norm and the product of a feed-forward layer are cheap to make from what their own backward passes keep
in any case. The fused LoRA layers behind them, which would store them, look here first. What is made again is the same,
bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Recipe", "recipe_of", "with_recipe"]


class Recipe(NamedTuple):
    """`make(*sources)` is the tensor."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


def with_recipe(tensor: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Note on this very tensor how it is made.

    A view or a copy of it has no recipe, and a tensor without a gradient needs none.

    sources: what others keep until the backward pass in any case.
    """
    if tensor.requires_grad:
        tensor.__dict__["_recipe"] = Recipe(make, tuple(source.detach() for source in sources))
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """Return the recipe of a tensor, if it has one."""
    return tensor.__dict__.get("_recipe")
