"""The formats of rows whose answers are compared: a pair, one with a label, or a prompt to which they are drawn.

| format | a row has |
| --- | --- |
| `preference` | `chosen` and `rejected` (or `chosen_response`, `rejected_response`), and the prompt |
| `unpaired` | the fields of another format, and `label` or `kto_tag`: whether the answer is desirable |
| `prompt` | a prompt; the last answer of a list of messages is left out; every field is given to rewards |
| `classification` | the fields of another format, or a prompt, and `label`: a name, a number, true or false |

A prompt is `prompt`, `question`, `query` or `input` (text or messages), `instruction` (with `input`, `history`,
`system`) or `messages` / `conversations`; without one it is what the conversations of both sides have in common. Each
side is text, one message, or a list of messages that may repeat the prompt.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llmtune.config.schema import ObjectiveMethod
from llmtune.data.example import Conversation, Message, Row, Side
from llmtune.data.reading.dialogue import messages_of_text
from llmtune.data.reading.parse import is_conversation
from llmtune.data.rows.field_names import (
    CHAT_COLUMNS,
    LIST_FIELDS,
    SYSTEM_FIELDS,
    TOOL_FIELDS,
    describe_unread,
    unread_of_turns,
)
from llmtune.data.rows.formats import (
    FORMATS,
    Fields,
    Recognize,
    UnusableRowError,
    chat_of,
    conversation_of,
    looks_like,
    read_history,
)
from llmtune.data.rows.row_fields import null_or_missing, read_messages, refuse_unreadable, wrong_type

__all__ = [
    "PREFERENCE_FORMATS",
    "RECOGNIZED_BY",
    "SCORED_FORMATS",
    "PreferenceFormat",
    "every_format",
    "right_answer",
]

SIDE_FIELDS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
"""Names of the two sides of a pair."""
PROMPT_FIELDS = ("prompt", "instruction", "question", "query", "input", *LIST_FIELDS)
"""Names of a pair's prompt; the first with a value counts."""
LABEL_FIELDS = ("label", "kto_tag")
"""Names of the label of an answer."""
LABELS = {"true": True, "1": True, "false": False, "0": False}
"""Labels as a table without types writes them."""

Messages = tuple[Message, ...]


class PreferenceFormat(NamedTuple):
    """One format of rows that judge answers."""

    parse: Callable[[Row], tuple[Conversation, ...]]
    """Makes a conversation for each side of a row. Raises UnusableRowError."""
    recognize: Recognize


# --- pairs


def _parse_preference(row: Row) -> tuple[Conversation, ...]:
    fields = row.fields
    names = _side_names(fields)
    if names is None:
        name = "rejected" if fields.get("chosen") is not None else "chosen"
        raise UnusableRowError(name, null_or_missing(fields, name), "give the row a chosen and a rejected answer")
    chosen, rejected = (_read_side(fields[name], name) for name in names)
    if isinstance(chosen, str) != isinstance(rejected, str):
        problem = f"`{names[0]}` and `{names[1]}` are of two kinds"
        raise UnusableRowError(names[1], problem, "write both as text or both as messages")
    prompt_name = next((name for name in PROMPT_FIELDS if fields.get(name) is not None), None)
    prompt = None if prompt_name is None else _read_prompt(fields, prompt_name)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            fix = "give the row a prompt: where it ends cannot be told from two texts"
            if messages_of_text(chosen, {}) and messages_of_text(rejected, {}):
                columns = ", ".join(f"{name}: {name}" for name in names)
                fix = f"let the source part these dialogues: `columns: {{{columns}}}`"
            raise UnusableRowError("prompt", null_or_missing(fields, "prompt"), fix)
        answers: tuple[Messages, Messages] = ((Message("assistant", chosen),), (Message("assistant", rejected),))
    else:
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        prompt, answers = _split_prompt(prompt, chosen, rejected, names[0])
    if answers[0] == answers[1]:
        raise UnusableRowError(names[1], "the two sides are equal", "write another rejected answer, or delete the row")
    margin = _read_margin(fields.get("margin"))
    is_text = prompt_name is not None and _is_raw_prompt(fields, prompt_name) and isinstance(chosen, str)
    read = {*names, prompt_name or "", "margin", *_READ_BESIDE}
    if prompt_name is not None and isinstance(fields[prompt_name], str):
        read |= {"history", *(["input"] if prompt_name == "instruction" else [])}
    lists = [value for name in (*names, prompt_name or "") if isinstance(value := fields.get(name), (list, tuple))]
    turns = [turn for turns in lists for turn in turns if isinstance(turn, Mapping)]
    unused = tuple(describe_unread(fields, read, unread_of_turns(turns)))
    sides: tuple[Side, Side] = ("chosen", "rejected")
    return tuple(
        dataclasses.replace(
            _sided(chat_of(row, (*_untrained(prompt), *answer)), side, is_text=is_text, unused=unused), margin=margin
        )
        for side, answer in zip(sides, answers, strict=True)
    )


