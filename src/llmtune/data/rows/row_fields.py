"""Read the fields of a row: texts, weights, lists of messages, tool calls, tool descriptions.

Every function takes a value of unknown type and the name of its field, and raises `UnusableRowError` with that name,
the value and the fix.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping

from llmtune.data.example import REASONING_FIELDS, Message
from llmtune.data.reading.parse import Unreadable, describe_value, quoted
from llmtune.data.rows.field_names import (
    EXTRA_TEXTS,
    MARKS,
    ROLES,
    SPEAKER_ROLES,
    TOOL_FIELDS,
    TurnKeys,
    read_fields_of,
    role_of,
    turn_keys_of,
    turn_pair_of,
    without_blocks,
)
from llmtune.data.rows.proposals import columns_of_turn

__all__ = [
    "UnusableRowError",
    "is_parts",
    "null_or_missing",
    "read_content",
    "read_messages",
    "read_system",
    "read_template_args",
    "read_text",
    "read_tool_calls",
    "read_tools",
    "read_weight",
    "refuse_unreadable",
    "wrong_type",
]


_TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_TEXT_PART_TYPES = ("text", "input_text", "output_text")


class UnusableRowError(Exception):
    """A row is no conversation: the field at fault (None: the whole row), the problem and the fix."""

    def __init__(self, field: str | None, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.field, self.problem, self.fix = field, problem, fix


def wrong_type(field: str, rule: str, value: object, fix: str) -> UnusableRowError:
    """The error for a value that breaks a `rule` such as "must be text"."""
    if isinstance(value, Unreadable):
        return UnusableRowError(field, value.problem, value.fix)
    return UnusableRowError(field, f"{rule}, this is {describe_value(value)}", fix)


def null_or_missing(fields: Mapping[str, object], name: str) -> str:
    """The problem of a field without a value."""
    return "is null" if name in fields else "is missing"


def read_text(value: object, field: str) -> str:
    """The value as text. Raises UnusableRowError for any other type."""
    if not isinstance(value, str):
        raise wrong_type(field, "must be text", value, "write it as text, in quotes")
    return value


def read_weight(value: object, field: str) -> float | None:
    """The value as a weight from 0 to 1e6, or None. Raises UnusableRowError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fix = "write 0 to leave the message out of the loss, 1 to keep it"
        raise wrong_type(field, "must be a number", value, fix)
    if not 0 <= value <= 1e6:  # holds neither for NaN nor for a whole number beyond every float
        fix = "a weight is a number from 0 (not trained) upwards"
        raise UnusableRowError(field, f"{str(value)[:40]} is not a weight", fix)
    return float(value)


def read_message_weight(message: Mapping[str, object], field: str) -> float | None:
    """The weight of a message: 0 where one of its `MARKS` is false, else its `weight`, or 1 where a mark is true.

    Raises UnusableRowError for a mark that is neither true nor false.
    """
    weight = read_weight(message.get("weight"), f"{field}.weight")
    for name in MARKS:
        mark = message.get(name)
        if mark is None:
            continue
        if not isinstance(mark, (bool, int, float)) or mark not in (0, 1):
            fix = "write false to leave the message out of the loss, true to keep it; other numbers are a `weight`"
            raise wrong_type(f"{field}.{name}", "must be true or false", mark, fix)
        weight = 0.0 if not mark else 1.0 if weight is None else weight
    return weight


def read_template_args(value: object) -> Mapping[str, object]:
    """The `chat_template_kwargs` of a row, as an object or its JSON text. Raises UnusableRowError for others."""
    field, fix = "chat_template_kwargs", 'write {"enable_thinking": false}'
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise UnusableRowError(field, f"is not JSON: {describe_value(value)}", fix) from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong_type(field, "must be an object", value, fix)
    for name in value:
        if not isinstance(name, str) or name in _TEMPLATE_VARIABLES:
            raise UnusableRowError(f"{field}.{name}", "is no argument that a row can set", "take it out")
    return {name: _without_nulls(item, f"{field}.{name}") for name, item in value.items() if item is not None}


def read_content(value: object, field: str) -> str:
    """A text, or a list of text parts joined. Raises UnusableRowError for other parts: only text is trained on."""
    if not isinstance(value, (list, tuple)):
        return read_text(value, field)
    texts: list[str] = []
    for index, part in enumerate(value):
        part_field = f"{field}[{index}]"
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PART_TYPES and "text" in part:
            texts.append(read_text(part["text"], f"{part_field}.text"))
        elif isinstance(part, Mapping) and isinstance(part.get("type"), str):
            problem = f"a part of type {quoted(part['type'])} is not text"
            raise UnusableRowError(part_field, problem, "only text is trained on; take the part out")
        else:
            raise wrong_type(part_field, "must be a part with text", part, 'write {"type": "text", "text": "..."}')
    return "".join(texts)


