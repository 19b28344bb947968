"""What there is to say about a rendered row beside its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple, cast

from llmtune.data.example import REASONING_FIELDS, Conversation
from llmtune.data.rendering.encoding import Encoded
from llmtune.data.rendering.spans import Rendering

__all__ = ["RowWarning", "lost_content", "text_notes"]

_PLAIN_NAME = re.compile(r"[\w.-]+")
"""Names that no template has a reason to write in another way."""

_THOUGHT_END = "</think>"
"""Where a thought written inside an answer ends; templates cut thoughts out of earlier answers."""


class RowWarning(NamedTuple):
    """Something about a rendered row that its reader should know: a code to count by, and a sentence."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def text_notes(encoded: Encoded, eos_id: int | None, bos_id: int | None) -> list[RowWarning]:
    """Name control strings in the content, a doubled begin-of-text token and characters the tokenizer does not know."""
    notes = []
    if encoded.hostile:
        shown = ", ".join(sorted(set(encoded.hostile))[:5])
        notes.append(RowWarning("control-string", f"spells control tokens, encoded as plain text: {shown}"))
    if bos_id is not None and bos_id != eos_id and encoded.ids[:2] == [bos_id, bos_id]:
        notes.append(RowWarning("doubled-bos", "begins with two begin-of-text tokens"))
    if encoded.unknown:
        notes.append(
            RowWarning("unknown-characters", f"holds characters the tokenizer does not know ({encoded.unknown} tokens)")
        )
    return notes


def lost_content(conversation: Conversation, whole: Rendering) -> list[RowWarning]:
    """Name what the template leaves out of the row: messages, parts of them, reasoning, tool calls, tool descriptions."""
    notes = []
    for index, message in enumerate(conversation.messages):
        name = f"message {index + 1} ({message.role})"
        first, last = whole.extents.get(index, (0, 0))
        shown = whole.text[first:last]
        calls = [
            called for call in cast("list[object]", message.extra.get("tool_calls") or []) if (called := _called(call))
        ]
        content = message.content.strip()
        reasoning = next((message.extra[name] for name in REASONING_FIELDS if message.extra.get(name)), None)
        if content and first == last:
            notes.append(RowWarning("not-rendered", f"the template leaves out {name}"))
        elif calls and not all(call in shown for call in calls):
            notes.append(RowWarning("not-rendered", f"the template leaves out the tool calls of {name}"))
        elif content not in shown and not any(
            json.dumps(content, ensure_ascii=one)[1:-1] in shown for one in (False, True)
        ):
            notes.append(_changed(content, shown, name))
        if isinstance(reasoning, str) and reasoning.strip() and reasoning.strip() not in whole.text:
            notes.append(
                RowWarning("reasoning-dropped", f"the template leaves out the reasoning of message {index + 1}")
            )
    described = [called for tool in conversation.tools if (called := _called(tool))]
    if any(called not in whole.text for called in described):
        notes.append(RowWarning("tools-dropped", "the template leaves out descriptions of tools"))
    return notes


def _called(call: object) -> str | None:
    """The name of the function of a tool call or a tool description."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and _PLAIN_NAME.fullmatch(name) else None


def _changed(content: str, shown: str, name: str) -> RowWarning:
    """What to say of a content that does not stand in the rendering letter by letter."""
    _, closing, answer = content.rpartition(_THOUGHT_END)
    if closing and answer.strip() in shown:
        return RowWarning("reasoning-dropped", f"the template leaves out or moves the thought in {name}")
    place = next((place for place, line in enumerate(content.splitlines()) if line.strip() not in shown), 0)
    return RowWarning(
        "content-changed", f"the template leaves out or changes part of {name}, from line {place + 1} of it"
    )