def _read_margin(value: object) -> float:
    if value is None or value == "":
        return 0.0
    try:
        margin = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        margin = math.nan
    if not math.isfinite(margin):
        raise wrong_type("margin", "must be a number", value, "write by how much the chosen side is better, or nothing")
    return margin


_READ_BESIDE = (*TOOL_FIELDS, "chat_template_kwargs", *SYSTEM_FIELDS)


def _side_names(fields: Fields) -> tuple[str, str] | None:
    return next((pair for pair in SIDE_FIELDS if all(fields.get(name) is not None for name in pair)), None)


def _read_side(value: object, name: str) -> str | Messages:
    """A side as text, or as messages."""
    if isinstance(value, str):
        if not value.strip():
            raise UnusableRowError(name, "the answer is empty", "give it a text, or delete the row")
        return value
    return _read_turns(value, name)


def _read_turns(value: object, field: str) -> Messages:
    """One message or a list of them, each with `role` and `content` or with `from` and `value`."""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, (list, tuple)) or not turns:
        fix = 'write text, or [{"role": "assistant", "content": "..."}]'
        raise wrong_type(field, "must be text or messages", value, fix)
    return read_messages(turns, field)


def _read_prompt(fields: Fields, name: str) -> Messages:
    value = fields[name]
    if not isinstance(value, str):
        return _read_turns(value, name)
    if name in LIST_FIELDS:
        raise wrong_type(name, "must be a list of messages", value, "write a list, or name the text `prompt`")
    if name != "instruction":
        return (*read_history(fields.get("history")), Message("user", value))
    # The fields beside an instruction are those of the format `alpaca`, which reads them.
    asked = {key: fields[key] for key in ("instruction", "input", "history") if key in fields}
    return FORMATS["alpaca"].parse(Row("", {**asked, "output": "."})).messages[:-1]


def _split_prompt(
    prompt: Messages | None, chosen: Messages, rejected: Messages, name: str
) -> tuple[Messages, tuple[Messages, Messages]]:
    """The prompt, and what each side adds to it."""
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    repeated = chosen[:common]
    if prompt is None or repeated[-len(prompt) :] == prompt:
        # Whole conversations: a system message may stand before a prompt that is given once more as text.
        prompt, answers = repeated, (chosen[common:], rejected[common:])
    else:
        answers = (chosen, rejected)
    if not prompt and not any(answers):
        return prompt, answers
    for answer in answers:
        if not answer and answers[0] != answers[1]:
            raise UnusableRowError(name, "one side is the beginning of the other", "give each an answer of its own")
        if answer and answer[0].role not in ("assistant", "tool"):
            problem = f"the two sides have different prompts: an answer begins with a message from {answer[0].role}"
            raise UnusableRowError(name, problem, "give both sides the same messages up to their answers")
    if not prompt:
        raise UnusableRowError("prompt", "the two sides have no message in common", "give the row a prompt")
    return prompt, answers


def _recognize_preference(fields: Fields) -> str | None:
    names = next((pair for pair in SIDE_FIELDS if all(name in fields for name in pair)), None)
    return None if names is None else f"`{names[0]}` and `{names[1]}`"


# --- single answers with a label


