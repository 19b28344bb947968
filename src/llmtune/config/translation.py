"""How a value under another toolkit's key becomes values of our keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llmtune.config.convert import Mismatch
from llmtune.config.document import Listing, Node, Origin, Scalar

__all__ = ["Change", "Rule", "Translation", "nodes_of"]


class Change(NamedTuple):
    """The value that another toolkit's key gives to one of ours.

    A weak change gives way to anything else the same file says about that key.
    """

    key: str
    value: Node
    weak: bool = False


Translation = Callable[[Node], list[Change]]
"""Returns the changes for a value of another toolkit's key; raises Mismatch for a value that has no meaning here."""

Values = Mapping[str, str | tuple[str, ...]]
"""Values by our keys; a tuple is a list."""


@dataclass(frozen=True)
class Rule:
    """A translation as a row of a table."""

    key: str = ""
    """Our key, which takes a value that is not in `words` as it is written."""

    words: Mapping[str, Values] = field(default_factory=dict)
    """A value, in lower case -> the values that our keys take for it."""

    expected: str = ""
    """When given, a value that is not in `words` is refused: it must be this."""

    weak: frozenset[str] = frozenset()
    """Values that give way to anything else the same file says about the key."""

    implies: Values = field(default_factory=dict)
    """Weak values beside it, whatever the value."""

    def __call__(self, node: Node) -> list[Change]:
        """Return the changes that `node` makes; raises Mismatch for a value that must be `expected`."""
        text = node.text.lower() if isinstance(node, Scalar) else None
        values = self.words.get(text) if text is not None else None
        if values is None and self.expected:
            raise Mismatch(self.expected, node)
        changes = {self.key: node} if values is None else nodes_of(values, node.origin)
        return [
            *(Change(key, value, text in self.weak) for key, value in changes.items()),
            *(Change(key, value, weak=True) for key, value in nodes_of(self.implies, node.origin).items()),
        ]


def nodes_of(values: Values, origin: Origin) -> dict[str, Node]:
    """Return values as they would stand in a config, at `origin`."""

    def node(value: str | tuple[str, ...]) -> Node:
        if isinstance(value, str):
            return Scalar(value, False, origin)
        return Listing(tuple(Scalar(item, False, origin) for item in value), origin)

    return {key: node(value) for key, value in values.items()}
