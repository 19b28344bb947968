"""Warnings about a rendered row: suspicious texts, and content that the template leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, cast

from llmtune.data.example import REASONING_FIELDS, Conversation
from llmtune.data.rendering.encoding import Encoded
from llmtune.data.rendering.rendering import Rendering

__all__ = ["UNSTABLE_WAYS_OUT", "RowWarning", "lost_content", "text_warnings"]

_PLAIN_NAME = re.compile(r"[\w.-]+")
"""Names that a template has no reason to escape."""

_THOUGHT_END = "</think>"
"""End of a thought that is written inside an answer; templates cut thoughts out of earlier answers."""


UNSTABLE_WAYS_OUT = (
    "for earlier answers make an example of each (`data.one_example_per_turn=true`), or train the last answers only "
    "(`data.train_on=last_assistant_message`); for last answers turn thinking off where the template can "
    "(`data.template_args={enable_thinking: false}`), or give another template (`model.chat_template=FILE`)"
)
"""What to do about answers that are not trained because the template gives another prompt for them.

A last answer has the same prompt in an example of its own, so the ways out for earlier answers do nothing for it.
"""


class RowWarning(NamedTuple):
    """A warning about a rendered row: a code to count by, and a sentence."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def text_warnings(encoded: Encoded, eos_id: int | None, bos_id: int | None) -> list[RowWarning]:
    """Warn about control strings in the content, a doubled begin-of-text token and characters without a token."""
    warnings = []
    if encoded.spelled:
        shown = ", ".join(sorted(set(encoded.spelled))[:5])
        warnings.append(RowWarning("control-string", f"spells control tokens, encoded as plain text: {shown}"))
    if bos_id is not None and bos_id != eos_id and encoded.ids[:2] == [bos_id, bos_id]:
        warnings.append(RowWarning("doubled-bos", "begins with two begin-of-text tokens"))
    if encoded.unknown:
        text = f"holds characters the tokenizer does not know ({encoded.unknown} tokens)"
        warnings.append(RowWarning("unknown-characters", text))
    return warnings


def lost_content(conversation: Conversation, rendering: Rendering, first: int = 0) -> list[RowWarning]:
    """Warn about content that the template leaves out: messages, parts of them, reasoning, tool calls, tools.

    Messages before `first` (an index) are context, of which the template may leave out what it likes.
    """
    warnings = []
    for index, message in list(enumerate(conversation.messages))[first:]:
        name = f"message {index + 1} ({message.role})"
        start, stop = rendering.extents.get(index, (0, 0))
        shown = rendering.text[start:stop]
        calls = _function_names(cast("list[object]", message.extra.get("tool_calls") or []))
        content = message.content.strip()
        reasoning = next((message.extra[field] for field in REASONING_FIELDS if message.extra.get(field)), None)
        if content and start == stop:
            warnings.append(RowWarning("not-rendered", f"the template leaves out {name}"))
        elif not all(call in shown for call in calls):
            warnings.append(RowWarning("not-rendered", f"the template leaves out the tool calls of {name}"))
        elif content not in shown and not any(
            json.dumps(content, ensure_ascii=is_ascii)[1:-1] in shown for is_ascii in (False, True)
        ):
            warnings.append(_changed_warning(content, shown, name))
        if isinstance(reasoning, str) and reasoning.strip() and reasoning.strip() not in shown:
            text = f"the template leaves out the reasoning of message {index + 1}"
            warnings.append(RowWarning("reasoning-dropped", text))
    if any(tool not in rendering.text for tool in _function_names(conversation.tools)):
        warnings.append(RowWarning("tools-dropped", "the template leaves out descriptions of tools"))
    return warnings


def _function_names(calls: Iterable[object]) -> Iterator[str]:
    """The names of the functions of tool calls or tool descriptions."""
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and _PLAIN_NAME.fullmatch(name):
            yield name


def _changed_warning(content: str, shown: str, name: str) -> RowWarning:
    """The warning for a content that is not in the rendering letter by letter."""
    _, closing, answer = content.rpartition(_THOUGHT_END)
    if closing and answer.strip() in shown:
        return RowWarning("reasoning-dropped", f"the template leaves out or moves the thought in {name}")
    lines = enumerate(content.splitlines(), start=1)
    number = next((number for number, line in lines if line.strip() not in shown), 1)
    return RowWarning("content-changed", f"the template leaves out or changes part of {name}, from line {number} of it")