def _parse_unpaired(row: Row) -> tuple[Conversation, ...]:
    name = next((name for name in LABEL_FIELDS if row.fields.get(name) is not None), LABEL_FIELDS[0])
    side: Side = "desirable" if _read_label(row.fields, name) else "undesirable"
    rest = {field: value for field, value in row.fields.items() if field != name}
    prompt, completion = rest.get("prompt"), rest.get("completion")
    if isinstance(prompt, str) and isinstance(completion, (list, tuple)):
        rest["prompt"] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, (list, tuple)) and isinstance(completion, str):
        rest["completion"] = [{"role": "assistant", "content": completion}]
    format_name = looks_like(rest)
    if format_name in (None, "text"):
        fix = "give the row a prompt and a completion, or messages"
        raise UnusableRowError("completion", null_or_missing(rest, "completion"), fix)
    assert format_name is not None
    conversation = conversation_of(dataclasses.replace(row, fields=rest), format_name)
    if format_name != "prompt-completion":
        *before, answer = conversation.messages
        if answer.role != "assistant":
            problem = f"the last message is from {answer.role}, and it is the answer that has the label"
            raise UnusableRowError("messages", problem, "end the conversation with the answer")
        conversation = dataclasses.replace(conversation, messages=(*_untrained(before), answer))
    return (_sided(conversation, side, is_text=conversation.prompt_is_text, unused=conversation.unused),)


def _read_label(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    if value is None:
        raise UnusableRowError(name, null_or_missing(fields, name), "give the row true or false")
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, (bool, int, str)) else None
    if label is None:
        raise wrong_type(name, "must be true or false", value, "write true for a desirable answer, false for another")
    return label


def _recognize_unpaired(fields: Fields) -> str | None:
    label = next((name for name in LABEL_FIELDS if name in fields), None)
    shown = next((shown for row in FORMATS.values() if (shown := row.recognize(fields))), None)
    return None if label is None or shown is None else f"{shown}, and `{label}`"


# --- prompts whose answers are drawn


def _parse_prompt(row: Row) -> tuple[Conversation, ...]:
    fields = row.fields
    name = next((name for name in PROMPT_FIELDS if fields.get(name) is not None), None)
    if name is None:
        raise UnusableRowError("prompt", null_or_missing(fields, "prompt"), "give the row a prompt")
    messages = _read_prompt(fields, name)
    if name in LIST_FIELDS and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1].role == "assistant":
        raise UnusableRowError(name, "nothing stands before the answer", "give the row a question to answer")
    # No field is unused: rewards are given all of them.
    refuse_unreadable(fields)
    return (_sided(chat_of(row, messages), "prompt", is_text=_is_raw_prompt(fields, name), unused=()),)


def _is_raw_prompt(fields: Fields, name: str) -> bool:
    """Whether a prompt is continued as it is: as in the format `prompt-completion`, texts under these names alone."""
    return name == "prompt" and isinstance(fields["prompt"], str) and not any(key in fields for key in CHAT_COLUMNS)


def _recognize_prompt(fields: Fields) -> str | None:
    name = next((name for name in PROMPT_FIELDS if name in fields), None)
    return None if name is None else f"`{name}`"


# --- rows that are classified


def _parse_classification(row: Row) -> tuple[Conversation, ...]:
    return _whole(row, _read_class(row.fields))


def _parse_unlabelled(row: Row) -> tuple[Conversation, ...]:
    return _whole(row, None)


def _whole(row: Row, label: str | None) -> tuple[Conversation, ...]:
    """All of a row but its label, as one conversation or text."""
    rest = {field: value for field, value in row.fields.items() if field != LABEL_FIELDS[0]}
    row, format_name = dataclasses.replace(row, fields=rest), looks_like(rest)
    if format_name is not None:
        conversation = conversation_of(row, format_name)
        is_text, unused = conversation.prompt_is_text, conversation.unused
    else:
        name = next((name for name in PROMPT_FIELDS if rest.get(name) is not None), None)
        if name is None:
            raise UnusableRowError("text", null_or_missing(rest, "text"), "give the row a text, a prompt or messages")
        is_text, unused = False, tuple(describe_unread(rest, {name, "input", "history", *_READ_BESIDE}))
        value = rest[name]
        if isinstance(value, str) and _is_raw_prompt(rest, name):
            conversation = Conversation(row.source, text=value, loss_weight=row.loss_weight)
        else:
            conversation = chat_of(row, _read_prompt(rest, name))
    return (dataclasses.replace(_sided(conversation, "labelled", is_text=is_text, unused=unused), label=label),)


