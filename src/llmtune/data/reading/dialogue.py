r"""A conversation written as one text, with a speaker before each turn, as a list of messages.

| text | of |
| --- | --- |
| `\n\nHuman: Hi\n\nAssistant: Hello` | hh-rlhf |
| `USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>\n\n\nFUNCTION RESPONSE: {}` | glaive-function-calling-v2 |
| `### Human: Hi### Assistant: Hello` | openassistant-guanaco |
| `User: Hi\nAssistant: Hello` | many |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["SPEAKERS", "alternating", "messages_of_text"]

SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "function response": "tool",
    "tool": "tool",
}
"""Names before a colon that begin a turn, and their roles."""

_BEFORE = (r"\s*###\s*", r"(?:\A\s*|\n[ \t]*\n\s*)", r"(?:\A\s*|\n[ \t]*)")
"""What stands before a speaker: a heading, an empty line, a line's end. The first that marks two turns is taken."""
_END_MARKS = re.compile(r"(\s*(<\|endoftext\|>|<\|im_end\|>|</s>))+\s*\Z")


def messages_of_text(text: str, roles: Mapping[str, str]) -> list[dict[str, object]] | None:
    r"""The messages of a dialogue, or None for a text without two turns that have a speaker.

    roles: the role of each further speaker, in lower case; it counts before `SPEAKERS`. Text before the first speaker
    is a system message. Tokens of other models at the end of a turn are left out.

    >>> messages_of_text("Human: Hi\n\nAssistant: Hello", {})
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    known = SPEAKERS | dict(roles)
    names = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    for before in _BEFORE:
        marks = list(re.finditer(rf"{before}({names})[ \t]*:[ \t]*", text, re.IGNORECASE))
        if len(marks) < 2:
            continue
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        head = text[: marks[0].start()].strip()
        turns: list[dict[str, object]] = [
            {"role": known[mark.group(1).lower()], "content": _END_MARKS.sub("", text[mark.end() : end]).strip()}
            for mark, end in zip(marks, ends, strict=True)
        ]
        return [{"role": "system", "content": head}, *turns] if head else turns
    return None


def alternating(texts: Sequence[str]) -> list[dict[str, object]]:
    """The messages of a list of plain texts: the user's first, then by turns the assistant's and the user's."""
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]