def read_system(value: object, field: str) -> str:
    """A system prompt: a text, text parts, or a message with either (`content`, `parts` or `text`)."""
    if isinstance(value, Mapping):
        name = next((name for name in ("content", "parts", "text") if value.get(name) is not None), "content")
        return read_content(value.get(name), f"{field}.{name}")
    return read_content(value, field)


def is_parts(value: object) -> bool:
    """Whether a value is a list of text parts, and not a list of messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(part, Mapping) and "text" in part and not part.keys() & {"role", "from"} for part in value)
    )


def read_tool_calls(value: object, field: str) -> list[object]:
    """A list of tool calls without their null fields. Raises UnusableRowError for a call that names no function."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise wrong_type(field, "must be a list of calls", value, "write a list, also for one call")
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            fix = 'write {"function": {"name": "...", "arguments": {...}}}'
            raise UnusableRowError(f"{field}[{index}]", "the call names no function", fix)
        arguments = function.get("arguments", {})
        if not isinstance(arguments, (str, Mapping, type(None))):
            rule, fix = "must be an object or its JSON text", "write the arguments as an object"
            raise wrong_type(f"{field}[{index}].function.arguments", rule, arguments, fix)
    return [_without_nulls(_with_arguments(call), f"{field}[{index}]") for index, call in enumerate(value)]


