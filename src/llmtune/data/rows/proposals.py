"""What a source could say about rows that have the fields of no format, for the fix of the error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from llmtune.data.rows.field_names import SPEAKER_KEYS, TEXT_KEYS, first_turn

__all__ = ["columns_of_turn", "proposed_columns"]

_SPEAKER_KEYS = ("speaker", "author", "sender", "participant", "who", "type")
_TEXT_KEYS = ("parts", "message", "utterance", "body", "say", "response", "msg")
"""Keys of other programs' messages; the first that a message has is proposed."""
_ASKED = (
    *("question", "prompt", "instruction", "query", "problem", "input", "user", "human", "request"),
    *("source", "src", "ask", "q", "message", "article", "document", "text", "title"),
)
_ANSWERED = (
    *("answer", "response", "completion", "output", "solution", "assistant", "reply", "gpt"),
    *("target", "tgt", "a", "label", "summary", "translation", "sql", "code", "body"),
)
"""Words in the names of columns that often hold what is asked, and what is answered."""
_DEPTH = 3
"""Levels of objects that are searched for a list of messages."""
_TABLE_ROW = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?:\d+")


def proposed_columns(fields: Mapping[str, object], source: str) -> str:
    """The fix for a row without the fields of a format: where its messages seem to be, or what a table's header is.

    >>> proposed_columns({"body": {"messages": [{"role": "user", "content": "q"}]}}, "a.jsonl:1")
    'say in the source where the messages are: `columns: {messages: body.messages}`'
    """
    if {"chosen", "rejected"} <= fields.keys():
        is_text = isinstance(fields["chosen"], str)
        columns = "prompt: prompt, completion: chosen" if is_text else "messages: chosen"
        return (
            "learn from both answers with `objective.method=dpo`, or say in the source which are trained: "
            f"`columns: {{{columns}}}`"
        )
    if "input_ids" in fields:
        return "give the texts or messages themselves: rows are tokenized here, by the tokenizer of the model"
    for path, turns in _lists(fields, "", _DEPTH):
        turn = first_turn(turns)
        if not turn:
            continue
        keys = columns_of_turn(turn)
        if keys is not None:
            named = ", ".join(f"{field}: {name}" for field, name in {"messages": path, **keys}.items())
            return f"say in the source where the messages are: `columns: {{{named}}}`"
    pair = _pair_like(fields)
    if pair is not None:
        named = f"question: {_as_yaml(pair[0])}, answer: {_as_yaml(pair[1])}"
        return f"say in the source which they are: `columns: {{{named}}}`"
    header = "check that the first line of the file names its columns, or " if _TABLE_ROW.search(source) else ""
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    if len(texts) == 1:
        return f"{header}say which texts are trained: 'data.text_column={_as_yaml(texts[0])}'"
    return f"{header}say in the source which they are (`columns: {{question: ..., answer: ...}}`)"


def _as_yaml(name: str) -> str:
    return name if re.fullmatch(r"\w+([ .-]\w+)*", name) else f'"{name}"'


def _pair_like(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """The names of two text columns that look like a question and its answer."""
    texts = [name for name, value in fields.items() if isinstance(value, str) and re.fullmatch(r"[\w. -]+", str(name))]
    words = {
        name: re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name)).strip().lower()) for name in texts
    }

    def first(known: Sequence[str], other: str | None = None) -> str | None:
        return next((name for word in known for name in texts if word in words[name] and name != other), None)

    answer = first(_ANSWERED)
    question = first(_ASKED, answer)
    return None if question is None or answer is None else (question, answer)


def columns_of_turn(turn: Mapping[str, object]) -> dict[str, str] | None:
    """The `columns` under which a message could be read, {} where it needs none, None where it shows no speaker."""
    columns: dict[str, str] = {}
    if not any(turn.get(key) is not None for key in SPEAKER_KEYS):
        speaker = next((key for key in _SPEAKER_KEYS if turn.get(key) is not None), None)
        if speaker is None:
            return None
        inside = turn[speaker]
        columns["role"] = f"{speaker}.role" if isinstance(inside, Mapping) and "role" in inside else speaker
    text = next((key for key in (*TEXT_KEYS, *_TEXT_KEYS) if turn.get(key) is not None), None)
    if text is None:
        return None
    inside = turn[text]
    if isinstance(inside, Mapping) and "parts" in inside:
        columns["content"] = f"{text}.parts"
    elif text not in TEXT_KEYS:
        columns["content"] = text
    return columns


def _lists(fields: Mapping[str, object], prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    """Every list inside objects, with its dotted path."""
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, (list, tuple)):
            yield path, value
        elif isinstance(value, Mapping) and depth:
            yield from _lists(value, f"{path}.", depth - 1)
