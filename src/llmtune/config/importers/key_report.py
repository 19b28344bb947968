"""What became of one key of a foreign file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from llmtune.common.secrets import SECRET_NAME, SECRET_SHAPES
from llmtune.config.document import Listing, Node, Scalar, shown
from llmtune.config.importers.python_calls import CODE
from llmtune.config.importers.rules import Outcome
from llmtune.config.importers.source import Given

__all__ = ["KeyReport", "shown_value"]

SPOKEN = {
    "$command": "the command",
    "$peer": "the program",
    "$trainer": "the trainer's class",
    "$arguments": "the class of the arguments",
    "$fast_model": "the model's class",
    "$train_on_responses_only": "train_on_responses_only()",
}
"""What is read off a command line or a call, and not off a key -> its name for people."""


@dataclass
class KeyReport:
    """What became of one key of the file."""

    key: str
    value: str
    digest: str
    """Of the whole value, where `value` is cut."""
    where: str
    outcome: Outcome
    ours: tuple[str, ...] = ()
    text: str = ""

    @property
    def said(self) -> str:
        """The value such that two never look alike; the written config holds one that is kept."""
        return self.value if self.outcome is Outcome.KEPT else f"{self.value}{self.digest}"

    @property
    def name(self) -> str:
        """The key for people: what names a command or a class is no key of a file."""
        return SPOKEN.get(self.key, self.key)


def shown_value(given: Given) -> tuple[str, str]:
    """A value for the report, none that looks like a secret, and a digest where it is cut."""
    text = "null" if _is_null(given.node) else shown(given.node).removeprefix(CODE)
    if SECRET_SHAPES.search(text) or (SECRET_NAME.search(given.key) and not _is_null(given.node)):
        return "(not shown)", ""
    digest = hashlib.sha256(_whole(given.node).encode()).hexdigest()[:8]
    return text, f" (sha256 {digest})" if "..." in text else ""


def _whole(node: Node) -> str:
    """Everything a value holds, as text."""
    if isinstance(node, Scalar):
        return repr(node.text)
    if isinstance(node, Listing):
        return f"[{', '.join(_whole(item) for item in node.items)}]"
    return f"{{{', '.join(f'{entry.key!r}: {_whole(entry.value)}' for entry in node.entries)}}}"


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.is_null
