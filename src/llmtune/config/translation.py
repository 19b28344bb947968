"""How a value under another toolkit's key becomes values of our keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llmtune.config.convert import Mismatch
from llmtune.config.document import Entry, Listing, Node, Origin, Scalar, Table

__all__ = [
    "NO",
    "YES",
    "Change",
    "Rule",
    "Translation",
    "names_in",
    "nodes_of",
    "only",
    "report_to",
    "switch",
    "times_an_epoch",
    "warmup",
    "when_on",
    "words_of",
]


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
            return Scalar(value, value == "null", origin)
        return Listing(tuple(Scalar(item, False, origin) for item in value), origin)

    return {key: node(value) for key, value in values.items()}


YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")


def words_of(key: str, words: Mapping[str, str]) -> Rule:
    """Other spellings of a choice; a value that is not in `words` is taken as it is written."""
    return Rule(key, {word: {key: value} for word, value in words.items()})


def switch(key: str, on: str | tuple[str, ...], off: str | tuple[str, ...], *, is_vague: bool = False) -> Rule:
    """`true` stands for `on`, `false` weakly for `off`: `bf16: false` beside `fp16: true` gives way.

    A vague `true` gives way too.
    """
    words = {word: {key: on} for word in YES} | {word: {key: off} for word in NO}
    return Rule(words=words, expected="true or false", weak=frozenset((*NO, *YES) if is_vague else NO))


def when_on(values: Values) -> Rule:
    """`true` stands for these values, `false` for what happens here anyway."""
    nothing: Values = {}
    return Rule(words=dict.fromkeys(YES, values) | dict.fromkeys(NO, nothing), expected="true or false")


def only(word: str, reason: str) -> Rule:
    """A key with one possible value here, which changes nothing; any other value is refused."""
    return Rule(words={word: {}}, expected=f"`{word}`: {reason}")


def report_to(node: Node) -> list[Change]:
    """The console and the run's own files are always trackers; `none` adds none, `all` adds both others."""
    items = node.items if isinstance(node, Listing) else names_in(node) or (node,)
    names = tuple(item.text.lower() if isinstance(item, Scalar) else "" for item in items)
    if len(names) == 1:
        names = {"none": (), "": (), "null": (), "all": ("tensorboard", "wandb")}.get(names[0], names)
    trackers = ("console", "jsonl", "system", *names)
    return [Change(*row) for row in nodes_of({"tracking.trackers": trackers}, node.origin).items()]


def names_in(node: Node) -> tuple[Scalar, ...]:
    """Return the names of a text such as `q_proj,v_proj`, as other toolkits write lists; empty for any other value."""
    if not isinstance(node, Scalar) or not re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", node.text):
        return ()
    return tuple(Scalar(name.strip(), False, node.origin) for name in node.text.split(","))


def warmup(node: Node) -> list[Change]:
    """`warmup_steps` below 1 is a ratio of all steps, as transformers reads it since version 5."""
    number = _number_of(node)
    is_ratio = number is not None and 0 < number < 1
    return [Change("training.warmup_ratio" if is_ratio else "training.warmup_steps", node)]


def template_argument(name: str) -> Translation:
    """An argument of the chat template that other toolkits have as a key of its own."""

    def translate(node: Node) -> list[Change]:
        return [Change("data.template_args", Table((Entry(name, node, node.origin),), node.origin))]

    return translate


def times_an_epoch(key: str) -> Translation:
    """So many times an epoch are every 1/so many epochs; 0 is never."""

    def translate(node: Node) -> list[Change]:
        number = _number_of(node)
        if number is None or number < 0:
            raise Mismatch("a number of times an epoch", node)
        return [Change(key, Scalar(repr(1 / number) if number else "null", True, node.origin))]

    return translate


def _number_of(node: Node) -> float | None:
    try:
        return float(node.text) if isinstance(node, Scalar) else None
    except ValueError:
        return None
