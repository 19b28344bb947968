"""From a row to a conversation: one function and one line of `FORMATS` for each format.

| format | a row has |
| --- | --- |
| `messages` | `messages` (or `conversations`): a list of `{"role", "content"}`; also `tools` |
| `sharegpt` | `conversations` (or `messages`): a list of `{"from", "value"}`; also `system`, `tools` |
| `alpaca` | `instruction` and `output`; also `input`, `system`, `history` |
| `prompt-completion` | `prompt` and `completion` (or `response`), both texts or both lists of messages |
| `text` | `text`, or the column named by `data.text_column` |
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmtune.common.decisions import Decision
from llmtune.data.example import Conversation, Message, Row
from llmtune.data.reading.parse import describe_value
from llmtune.errors import DataError

__all__ = ["DETECTION_ROWS", "FORMATS", "UnusableRowError", "conversation_of", "detect_format", "looks_like"]

DETECTION_ROWS = 100
"""First rows of a file from which its format is told."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_LIST_FIELDS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))
_EXTRA_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")


class UnusableRowError(Exception):
    """A row does not mean a conversation: the field at fault, what is wrong and the fix."""

    def __init__(self, field: str | None, what: str, fix: str) -> None:
        super().__init__(what)
        self.field, self.what, self.fix = field, what, fix


# --- messages
# ---------------------------------------------------------------------------------------------------------------------


def _messages(row: Row) -> Conversation:
    field = _list_field(row.fields)
    messages = _message_list(row.fields[field], field)
    return Conversation(row.source, messages, tools=_tools(row.fields), loss_weight=row.loss_weight)


def _list_field(fields: Mapping[str, Any]) -> str:
    for field in _LIST_FIELDS:
        if fields.get(field) is not None:
            return field
    raise UnusableRowError("messages", "the field is missing", "give the row a list of messages")


