"""Messages as chat templates read them, and the messages that each mask rule trains."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from llmtune.data.example import REASONING_FIELDS, Message
from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.provenance import DATA, with_origin

__all__ = ["SELECTIONS", "by_turn", "message_fields", "render_with_arguments", "traced_fields", "with_system"]

KNOWN_ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "model", "ipython", "observation"}
)
"""Roles from which a template may build its control tokens; any other role is text of the row."""

HEADER_FIELDS = frozenset({"name", "tool_call_id", "id", "recipient"})
"""Fields of a message that templates write into headers: text of the row, but no part of the message's answer."""


ArgumentForm = Callable[[object], object]
"""The form in which the arguments of a tool call are given to a template."""


def _as_object(arguments: object) -> object:
    """Arguments given as the JSON text of an object become that object."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: object) -> object:
    """Arguments given as an object become its JSON text."""
    return json.dumps(arguments, ensure_ascii=False, default=str) if isinstance(arguments, Mapping) else arguments


def message_fields(message: Message, form: ArgumentForm = _as_object) -> dict[str, object]:
    """Return a message as the dictionary a chat template reads.

    Fields without a value are left out, the arguments of tool calls are given in `form` (most templates expect
    objects; inference servers give them too), and reasoning is given under every name that templates read.
    """
    extra = {key: value for key, value in message.extra.items() if value is not None}
    if "tool_calls" in extra:
        extra["tool_calls"] = [_with_arguments(call, form) for call in cast("list[object]", extra["tool_calls"])]
    reasoning = next((extra[name] for name in REASONING_FIELDS if name in extra), None)
    if reasoning is not None:
        extra = {"thinking": reasoning, **extra, "reasoning_content": reasoning}
    return {"role": message.role, "content": message.content, **extra}


def _with_arguments(call: object, form: ArgumentForm) -> object:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def _arguments_of(messages: Sequence[Message]) -> list[object]:
    """The arguments of all tool calls that are an object, or the JSON text of one."""
    calls = [call for message in messages for call in cast("list[object]", message.extra.get("tool_calls") or ())]
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    values = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
    return [value for value in values if isinstance(_as_object(value), Mapping)]


def render_with_arguments(
    messages: Sequence[Message], render: Callable[[list[dict[str, object]]], str]
) -> tuple[list[dict[str, object]], str]:
    """Render messages with their tool calls as the template takes them (see `_render_arguments`).

    Calls are given as they are. Where the template fails on `{"name", "arguments"}`, they stand below `function`.
    Raises the `TemplateRefusal` of the calls as they are where neither form can be rendered.
    """
    try:
        return _render_arguments(messages, render)
    except TemplateRefusal as refusal:
        wrapped = [_with_functions(message) for message in messages]
        if refusal.is_limit or wrapped == list(messages):
            raise
        try:
            return _render_arguments(wrapped, render)
        except TemplateRefusal:
            raise refusal from None


def _with_functions(message: Message) -> Message:
    """The message with each of its tool calls in the form with the key `function`."""
    calls = [
        {"type": "function", "function": call} if isinstance(call, Mapping) and "function" not in call else call
        for call in cast("list[object]", message.extra.get("tool_calls") or ())
    ]
    return replace(message, extra={**message.extra, "tool_calls": calls}) if calls else message


def _render_arguments(
    messages: Sequence[Message], render: Callable[[list[dict[str, object]]], str]
) -> tuple[list[dict[str, object]], str]:
    """Render messages with the arguments of their tool calls as the template takes them.

    Objects come first. JSON text takes their place where the template fails on objects (it joins them to a text), or
    where it prints them in Python's notation. Returns the fields of the messages and the text. Raises the
    `TemplateRefusal` of `render` for objects where neither form can be rendered.
    """
    fields = [message_fields(message) for message in messages]
    arguments = _arguments_of(messages)
    printed = [str(value) for value in map(_as_object, arguments) if value]  # an empty one reads the same in both
    refusal: TemplateRefusal | None = None
    text = ""
    try:
        text = render(fields)
    except TemplateRefusal as error:
        if error.is_limit or not arguments:
            raise
        refusal = error
    if refusal is None and not any(value in text for value in printed):
        return fields, text
    in_text = [message_fields(message, _as_text) for message in messages]
    try:
        other = render(in_text)
    except TemplateRefusal:
        if refusal is not None:
            raise refusal from None
        return fields, text
    # A content of the row may hold Python's notation as well, which is there in both forms; and a template that makes
    # JSON of the arguments in another place would make JSON of their JSON.
    is_printed = any(other.count(value) < text.count(value) for value in printed)
    is_doubled = any(json.dumps(_as_text(value), ensure_ascii=False) in other for value in arguments)
    return (fields, text) if refusal is None and (not is_printed or is_doubled) else (in_text, other)


def traced_fields(fields: Mapping[str, object], index: int) -> dict[str, object]:
    """Return the result of `message_fields` with origins: message `index`, or DATA for texts of headers."""
    traced = {key: with_origin(value, DATA if key in HEADER_FIELDS else index) for key, value in fields.items()}
    # Templates build control tokens such as <|user|> from a role; an unknown role must not be able to name one.
    role = fields["role"]
    traced["role"] = role if role in KNOWN_ROLES else with_origin(role, DATA)
    return traced


def with_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """The messages after a system prompt, where one is given and they have none of their own."""
    if system is None or any(message.role in ("system", "developer") for message in messages):
        return messages
    return (Message("system", system), *messages)


def by_turn(messages: tuple[Message, ...], *, with_rest: bool) -> list[tuple[int, tuple[Message, ...]]]:
    """For each turn of the assistant, its first message (by index, what it answers included) and all messages up to it.

    A turn of the assistant is all of its messages, and the results of its calls, before someone else speaks. Messages
    of earlier turns get the weight 0. Messages after the last turn are a turn of their own `with_rest`, and where there
    is no other.
    """
    roles = [message.role for message in messages]
    stops = [
        index + 1
        for index, role in enumerate(roles)
        if role == "assistant" and next((later for later in roles[index + 1 :] if later != "tool"), "") != "assistant"
    ]
    if not stops or (with_rest and stops[-1] < len(messages)):
        stops.append(len(messages))
    turns = []
    for first, stop in itertools.pairwise([0, *stops]):
        earlier = (replace(message, weight=0.0) for message in messages[:first])
        turns.append((first, (*earlier, *messages[first:stop])))
    return turns


def _last_turn(messages: Sequence[Message]) -> list[int]:
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    return [index for index, message in enumerate(messages) if message.role == "assistant" and index > last_user]


def _of_roles(*roles: str) -> Callable[[Sequence[Message]], list[int]]:
    return lambda messages: [index for index, message in enumerate(messages) if message.role in roles]


SELECTIONS: Mapping[str, Callable[[Sequence[Message]], list[int]]] = {
    "last_assistant_message": lambda messages: _of_roles("assistant")(messages)[-1:],
    "last_assistant_turn": _last_turn,
    "all_assistant_messages": _of_roles("assistant"),
    "all_messages": lambda messages: list(range(len(messages))),
    "all_user_and_system_messages": _of_roles("user", "system", "developer"),
}
"""Mask rules that choose messages, as functions to their indices. `all_tokens` needs no choice, and `customized` reads
each message's own weight.
"""
