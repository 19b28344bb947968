"""Messages as chat templates read them, and the messages that each mask rule trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from llmtune.data.example import REASONING_FIELDS, Message
from llmtune.data.rendering.provenance import DATA, with_origin

__all__ = ["SELECTIONS", "message_fields", "traced_fields"]

KNOWN_ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "model", "ipython", "observation"}
)
"""Roles from which a template may build its control tokens; any other role is text of the row."""

HEADER_FIELDS = frozenset({"name", "tool_call_id", "id", "recipient"})
"""Fields of a message that templates write into headers: text of the row, but no part of the message's answer."""


def message_fields(message: Message) -> dict[str, object]:
    """Return a message as the dictionary a chat template reads.

    Fields without a value are left out, arguments of tool calls given as JSON text become objects (templates expect
    objects; inference servers do the same), and reasoning is given under every name that templates read.
    """
    extra = {key: value for key, value in message.extra.items() if value is not None}
    if "tool_calls" in extra:
        extra["tool_calls"] = [_with_object_arguments(call) for call in cast("list[object]", extra["tool_calls"])]
    reasoning = next((extra[name] for name in REASONING_FIELDS if name in extra), None)
    if reasoning is not None:
        extra = {"thinking": reasoning, **extra, "reasoning_content": reasoning}
    return {"role": message.role, "content": message.content, **extra}


def _with_object_arguments(call: object) -> object:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_object_arguments(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            value = json.loads(call["arguments"])
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": value} if isinstance(value, dict) else call
    return call


def traced_fields(fields: Mapping[str, object], index: int) -> dict[str, object]:
    """Return the result of `message_fields` with origins: message `index`, or DATA for texts of headers."""
    traced = {key: with_origin(value, DATA if key in HEADER_FIELDS else index) for key, value in fields.items()}
    # Templates build control tokens such as <|user|> from a role; an unknown role must not be able to name one.
    role = fields["role"]
    traced["role"] = role if role in KNOWN_ROLES else with_origin(role, DATA)
    return traced


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
"""Mask rules that choose messages, as functions to their indices; `all_tokens` and `customized` choose by token."""
