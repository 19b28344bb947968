"""Read the fields of a row: texts, weights, lists of messages, tool calls, tool descriptions.

Every function takes a value of unknown type and the name of its field, and raises `UnusableRowError` with that name,
the value and the fix.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping

from llmtune.data.example import REASONING_FIELDS, Message
from llmtune.data.reading.parse import describe_value

__all__ = [
    "MARKS",
    "MESSAGE_FIELDS",
    "SPEAKER_ROLES",
    "UnusableRowError",
    "null_or_missing",
    "read_content",
    "read_message_weight",
    "read_messages",
    "read_template_args",
    "read_text",
    "read_tool_calls",
    "read_tools",
    "read_weight",
    "wrong_type",
]

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKER_ROLES = {
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
"""Role of each speaker of the `sharegpt` format."""

_EXTRA_TEXTS = ("name", "tool_call_id", *REASONING_FIELDS)
MARKS = ("train", "trainable", "training", "loss")
"""Switches of a message by which other tools say whether it is trained."""
MESSAGE_FIELDS = frozenset({"role", "content", "weight", "tool_calls", *MARKS, *_EXTRA_TEXTS})
"""Fields of a message that are read."""

_TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_TEXT_PART_TYPES = ("text", "input_text", "output_text")


class UnusableRowError(Exception):
    """A row is no conversation: the field at fault (None: the whole row), the problem and the fix."""

    def __init__(self, field: str | None, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.field, self.problem, self.fix = field, problem, fix


def wrong_type(field: str, rule: str, value: object, fix: str) -> UnusableRowError:
    """The error for a value that breaks a `rule` such as "must be text"."""
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
    """The weight of a message: 0 where one of its `MARKS` is false, else its `weight`, or 1 where a mark is true."""
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
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}


def read_messages(value: object, field: str) -> tuple[Message, ...]:
    """A list of `{"role", "content"}` as messages. Raises UnusableRowError for the first part that is none."""
    if not isinstance(value, (list, tuple)):
        raise wrong_type(field, "must be a list of messages", value, 'write [{"role": "user", "content": "..."}, ...]')
    if not value:
        raise UnusableRowError(field, "the list of messages is empty", "give the row messages, or delete it")
    return tuple(_read_message(message, f"{field}[{index}]") for index, message in enumerate(value))


def _read_message(value: object, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise wrong_type(field, "a message must be an object", value, 'write {"role": "user", "content": "..."}')
    role = _read_role(value.get("role"), f"{field}.role")
    tool_calls = read_tool_calls(value.get("tool_calls"), f"{field}.tool_calls")
    extra: dict[str, object] = {"tool_calls": tool_calls} if tool_calls else {}
    for name in _EXTRA_TEXTS:
        if value.get(name) is not None:
            extra[name] = read_text(value[name], f"{field}.{name}")
    content = value.get("content")
    if content is None:
        if not extra.keys() & {"tool_calls", *REASONING_FIELDS}:
            fix = "give the message a text, or take the message out"
            raise UnusableRowError(f"{field}.content", null_or_missing(value, "content"), fix)
        content = ""
    text = read_content(content, f"{field}.content")
    return Message(role, text, read_message_weight(value, field), extra)


def _read_role(value: object, field: str) -> str:
    fix = f"give it one of {', '.join(ROLES)}"
    if value is None:
        raise UnusableRowError(field, "the message has no role", fix)
    if not isinstance(value, str):
        raise wrong_type(field, "must be text", value, fix)
    role = "tool" if value == "function" else value
    if role not in ROLES:
        near = difflib.get_close_matches(role.lower(), (*ROLES, *SPEAKER_ROLES), n=1)
        hint = f"did you mean `{SPEAKER_ROLES.get(near[0], near[0])}`? " if near else ""
        fix = f"{hint}roles are {', '.join(ROLES)}"
        raise UnusableRowError(field, f"unknown role {json.dumps(role[:60])}", fix)
    return role


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
            problem = f"a part of type {json.dumps(part['type'][:60])} is not text"
            raise UnusableRowError(part_field, problem, "only text is trained on; take the part out")
        else:
            raise wrong_type(part_field, "must be a part with text", part, 'write {"type": "text", "text": "..."}')
    return "".join(texts)


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
    return [_without_nulls(call) for call in value]


def read_tools(value: object) -> tuple[Mapping[str, object], ...]:
    """The `tools` of a row, given as a list or as its JSON text. Raises UnusableRowError for anything else."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            problem = f"is not JSON: {describe_value(value)}"
            raise UnusableRowError("tools", problem, "write a list of tool descriptions") from None
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise wrong_type("tools", "must be a list of tool descriptions", value, "write a list of objects")
    return tuple({key: _without_nulls(item) for key, item in tool.items() if item is not None} for tool in value)


def _without_nulls(value: object) -> object:
    """Nested objects without their null fields: columnar files give every object the fields of all others, as null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    return value