def _with_arguments(call: object) -> object:
    """A call with the key `arguments`, which some programs call `parameters`."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    others = [key for key in ("parameters", "args", "input") if isinstance(call.get(key), (str, Mapping))]
    if call.get("arguments") is not None or not others:
        return call
    return {("arguments" if key == others[0] else key): value for key, value in call.items() if key != "arguments"}


def read_tools(fields: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    """The `tools` of a row, or its `functions`, given as a list or as its JSON text. Raises UnusableRowError."""
    name = next((name for name in TOOL_FIELDS if fields.get(name) not in (None, "", [], ())), TOOL_FIELDS[0])
    value = fields.get(name)
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            problem = f"is not JSON: {describe_value(value)}"
            raise UnusableRowError(name, problem, "write a list of tool descriptions") from None
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise wrong_type(name, "must be a list of tool descriptions", value, "write a list of objects")
    tools = [
        {key: _without_nulls(item, f"{name}[{index}].{key}") for key, item in tool.items() if item is not None}
        for index, tool in enumerate(value)
    ]
    if name == "functions":  # OpenAI's first form had the descriptions bare
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tuple(tools)


def _without_nulls(value: object, field: str) -> object:
    """Nested objects without their null fields: columnar files give every object the fields of all others, as null.

    Raises UnusableRowError for a number that JSON does not have, which a template would write as it is.
    """
    if isinstance(value, Mapping):
        return {key: _without_nulls(item, f"{field}.{key}") for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item, f"{field}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableRowError(field, f"{value} is not a JSON number", "write null, or leave the field out")
    if isinstance(value, Unreadable):
        raise UnusableRowError(field, value.problem, value.fix)
    return value


def refuse_unreadable(fields: Mapping[str, object]) -> None:
    """Raise UnusableRowError for the first value that cannot be read, of a row whose every field is used."""
    for name, value in fields.items():
        _without_nulls(value, name)


# --- messages


_CALL_SPEAKERS = ("function_call", "tool_call")
"""Speakers whose text is a call."""


def read_messages(value: object, field: str) -> tuple[Message, ...]:
    """A list of turns as messages. Raises UnusableRowError for the first part that is none."""
    if not isinstance(value, (list, tuple)):
        raise wrong_type(field, "must be a list of messages", value, 'write [{"role": "user", "content": "..."}, ...]')
    if not value:
        raise UnusableRowError(field, "the list of messages is empty", "give the row messages, or delete it")
    return tuple(message for index, turn in enumerate(value) for message in _messages_of(turn, f"{field}[{index}]"))


def _messages_of(turn: object, field: str) -> Iterator[Message]:
    if not isinstance(turn, Mapping):
        fix = 'write {"role": "user", "content": "..."}'
        if isinstance(turn, str):
            column = field.partition("[")[0]
            fix += f"; or let texts take turns, a user's first: `columns: {{messages: {column}}}`"
        raise wrong_type(field, "a message must be an object", turn, fix)
    pair = turn_pair_of(turn)
    if pair is None:
        for message in without_blocks(turn):
            yield _read_message(message, field)
        return
    weight = read_message_weight(turn, field)
    question, answer = (read_content(turn[key], f"{field}.{key}") for key in pair)
    yield Message("user", question, 0.0 if weight == 0 else None)
    yield Message("assistant", answer, weight, _extra_texts(turn, field, REASONING_FIELDS))


def _read_message(turn: Mapping[str, object], field: str) -> Message:
    keys = turn_keys_of(turn)
    speaker, role = _read_speaker(turn, keys, field)
    extra = _extra_texts(turn, field, EXTRA_TEXTS)
    calls = _read_calls(turn, field)
    text = turn.get(keys.text)
    weight = read_message_weight(turn, field)
    if speaker in _CALL_SPEAKERS and text is not None and not calls:
        calls = _parse_calls(read_content(text, f"{field}.{keys.text}"), f"{field}.{keys.text}")
        text = ""
    if calls:
        extra = {"tool_calls": calls, **extra}
    if text is None:
        if not extra.keys() & {"tool_calls", *REASONING_FIELDS}:
            raise _no_text(turn, keys, field)
        text = ""
    return Message(role, read_content(text, f"{field}.{keys.text}"), weight, extra)


def _extra_texts(turn: Mapping[str, object], field: str, names: tuple[str, ...]) -> dict[str, object]:
    given = [name for name in names if turn.get(name) is not None]
    return {name: read_text(turn[name], f"{field}.{name}") for name in given}


def _no_text(turn: Mapping[str, object], keys: TurnKeys, field: str) -> UnusableRowError:
    """The error for a turn without a text; it names the fields that may hold the text."""
    texts = [name for name, value in turn.items() if name not in read_fields_of(turn) and isinstance(value, str)]
    problem = null_or_missing(turn, keys.text)
    fix = "give the message a text, or take the message out"
    if texts:
        problem += f"; the message has {', '.join(f'`{str(name)[:60]}`' for name in texts[:4])}, which are not read"
        longest = max(texts[:4], key=lambda name: len(str(turn[name])))
        name = str(longest)[:60]
        fix = (
            f"rename `{name}` to `{keys.text}` if it holds the text, or say so in the source "
            f"(`columns: {{content: {name}}}`), or {fix}"
        )
    return UnusableRowError(f"{field}.{keys.text}", problem, fix)


# --- who speaks


def _read_speaker(turn: Mapping[str, object], keys: TurnKeys, field: str) -> tuple[str, str]:
    """The speaker of a turn as it is written, and its role."""
    value, where = turn.get(keys.speaker), f"{field}.{keys.speaker}"
    fix = f"give it one of {', '.join(ROLES)}"
    if value is None:
        names = ", ".join(f"`{str(name)[:60]}`" for name in list(turn)[:6]) or "no field"
        problem = "the turn says not whom it is from" if keys.speaker == "from" else "the message has no role"
        if keys.speaker in turn:
            raise UnusableRowError(where, problem, fix)
        fix = f"say under `{keys.speaker}` who speaks, and under `{keys.text}` what{_columns_for(turn)}"
        raise UnusableRowError(where, f"{problem}; it has {names}", fix)
    if not isinstance(value, str):
        raise wrong_type(where, "must be text", value, fix)
    role = role_of(value)
    if role is None:
        near = difflib.get_close_matches(value.strip().casefold(), SPEAKER_ROLES, n=1)
        kind = "role" if keys.speaker == "role" else "speaker"
        fix = f"did you mean `{near[0]}`? " if near else ""
        fix += f"{kind}s are {', '.join(ROLES)}"
        if value.strip():
            meant = SPEAKER_ROLES[near[0]] if near else "user"
            fix += f"; or say what it is in the source: `roles: {{{quoted(value)}: {meant}}}`"
        raise UnusableRowError(where, f"unknown {kind} {quoted(value)}", fix)
    return value.strip().casefold(), role


def _columns_for(turn: Mapping[str, object]) -> str:
    """The `columns` that would read a turn with keys of its own, for the fix; '' where there are none."""
    named = ", ".join(f"{field}: {name}" for field, name in (columns_of_turn(turn) or {}).items())
    return f", or name the keys in the source: `columns: {{{named}}}`" if named else ""


# --- calls


def _read_calls(turn: Mapping[str, object], field: str) -> list[object]:
    """The tool calls of a turn: its `tool_calls`, or its one `function_call`; either may be JSON text."""
    for name in ("tool_calls", "function_call"):
        value = turn.get(name)
        if isinstance(value, str) and value.strip():
            return _parse_calls(value, f"{field}.{name}")
        if name == "function_call" and isinstance(value, Mapping):
            # Columnar files give every message the fields of all others, as null.
            value = [value] if any(item is not None for item in value.values()) else None
        if value not in (None, "") and (calls := read_tool_calls(value, f"{field}.{name}")):
            return calls if name == "tool_calls" else _as_functions(calls)
    return []


def _parse_calls(text: str, field: str) -> list[object]:
    """Tool calls given as JSON text: one call, or a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        problem = f"the call is not JSON: {describe_value(text)}"
        raise UnusableRowError(field, problem, 'write {"name": "...", "arguments": {...}}') from None
    return _as_functions(read_tool_calls(calls if isinstance(calls, list) else [calls], field))


def _as_functions(calls: list[object]) -> list[object]:
    """The calls, each in the form with the key `function`."""
    return [
        call if isinstance(call, dict) and "function" in call else {"type": "function", "function": call}
        for call in calls
    ]
