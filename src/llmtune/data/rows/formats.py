"""The formats of rows: one function and one row of `FORMATS` each make a conversation of a row.

| format | a row has |
| --- | --- |
| `messages` | `messages` (or `conversations`): a list of `{"role", "content"}` (or other keys); also `tools` |
| `sharegpt` | `conversations` (or `messages`): a list of `{"from", "value"}`; also `system`, `tools` |
| `alpaca` | `instruction` and `output`; also `input`, `system`, `history` |
| `prompt-completion` | `prompt` and `completion`, or another of `PAIRS`; both texts (also `history`) or both messages |
| `text` | `text`, or the column named by `data.text_column` |
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from llmtune.common.decisions import Decision
from llmtune.data.example import REASONING_FIELDS, Conversation, Message, Row
from llmtune.data.reading.columns import leaf_columns
from llmtune.data.reading.parse import Unreadable, is_conversation
from llmtune.data.rows.field_names import (
    ALPACA_NAMES,
    LIST_FIELDS,
    PAIRS,
    RAW_PAIRS,
    SYSTEM_FIELDS,
    describe_turn,
    first_turn,
    is_raw_text,
    is_sharegpt_turn,
    list_field_of,
    pair_of,
    renamed_speakers,
    unused_fields,
)
from llmtune.data.rows.proposals import proposed_columns
from llmtune.data.rows.row_fields import (
    UnusableRowError,
    is_parts,
    null_or_missing,
    read_content,
    read_messages,
    read_system,
    read_template_args,
    read_text,
    read_tools,
    read_weight,
    wrong_type,
)
from llmtune.errors import DataError

__all__ = [
    "DETECTION_ROWS",
    "FORMATS",
    "Format",
    "Recognize",
    "UnusableRowError",
    "chat_of",
    "conversation_of",
    "detect_format",
    "looks_like",
    "read_history",
]

DETECTION_ROWS = 100
"""First rows of a file from which its format is detected."""

Fields = Mapping[str, object]
Recognize = Callable[[Fields], str | None]
"""Gives the fields (as text for users) by which a row shows that it has a format, or None."""


class Format(NamedTuple):
    """One format of rows."""

    parse: Callable[[Row], Conversation]
    """Makes a conversation of a row. Raises UnusableRowError."""
    recognize: Recognize


# --- messages, sharegpt


def _parse_messages(row: Row) -> Conversation:
    field = list_field_of(row.fields)
    if field is None:
        raise UnusableRowError(LIST_FIELDS[0], "the field is missing", "give the row a list of messages")
    return chat_of(row, read_messages(row.fields[field], field))


def chat_of(row: Row, messages: tuple[Message, ...]) -> Conversation:
    """A conversation with what a row of any format may have beside it: system prompt, weight, tools, arguments."""
    fields = row.fields
    if not messages or messages[0].role not in ("system", "developer"):
        messages = (*_system(fields), *messages)
    weight = _row_weight(fields)
    if weight is not None and not any(message.weight for message in messages):
        # The rule `customized` trains messages with a weight of their own: here that of the row speaks for its answers.
        messages = tuple(
            Message("assistant", message.content, 1.0, message.extra)
            if message.role == "assistant" and message.weight is None
            else message
            for message in messages
        )
    return Conversation(
        row.source,
        messages,
        tools=read_tools(fields),
        loss_weight=row.loss_weight * (1.0 if weight is None else weight),
        template_args=read_template_args(fields.get("chat_template_kwargs")),
    )


def _row_weight(fields: Fields) -> float | None:
    """The weight of all trained tokens of a row. A table without types has it as text."""
    value = fields.get("weight")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if value.strip() else None
    return read_weight(value, "weight")


def _list_and_first_turn(fields: Fields) -> tuple[str, Fields] | None:
    """The first list field that holds a list, and the first object in it."""
    name = next((name for name in LIST_FIELDS if isinstance(fields.get(name), (list, tuple))), None)
    return None if name is None else (name, first_turn(fields[name]))


def _recognize_messages(fields: Fields) -> str | None:
    found = _list_and_first_turn(fields)
    if found is not None:
        name, turn = found
        return None if is_sharegpt_turn(turn) else f"`{name}` with {describe_turn(turn)}"
    # Without a list in it such a field counts last: columnar files fill the fields of other formats with null.
    if _recognize_alpaca(fields) or _recognize_prompt_completion(fields):
        return None
    return next((f"`{field}` with `role` and `content`" for field in LIST_FIELDS if field in fields), None)


def _recognize_sharegpt(fields: Fields) -> str | None:
    found = _list_and_first_turn(fields)
    if found is None or not is_sharegpt_turn(found[1]):
        return None
    return f"`{found[0]}` with {describe_turn(found[1])}"


def _system(fields: Fields) -> tuple[Message, ...]:
    name = next((name for name in SYSTEM_FIELDS if fields.get(name) not in (None, "")), None)
    return () if name is None else (Message("system", read_system(fields[name], name)),)


def _reasoning(fields: Fields) -> dict[str, object]:
    """The reasoning that a row has in a column of its own, as a field of its answer."""
    for name in REASONING_FIELDS:
        value = fields.get(name)
        if isinstance(value, Unreadable):
            raise wrong_type(name, "must be text", value, "")
        if isinstance(value, str) and value:
            return {"reasoning_content": value}
    return {}


# --- alpaca


def _parse_alpaca(row: Row) -> Conversation:
    output_name, input_name = (
        next((name for name in names if row.fields.get(name) is not None), names[0]) for names in ALPACA_NAMES
    )
    for field in ("instruction", output_name):
        if row.fields.get(field) is None:
            raise UnusableRowError(field, null_or_missing(row.fields, field), "give it a text")
    question = read_text(row.fields["instruction"], "instruction")
    if row.fields.get(input_name) is not None:
        text = read_text(row.fields[input_name], input_name)
        if text:
            question = f"{question}\n\n{text}" if question else text
    history = read_history(row.fields.get("history"))
    output = read_text(row.fields[output_name], output_name)
    # A weight of the row is that of its output; the answers of its history have none.
    weight = None if row.fields.get("weight") is None else 1.0
    answer = Message("assistant", output, weight, _reasoning(row.fields))
    return chat_of(row, (*history, Message("user", question), answer))


def read_history(value: object) -> list[Message]:
    """The turns before a question: pairs of texts, or messages. Raises UnusableRowError for others."""
    if value is None or value == "":
        return []
    if is_conversation(value):
        return list(read_messages(value, "history"))
    if not isinstance(value, (list, tuple)):
        raise wrong_type("history", "must be a list of pairs", value, 'write [["question", "answer"], ...]')
    messages: list[Message] = []
    for index, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise wrong_type(f"history[{index}]", "must be a pair of texts", pair, 'write ["question", "answer"]')
        for side, role in enumerate(("user", "assistant")):
            messages.append(Message(role, read_text(pair[side], f"history[{index}][{side}]")))
    return messages


def _recognize_alpaca(fields: Fields) -> str | None:
    output = next((name for name in ALPACA_NAMES[0] if name in fields), None)
    return f"`instruction` and `{output}`" if "instruction" in fields and output else None


# --- prompt-completion


def _parse_prompt_completion(row: Row) -> Conversation:
    names = pair_of(row.fields)
    if names is None:
        named = next((pair for pair in PAIRS if all(name in row.fields for name in pair)), PAIRS[0])
        missing = named[1] if row.fields.get(named[0]) is not None else named[0]
        raise UnusableRowError(missing, null_or_missing(row.fields, missing), "give the row a prompt and a completion")
    values = (row.fields[name] for name in names)
    prompt, completion = (
        read_content(value, name) if is_parts(value) else value for name, value in zip(names, values, strict=True)
    )
    if isinstance(prompt, str) and isinstance(completion, str):
        answer = Message("assistant", completion, None, _reasoning(row.fields))
        conversation = chat_of(row, (*read_history(row.fields.get("history")), Message("user", prompt), answer))
        return dataclasses.replace(conversation, prompt_is_text=is_raw_text(row.fields))
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        # The completion alone is trained: weight 0 keeps earlier answers inside the prompt out of the loss.
        messages = (
            *(
                Message(message.role, message.content, 0.0, message.extra)
                for message in read_messages(prompt, names[0])
            ),
            *read_messages(completion, names[1]),
        )
        return chat_of(row, messages)
    for name, value in zip(names, (prompt, completion), strict=True):
        if not isinstance(value, (str, list, tuple)):
            fix = "write it as text, in quotes"
            if isinstance(value, (int, float)) or (isinstance(value, Mapping) and "content" not in value):
                fix += f'; or let the source make it one: `columns: {{{name}: "{{{name}}}"}}`'
            elif isinstance(value, Mapping):
                fix = "put the message into a list: [{...}]"
            raise wrong_type(name, "must be text or a list of messages", value, fix)
    problem = f"`{names[0]}` and `{names[1]}` are of two kinds"
    raise UnusableRowError(names[1], problem, "write both as text or both as lists of messages")


def _recognize_prompt_completion(fields: Fields) -> str | None:
    pair = next((pair for pair in PAIRS if all(name in fields for name in pair)), None)
    if pair is None:
        return None
    shown = f"`{pair[0]}` and `{pair[1]}`"
    if not all(isinstance(fields[name], str) for name in pair):
        return shown
    is_text = pair in RAW_PAIRS and is_raw_text(fields)
    way = "joined as one text, without a chat template" if is_text else "a user's and an assistant's message"
    return f"{shown} ({way})"


# --- text


def _parse_text(row: Row, column: str = "text") -> Conversation:
    value = row.fields.get(column)
    if value is None:
        names = ", ".join(f"`{name}`" for name in list(row.fields)[:6]) or "no field"
        fix = f"set `data.text_column` to the field that holds the text (the row has {names})"
        if column in row.fields:
            fix = "give the row a text, or delete it"
        raise UnusableRowError(column, null_or_missing(row.fields, column), fix)
    text = read_text(value, column)
    if not text:
        raise UnusableRowError(column, "the text is empty", "give the row a text, or delete it")
    weight = _row_weight(row.fields)
    return Conversation(row.source, text=text, loss_weight=row.loss_weight * (1.0 if weight is None else weight))


def _recognize_text(fields: Fields, column: str = "text") -> str | None:
    return f"`{column}`" if column in fields else None


# --- detection


def _recognized(
    fields: Fields, text_column: str | None, formats: Mapping[str, Recognize] | None = None
) -> tuple[str, str] | None:
    """The name of a row's format, one of `formats` or FORMATS, and the fields that show it, or None."""
    if formats is None and text_column is not None:
        shown = _recognize_text(fields, text_column)
        return None if shown is None else ("text", shown)
    recognizers = formats or {name: row.recognize for name, row in FORMATS.items()}
    return next(((name, shown) for name, recognize in recognizers.items() if (shown := recognize(fields))), None)