def _read_class(fields: Fields) -> str:
    """The label as a name: `true` and `false`, a whole number as it is written, or text."""
    value = fields.get(LABEL_FIELDS[0])
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None or value == "":
        raise UnusableRowError(LABEL_FIELDS[0], null_or_missing(fields, LABEL_FIELDS[0]), "give the row its label")
    fix = "a row has one label: give each label that applies a run of its own, with true and false"
    raise wrong_type(LABEL_FIELDS[0], "must be a name, a whole number, true or false", value, fix)


def _recognize_classification(fields: Fields) -> str | None:
    shown = _recognize_whole(fields)
    return None if LABEL_FIELDS[0] not in fields or shown is None else f"{shown}, and `{LABEL_FIELDS[0]}`"


def _recognize_whole(fields: Fields) -> str | None:
    return next((shown for row in FORMATS.values() if (shown := row.recognize(fields))), _recognize_prompt(fields))


ANSWER_FIELDS = ("answer", "solution", "ground_truth", "target", "completion", "response", "output", "chosen")
"""Names of the right answer beside a prompt; the first with a value counts."""


def right_answer(row: Row) -> str | None:
    """The answer that a row of format `prompt` has for its prompt, as text; None where it has none.

    It is the last message where that is the assistant's, else the first of `ANSWER_FIELDS`: text, messages (of which
    the last one counts), or any other value as JSON.

    >>> right_answer(Row("a:1", {"prompt": "2 + 2?", "answer": 4}))
    '4'
    """
    fields = row.fields
    found = next((name for name in LIST_FIELDS if fields.get(name) is not None), None)
    if found is not None:
        last = _read_turns(fields[found], found)[-1]
        if last.role == "assistant":
            return last.content
    value = next((fields[name] for name in ANSWER_FIELDS if fields.get(name) is not None), None)
    if is_conversation(value):
        return _read_turns(value, "answer")[-1].content
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- all


def every_format() -> dict[str, Recognize]:
    """Return the formats of rows on which a run that compares answers can be measured."""
    return {**(RECOGNIZED_BY["kto"] or {})} | {name: row.recognize for name, row in FORMATS.items()}


def _untrained(messages: Sequence[Message]) -> Messages:
    return tuple(dataclasses.replace(message, weight=0.0) for message in messages)


def _sided(conversation: Conversation, side: Side, *, is_text: bool, unused: tuple[str, ...]) -> Conversation:
    if conversation.loss_weight != 1:
        problem = f"a weight of {conversation.loss_weight:g} is not used where answers are compared"
        raise UnusableRowError("weight", problem, "take out the weight of the row or of its source")
    return dataclasses.replace(conversation, side=side, prompt_is_text=is_text, unused=unused)


PREFERENCE_FORMATS: dict[str, PreferenceFormat] = {
    "preference": PreferenceFormat(_parse_preference, _recognize_preference),
    "unpaired": PreferenceFormat(_parse_unpaired, _recognize_unpaired),
    "prompt": PreferenceFormat(_parse_prompt, _recognize_prompt),
    "classification": PreferenceFormat(_parse_classification, _recognize_classification),
    "unlabelled": PreferenceFormat(_parse_unlabelled, _recognize_whole),
}
"""Formats by the name that `data.format` gives them."""

_PAIRS: dict[str, Recognize] = {"preference": _recognize_preference}
RECOGNIZED_BY: dict[ObjectiveMethod, Mapping[str, Recognize] | None] = {
    "sft": None,
    "dpo": _PAIRS,
    "simpo": _PAIRS,
    "orpo": _PAIRS,
    "kto": {**_PAIRS, "unpaired": _recognize_unpaired},
    "grpo": {"prompt": _recognize_prompt},
    "reward": _PAIRS,
    "classification": {"classification": _recognize_classification},
}
"""The formats of rows that each method of `objective` can learn from; None: those of `FORMATS`."""

SCORED_FORMATS: Mapping[str, Recognize] = {
    **_PAIRS, "classification": _recognize_classification, "unlabelled": _recognize_whole
}  # fmt: skip
"""The formats of rows to which a trained model gives scores."""