def _message_list(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise UnusableRowError(
            field,
            f"must be a list of messages, this is {describe_value(value)}",
            'write [{"role": "user", "content": "..."}, ...]',
        )
    if not value:
        raise UnusableRowError(field, "the list of messages is empty", "give the row messages, or delete it")
    return tuple(_message(one, f"{field}[{index}]") for index, one in enumerate(value))


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise UnusableRowError(
            field,
            f"a message must be an object, this is {describe_value(value)}",
            'write {"role": "user", "content": "..."}',
        )
    role = value.get("role")
    if not isinstance(role, str):
        what = "the message has no role" if role is None else f"must be text, this is {describe_value(role)}"
        raise UnusableRowError(f"{field}.role", what, f"give it one of {', '.join(ROLES)}")
    role = "tool" if role == "function" else role
    if role not in ROLES:
        near = difflib.get_close_matches(role.lower(), (*ROLES, *_SHAREGPT_ROLES), n=1)
        meant = f"did you mean `{_SHAREGPT_ROLES.get(near[0], near[0])}`? " if near else ""
        raise UnusableRowError(
            f"{field}.role", f"unknown role {json.dumps(role[:60])}", f"{meant}roles are {', '.join(ROLES)}"
        )
    tool_calls = _tool_calls(value.get("tool_calls"), f"{field}.tool_calls")
    extra: dict[str, Any] = {"tool_calls": tool_calls} if tool_calls else {}
    for name in _EXTRA_TEXTS:
        if value.get(name) is not None:
            extra[name] = _text(value[name], f"{field}.{name}")
    content = value.get("content")
    if content is None:
        if not extra.keys() & {"tool_calls", "reasoning_content", "reasoning", "thinking"}:
            what = "is null" if "content" in value else "is missing"
            raise UnusableRowError(f"{field}.content", what, "give the message a text, or take the message out")
        content = ""
    return Message(role, _content(content, f"{field}.content"), _weight(value.get("weight"), f"{field}.weight"), extra)


def _content(value: Any, field: str) -> str:
    if not isinstance(value, (list, tuple)):
        return _text(value, field)
    texts = []
    for index, part in enumerate(value):
        place = f"{field}[{index}]"
        if isinstance(part, str):
            texts.append(part)
        elif (
            isinstance(part, Mapping)
            and part.get("type", "text") in ("text", "input_text", "output_text")
            and "text" in part
        ):
            texts.append(_text(part["text"], f"{place}.text"))
        elif isinstance(part, Mapping) and isinstance(part.get("type"), str):
            raise UnusableRowError(
                place,
                f"a part of type {json.dumps(part['type'][:60])} is not text",
                "only text is trained on; take the part out",
            )
        else:
            raise UnusableRowError(
                place,
                f"must be a part with text, this is {describe_value(part)}",
                'write {"type": "text", "text": "..."}',
            )
    return "".join(texts)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError(field, f"must be text, this is {describe_value(value)}", "write it as text, in quotes")
    return value


def _weight(value: Any, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnusableRowError(
            field,
            f"must be a number, this is {describe_value(value)}",
            "write 0 to leave the message out of the loss, 1 to keep it",
        )
    if not 0 <= value <= 1e6:  # holds neither for NaN nor for a whole number beyond every float
        raise UnusableRowError(
            field, f"{str(value)[:40]} is not a weight", "a weight is a number from 0 (not trained) upwards"
        )
    return float(value)


def _tool_calls(value: Any, field: str) -> list[Any]:
    """Tool calls with only the fields that are there: columnar files fill absent ones with null."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise UnusableRowError(
            field, f"must be a list of calls, this is {describe_value(value)}", "write a list, also for one call"
        )
    calls = []
    for index, call in enumerate(value):
        place = f"{field}[{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UnusableRowError(
                place, "the call names no function", 'write {"function": {"name": "...", "arguments": {...}}}'
            )
        if not isinstance(function.get("arguments", {}), (str, Mapping, type(None))):
            what = f"must be an object or its JSON text, this is {describe_value(function['arguments'])}"
            raise UnusableRowError(f"{place}.function.arguments", what, "write the arguments as an object")
        calls.append(_without_nulls(call))
    return calls


def _tools(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    value = fields.get("tools")
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableRowError(
                "tools", f"is not JSON: {describe_value(value)}", "write a list of tool descriptions"
            ) from None
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, Mapping) for one in value):
        raise UnusableRowError(
            "tools", f"must be a list of tool descriptions, this is {describe_value(value)}", "write a list of objects"
        )
    return tuple(_without_nulls(one) for one in value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(one) for one in value]
    return value


# --- the other formats
# ------------------------------------------------------------------------------------------------------------


def _sharegpt(row: Row) -> Conversation:
    field = _list_field(row.fields)
    turns = row.fields[field]
    if not isinstance(turns, (list, tuple)):
        raise UnusableRowError(
            field,
            f"must be a list of turns, this is {describe_value(turns)}",
            'write [{"from": "human", "value": "..."}, ...]',
        )
    messages = [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]
    if not messages:
        raise UnusableRowError(field, "the list of turns is empty", "give the row turns, or delete it")
    return Conversation(
        row.source, (*_system(row.fields), *messages), tools=_tools(row.fields), loss_weight=row.loss_weight
    )


def _turn(turn: Any, field: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableRowError(
            field,
            f"a turn must be an object, this is {describe_value(turn)}",
            'write {"from": "human", "value": "..."}',
        )
    speaker = turn.get("from")
    if not isinstance(speaker, str):
        what = (
            "the turn says not whom it is from"
            if speaker is None
            else f"must be text, this is {describe_value(speaker)}"
        )
        raise UnusableRowError(f"{field}.from", what, f"give it one of {', '.join(_SHAREGPT_ROLES)}")
    if speaker not in _SHAREGPT_ROLES:
        near = difflib.get_close_matches(speaker.lower(), _SHAREGPT_ROLES, n=1)
        meant = f"did you mean `{near[0]}`? " if near else ""
        raise UnusableRowError(
            f"{field}.from",
            f"unknown speaker {json.dumps(speaker[:60])}",
            f"{meant}speakers are {', '.join(_SHAREGPT_ROLES)}",
        )
    if turn.get("value") is None:
        raise UnusableRowError(
            f"{field}.value",
            "is null" if "value" in turn else "is missing",
            "give the turn a text, or take the turn out",
        )
    text = _content(turn["value"], f"{field}.value")
    weight = _weight(turn.get("weight"), f"{field}.weight")
    if speaker in ("function_call", "tool_call"):
        return Message("assistant", "", weight, {"tool_calls": _written_calls(text, f"{field}.value")})
    return Message(_SHAREGPT_ROLES[speaker], text, weight)


def _written_calls(text: str, field: str) -> list[Any]:
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise UnusableRowError(
            field, f"the call is not JSON: {describe_value(text)}", 'write {"name": "...", "arguments": {...}}'
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    checked = _tool_calls(calls, field)
    return [call if "function" in call else {"type": "function", "function": call} for call in checked]


def _system(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    value = fields.get("system")
    return () if value is None or value == "" else (Message("system", _text(value, "system")),)


def _alpaca(row: Row) -> Conversation:
    for field in ("instruction", "output"):
        if row.fields.get(field) is None:
            raise UnusableRowError(field, "is null" if field in row.fields else "is missing", "give it a text")
    asked = _text(row.fields["instruction"], "instruction")
    beside = row.fields.get("input")
    if beside is not None and _text(beside, "input"):
        asked = f"{asked}\n\n{beside}" if asked else str(beside)
    earlier: list[Message] = []
    history = row.fields.get("history")
    if history is not None and not isinstance(history, (list, tuple)):
        raise UnusableRowError(
            "history",
            f"must be a list of pairs, this is {describe_value(history)}",
            'write [["question", "answer"], ...]',
        )
    for index, pair in enumerate(history or ()):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UnusableRowError(
                f"history[{index}]",
                f"must be a pair of texts, this is {describe_value(pair)}",
                'write ["question", "answer"]',
            )
        earlier += [
            Message("user", _text(pair[0], f"history[{index}][0]")),
            Message("assistant", _text(pair[1], f"history[{index}][1]")),
        ]
    answer = Message("assistant", _text(row.fields["output"], "output"), _weight(row.fields.get("weight"), "weight"))
    messages = (*_system(row.fields), *earlier, Message("user", asked), answer)
    return Conversation(row.source, messages, loss_weight=row.loss_weight)


def _prompt_completion(row: Row) -> Conversation:
    names = next((pair for pair in _PAIRS if all(row.fields.get(name) is not None for name in pair)), None)
    if names is None:
        missing = "completion" if row.fields.get("prompt") is not None else "prompt"
        raise UnusableRowError(
            missing, "is null" if missing in row.fields else "is missing", "give the row a prompt and a completion"
        )
    prompt, completion = (row.fields[name] for name in names)
    if isinstance(prompt, str) and isinstance(completion, str):
        messages: tuple[Message, ...] = (Message("user", prompt), Message("assistant", completion))
        return Conversation(row.source, messages, prompt_is_text=True, loss_weight=row.loss_weight)
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        # Only the completion is asked for: earlier answers inside the prompt stay out of the loss.
        asked = tuple(Message(one.role, one.content, 0.0, one.extra) for one in _message_list(prompt, names[0]))
        messages = (*asked, *_message_list(completion, names[1]))
        return Conversation(row.source, messages, tools=_tools(row.fields), loss_weight=row.loss_weight)
    for name, value in zip(names, (prompt, completion), strict=True):
        if not isinstance(value, (str, list, tuple)):
            raise UnusableRowError(
                name,
                f"must be text or a list of messages, this is {describe_value(value)}",
                "write it as text, in quotes",
            )
    raise UnusableRowError(
        names[1], f"`{names[0]}` and `{names[1]}` are of two kinds", "write both as text or both as lists of messages"
    )


def _text_row(row: Row) -> Conversation:
    return _text_of_column(row, "text")


def _text_of_column(row: Row, column: str) -> Conversation:
    value = row.fields.get(column)
    if value is None:
        has = ", ".join(f"`{name}`" for name in list(row.fields)[:6]) or "no field"
        fix = f"set `data.text_column` to the field that holds the text (the row has {has})"
        raise UnusableRowError(column, "is null" if column in row.fields else "is missing", fix)
    text = _text(value, column)
    if not text:
        raise UnusableRowError(column, "the text is empty", "give the row a text, or delete it")
    return Conversation(row.source, text=text, loss_weight=row.loss_weight)


# --- which format
# -----------------------------------------------------------------------------------------------------------------


def looks_like(fields: Mapping[str, Any], text_column: str | None = None) -> str | None:
    """The format whose fields these are, or None.

    >>> looks_like({"instruction": "Add.", "output": "3"}), looks_like({"chosen": "a", "rejected": "b"})
    ('alpaca', None)
    """
    if text_column is not None:
        return "text" if text_column in fields else None
    for name in _LIST_FIELDS:
        turns = fields.get(name)
        if isinstance(turns, (list, tuple)):
            first = next((one for one in turns if isinstance(one, Mapping)), {})
            return "sharegpt" if "from" in first and "role" not in first else "messages"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if any(all(name in fields for name in pair) for pair in _PAIRS):
        return "prompt-completion"
    if any(name in fields for name in _LIST_FIELDS):
        return "messages"
    return "text" if "text" in fields else None


def detect_format(rows: Iterable[Row], text_column: str | None = None) -> tuple[str, Decision]:
    """Tell the format from the first rows (at most `DETECTION_ROWS` are looked at): the one that most of them have.

    Raises DataError if no row has the fields of any format; an empty file counts as text.
    """
    first = [row for row, _ in zip(rows, range(DETECTION_ROWS), strict=False)]
    found = Counter(name for row in first if (name := looks_like(row.fields, text_column)) is not None)
    if first and not found:
        fields = ", ".join(f"`{name}`" for name in list(first[0].fields)[:8]) or "none"
        wanted = f"a field `{text_column}`" if text_column else "the fields of a format"
        fix = "rename the fields to those of a format (messages, sharegpt, alpaca, prompt-completion, text), or set `data.text_column`"
        raise DataError(f"no row has {wanted}; the first has these fields: {fields}", first[0].source, fix)
    if not first:
        return "text", Decision("data.format", "text", "there are no rows to tell it from")
    name, count = found.most_common(1)[0]
    by = _telling_fields(first, name, text_column)
    reason = f"{count} of the first {len(first)} rows have {by}" if len(first) > 1 else f"the only row has {by}"
    others = ", ".join(f"{other_count} look like {other}" for other, other_count in found.most_common()[1:])
    return name, Decision("data.format", name, f"{reason}; {others}" if others else reason)


def _telling_fields(rows: list[Row], name: str, text_column: str | None) -> str:
    fields = next(row.fields for row in rows if looks_like(row.fields, text_column) == name)
    if name in ("messages", "sharegpt"):
        field = next(one for one in _LIST_FIELDS if one in fields)
        return f"`{field}` with {'`role` and `content`' if name == 'messages' else '`from` and `value`'}"
    if name == "prompt-completion":
        pair = next(pair for pair in _PAIRS if all(one in fields for one in pair))
        return " and ".join(f"`{one}`" for one in pair)
    return "`instruction` and `output`" if name == "alpaca" else f"`{text_column or 'text'}`"


def conversation_of(row: Row, format_name: str, text_column: str | None = None) -> Conversation:
    """Make a conversation of a row in the given format.

    Raises UnusableRowError, which names another format if the row looks like one.
    """
    try:
        if format_name == "text" and text_column is not None:
            return _text_of_column(row, text_column)
        return FORMATS[format_name](row)
    except UnusableRowError as refused:
        other = looks_like(row.fields, text_column)
        if other is not None and other != format_name:
            what = f"the row looks like {other}, the others are {format_name}"
            raise UnusableRowError(
                refused.field, what, f"put {other} rows into a file of their own, or set `data.format`"
            ) from None
        raise


FORMATS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text_row,
}
