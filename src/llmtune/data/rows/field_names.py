"""The names of fields by which rows are read, and the fields that nothing reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llmtune.data.example import REASONING_FIELDS
from llmtune.data.rows.row_fields import MARKS, MESSAGE_FIELDS, UnusableRowError

__all__ = [
    "ALPACA_NAMES",
    "CHAT_COLUMNS",
    "LIST_FIELDS",
    "PAIRS",
    "SYSTEM_FIELDS",
    "list_field_of",
    "pair_of",
    "unused_fields",
]

LIST_FIELDS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
)
"""Names of a prompt and its completion."""
ALPACA_NAMES = (("output", "response"), ("input", "context"))
"""Fields of the `alpaca` format that have two names; the first one counts."""
SYSTEM_FIELDS = ("system", "system_prompt")
CHAT_COLUMNS = (*SYSTEM_FIELDS, *REASONING_FIELDS, "chat_template_kwargs")
"""Columns beside a prompt and its completion that only a conversation has."""
UNUSED_SHOWN = 12
"""Unread fields of one row that are described; a file whose keys are data has no end of them."""
TURN_FIELDS = frozenset({"from", "value", "weight", *MARKS})
"""Fields of a `sharegpt` turn that are read."""


def list_field_of(fields: Mapping[str, object]) -> str:
    """The name of the field that holds a row's list of messages. Raises UnusableRowError where there is none."""
    for field in LIST_FIELDS:
        if fields.get(field) is not None:
            return field
    raise UnusableRowError("messages", "the field is missing", "give the row a list of messages")


def pair_of(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """The names of a row's prompt and completion."""
    return next((pair for pair in PAIRS if all(fields.get(name) is not None for name in pair)), None)


def unused_fields(fields: Mapping[str, object], format_name: str, text_column: str) -> Iterator[str]:
    """Describe the fields of a row and of its messages that nothing reads; the switches come first."""
    lists: list[object] = []
    read = {"weight"}
    if format_name == "text":
        read.add(text_column)
    else:
        read |= {"tools", "chat_template_kwargs", *SYSTEM_FIELDS}
    if format_name in ("messages", "sharegpt"):
        name = list_field_of(fields)
        read.add(name)
        lists = [fields[name]]
    elif format_name == "alpaca":
        read |= {"instruction", "history", *REASONING_FIELDS}
        read |= {first if fields.get(first) is not None else other for first, other in ALPACA_NAMES}
    elif format_name == "prompt-completion":
        pair = pair_of(fields) or ()
        lists = [fields[name] for name in pair]
        read |= {*pair, *(() if any(isinstance(value, (list, tuple)) for value in lists) else REASONING_FIELDS)}
        if all(isinstance(value, str) for value in lists) and not any(name in fields for name in CHAT_COLUMNS):
            read.remove("tools")  # plain text, without a template that could write them
    read_in_turns = TURN_FIELDS if format_name == "sharegpt" else MESSAGE_FIELDS
    turns = [turn for turns in lists if isinstance(turns, (list, tuple)) for turn in turns if isinstance(turn, Mapping)]
    if turns and (turns[0].get("role") or turns[0].get("from")) in ("system", "developer"):
        read -= {*SYSTEM_FIELDS}  # the conversation has a system prompt of its own
    in_turns = dict(_unread(pair for turn in turns for pair in turn.items() if pair[0] not in read_in_turns))
    beside = dict(_unread(pair for pair in fields.items() if pair[0] not in read))
    for is_switch in (True, False):
        for where, unread in ((" of a message", in_turns), ("", beside)):
            names = sorted(str(name) for name, value in unread.items() if isinstance(value, bool) == is_switch)
            for name in names[:UNUSED_SHOWN]:
                yield f"{'switch ' if is_switch else ''}`{name[:60]}`{where}"


def _unread(pairs: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Fields with a value: an empty one loses nothing, and tables give every row all columns."""
    return ((name, value) for name, value in pairs if value not in (None, "", [], {}))