def looks_like(fields: Fields, text_column: str | None = None) -> str | None:
    """The name of the format with these fields, or None.

    >>> looks_like({"instruction": "Add.", "output": "3"}), looks_like({"chosen": "a", "rejected": "b"})
    ('alpaca', None)
    """
    recognized = _recognized(fields, text_column)
    return None if recognized is None else recognized[0]


def detect_format(
    rows: Iterable[Row], text_column: str | None = None, formats: Mapping[str, Recognize] | None = None
) -> tuple[str, Decision]:
    """Detect the format, one of `formats` or FORMATS, that most of the first `DETECTION_ROWS` rows have.

    An empty file has the last one. Raises DataError if no row has the fields of any format.
    """
    first = [row for row, _ in zip(rows, range(DETECTION_ROWS), strict=False)]
    if not first:
        last = list(FORMATS if formats is None else formats)[-1]
        return last, Decision("data.format", last, "there are no rows to tell it from")
    recognized = [pair for row in first if (pair := _recognized(row.fields, text_column, formats)) is not None]
    if not recognized:
        names = ", ".join(f"`{name}`" for name in list(leaf_columns(first[0].fields))[:8]) or "none"
        missing = f"a field `{text_column}`" if text_column else "the fields of a format"
        if {"role", "content"} <= first[0].fields.keys() or {"from", "value"} <= first[0].fields.keys():
            problem = f"a row is a whole conversation, and here it is one message; it has these fields: {names}"
            fix = 'put the messages of each conversation into one list: {"messages": [{...}, {...}]}'
            raise DataError(problem, first[0].source, fix)
        proposal = proposed_columns(
            first[0].fields,
            first[0].source,
            lambda fields: _recognized(fields, None, formats) is not None,
            compares="preference" in (formats or ()),
        )
        fix = f"{proposal}, or rename them to those of a format ({', '.join(FORMATS if formats is None else formats)})"
        fix += ", or set `data.text_column`" if formats is None else ""
        raise DataError(f"no row has {missing}; the first has these fields: {names}", first[0].source, fix)
    # The most common and not the first: one odd row must not decide for all.
    (name, count), *others = Counter(name for name, _ in recognized).most_common()
    shown = dict(reversed(recognized))[name]  # the fields of the first row with this format
    reason = f"{count} of the first {len(first)} rows have {shown}" if len(first) > 1 else f"the only row has {shown}"
    renamed = dict(pair for row in first for pair in renamed_speakers(row.fields))
    if renamed:
        reason += "; " + ", ".join(f"`{speaker[:60]}` is {role}" for speaker, role in list(renamed.items())[:6])
    if others:
        reason += "; " + ", ".join(f"{other_count} look like {other}" for other, other_count in others)
    return name, Decision("data.format", name, reason)


def conversation_of(row: Row, format_name: str, text_column: str | None = None) -> Conversation:
    """Make a conversation of a row in the given format.

    Raises UnusableRowError; its message names another format if the row has the fields of one.
    """
    try:
        if format_name == "text" and text_column is not None:
            conversation = _parse_text(row, text_column)
        else:
            conversation = FORMATS[format_name].parse(row)
    except UnusableRowError as error:
        other = looks_like(row.fields, text_column)
        if other is not None and other != format_name:
            problem = f"the row looks like {other}, the others are {format_name}"
            fix = f"put {other} rows into a file of their own, or set `data.format`"
            # The row is fine in its own format, so the message must not send the user to a missing field.
            raise UnusableRowError(error.field, problem, fix) from None
        raise
    unused = tuple(unused_fields(row.fields, format_name, text_column or "text"))
    return dataclasses.replace(conversation, unused=unused) if unused else conversation


FORMATS: dict[str, Format] = {
    "messages": Format(_parse_messages, _recognize_messages),
    "sharegpt": Format(_parse_messages, _recognize_sharegpt),
    "alpaca": Format(_parse_alpaca, _recognize_alpaca),
    "prompt-completion": Format(_parse_prompt_completion, _recognize_prompt_completion),
    "text": Format(_parse_text, _recognize_text),
}
"""Formats by the name that `data.format` gives them; the first that recognizes a row is its format."""
