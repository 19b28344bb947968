"""The names of fields by which rows and their turns are read, and the fields that nothing reads.

| keys of a turn | of |
| --- | --- |
| `role` and `content` | the `messages` format |
| `from` and `value` | the `sharegpt` format |
| one of `role`, `from` and one of `content`, `value`, `text` | mixtures of the two |
| a question and an answer, such as `input` and `output` (`TURN_PAIRS`) | two messages in one turn |

Turns of one file, and of one row, may have different keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from llmtune.data.example import REASONING_FIELDS

__all__ = [
    "ALPACA_NAMES",
    "CHAT_COLUMNS",
    "EXTRA_TEXTS",
    "LIST_FIELDS",
    "MARKS",
    "PAIRS",
    "RAW_PAIRS",
    "ROLES",
    "SPEAKER_KEYS",
    "SPEAKER_ROLES",
    "SYSTEM_FIELDS",
    "TEXT_KEYS",
    "TOOL_FIELDS",
    "WORDS_FOR_NOTHING",
    "TurnKeys",
    "answer_field",
    "describe_turn",
    "describe_unread",
    "first_turn",
    "is_raw_text",
    "is_sharegpt_turn",
    "list_field_of",
    "pair_of",
    "read_fields_of",
    "renamed_speakers",
    "role_of",
    "turn_keys_of",
    "turn_pair_of",
    "unread_of_turns",
    "unused_fields",
    "without_blocks",
]

LIST_FIELDS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "solution"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("instruction", "answer"),
    ("instruction", "completion"),
    ("input", "output"),
    ("input", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
)
"""Names of a prompt and its completion; the first pair that a row has counts."""
RAW_PAIRS = (("prompt", "completion"), ("prompt", "response"))
"""Pairs of texts that are joined as they are, without a chat template; the others are a user's and an assistant's."""
ALPACA_NAMES = (("output", "response"), ("input", "context"))
"""Fields of the `alpaca` format that have two names; the first one counts."""
SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
CHAT_COLUMNS = (*SYSTEM_FIELDS, *REASONING_FIELDS, "history", "chat_template_kwargs")
"""Columns beside a prompt and its completion that only a conversation has."""
TOOL_FIELDS = ("tools", "functions")
"""Fields of a row with descriptions of tools; the second one is OpenAI's first name for them."""
MARKS = ("train", "trainable", "training", "loss", "loss_mask")
"""Switches of a message by which other tools say whether it is trained."""
WORDS_FOR_NOTHING = frozenset({"nan", "NaN", "NAN", "<NA>", "NULL", "None"})
"""What programs write as a text where a value is missing."""
ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKER_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""The role of each well-known speaker, under whatever key a turn names it; upper and lower case are the same."""
COMMON_SPEAKERS = frozenset({"human", "gpt", *ROLES})
"""Speakers whose role is not said: those of the formats' own descriptions."""

SPEAKER_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
TURN_PAIRS = (
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("human", "gpt"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
)
"""Keys of a turn that holds a user's message and the answer to it."""

EXTRA_TEXTS = ("name", "tool_call_id", *REASONING_FIELDS)
_FIELDS_BESIDE_A_PAIR = ("weight", *MARKS, *REASONING_FIELDS)
UNUSED_SHOWN = 12
"""Unread fields of one row that are described; a file whose keys are data has no end of them."""


def list_field_of(fields: Mapping[str, object]) -> str | None:
    """The name of the field that holds a row's list of messages, or None."""
    return next((name for name in LIST_FIELDS if fields.get(name) is not None), None)


def pair_of(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """The names of a row's prompt and completion."""
    return next((pair for pair in PAIRS if all(fields.get(name) is not None for name in pair)), None)


def is_raw_text(fields: Mapping[str, object]) -> bool:
    """Whether a prompt and its completion are joined as text: a pair of `RAW_PAIRS`, without a column of a chat."""
    pair = pair_of(fields)
    return (
        pair in RAW_PAIRS
        and all(isinstance(fields[name], str) for name in pair)
        # A column that only a chat has makes all rows of its file conversations, also those in which it is empty.
        and not any(name in fields for name in CHAT_COLUMNS)
    )


def answer_field(fields: Mapping[str, object], format_name: str) -> str | None:
    """The name of the field that holds the last answer of a row as text, or None where it is in a list of messages."""
    if format_name == "alpaca":
        return next((name for name in ALPACA_NAMES[0] if fields.get(name) is not None), None)
    pair = pair_of(fields) if format_name == "prompt-completion" else None
    return pair[1] if pair is not None and isinstance(fields[pair[1]], str) else None


def _tools_name(fields: Mapping[str, object]) -> str:
    return next((name for name in TOOL_FIELDS if fields.get(name)), TOOL_FIELDS[0])


# --- keys of turns


class TurnKeys(NamedTuple):
    """The keys under which a turn says who speaks, and what."""

    speaker: str
    text: str


def turn_keys_of(turn: Mapping[str, object]) -> TurnKeys:
    """The keys of a turn; where it has none, those that go with its other key."""
    if turn.get("role") is not None and turn.get("content") is not None:
        return TurnKeys("role", "content")  # nearly all turns
    speaker = next((key for key in SPEAKER_KEYS if turn.get(key) is not None), None)
    speaker = speaker or next((key for key in SPEAKER_KEYS if key in turn), None)
    text = next((key for key in TEXT_KEYS if turn.get(key) is not None), None)
    text = text or next((key for key in TEXT_KEYS if key in turn), None)
    if speaker is None:
        speaker = "from" if text == "value" else "role"
    return TurnKeys(speaker, text or ("value" if speaker == "from" else "content"))


def turn_pair_of(turn: Mapping[str, object]) -> tuple[str, str] | None:
    """The keys of a turn that holds a question and its answer, or None."""
    if turn.get("role") is not None or turn.get("from") is not None:
        return None
    return next((pair for pair in TURN_PAIRS if all(turn.get(key) is not None for key in pair)), None)


def read_fields_of(turn: Mapping[str, object]) -> frozenset[str]:
    """The fields of a turn that are read."""
    pair = turn_pair_of(turn)
    return _fields_beside(turn_keys_of(turn)) if pair is None else frozenset({*pair, *_FIELDS_BESIDE_A_PAIR})


@functools.cache
def _fields_beside(keys: TurnKeys) -> frozenset[str]:
    """The fields that are read of a turn with these keys."""
    return frozenset({*keys, "weight", *MARKS, *EXTRA_TEXTS, "tool_calls", "function_call"})


def first_turn(turns: object) -> Mapping[str, object]:
    """The first object in a list of turns, or an empty one."""
    given = turns if isinstance(turns, (list, tuple)) else ()
    return next((turn for turn in given if isinstance(turn, Mapping)), {})


def is_sharegpt_turn(turn: Mapping[str, object]) -> bool:
    """Whether a turn says under `from` who speaks."""
    return "from" in turn and "role" not in turn


def describe_turn(turn: Mapping[str, object]) -> str:
    """The keys by which a turn is read, as text for users; other keys where there are none of those.

    >>> describe_turn({"role": "user", "value": "q"}), describe_turn({"input": "q", "output": "a"})
    ('`role` and `value`', '`input` and `output`')
    >>> describe_turn({"author": "user", "message": "q"})
    'neither `role` nor `content`, but `author`, `message`'
    """
    names: tuple[str, ...] = turn_pair_of(turn) or turn_keys_of(turn)
    if not turn or any(name in turn for name in names):
        return " and ".join(f"`{name}`" for name in names)
    others = ", ".join(f"`{name}`" for name in list(turn)[:4])
    return f"neither `{names[0]}` nor `{names[1]}`, but {others}"


def role_of(speaker: str) -> str | None:
    """The role of a well-known speaker, or None.

    >>> role_of("user"), role_of("Human"), role_of("AI"), role_of("narrator")
    ('user', 'user', 'assistant', None)
    """
    return SPEAKER_ROLES.get(speaker) or SPEAKER_ROLES.get(speaker.strip().casefold())


def renamed_speakers(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The speakers of a row's messages that are read as a role of another name, with it."""
    name = list_field_of(fields)
    turns = fields[name] if name is not None else ()
    for turn in turns if isinstance(turns, (list, tuple)) else ():
        speaker = turn.get(turn_keys_of(turn).speaker) if isinstance(turn, Mapping) else None
        role = role_of(speaker) if isinstance(speaker, str) and speaker not in COMMON_SPEAKERS else None
        if isinstance(speaker, str) and role is not None:
            yield speaker, role


# --- blocks


_BLOCKS = ("thinking", "tool_use", "tool_result")


def without_blocks(turn: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """The turn without the blocks that Anthropic writes into its content; as it is where it has none.

    `text` is content, `thinking` the reasoning of the message, `tool_use` a call of it, and `tool_result` a message of
    the tool before it. Other blocks stay in the content.
    """
    content = turn.get("content")
    blocks = content if isinstance(content, (list, tuple)) else ()
    if not any(_type_of(block) in _BLOCKS for block in blocks):
        yield turn
        return
    rest: list[object] = []
    changed = dict(turn)
    calls: list[object] = []
    for block in blocks:
        kind = _type_of(block)
        if kind == "tool_result":
            result = block.get("content")
            yield {
                "role": "tool",
                "content": "" if result is None else result,
                "tool_call_id": block.get("tool_use_id"),
            }
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            call = {"type": "function", "id": block.get("id"), "function": function}
            calls.append({key: value for key, value in call.items() if value is not None})
        elif kind == "thinking":
            before, thought = changed.get("thinking"), block.get("thinking") or ""
            both_are_text = isinstance(before, str) and isinstance(thought, str)
            changed["thinking"] = f"{before}{thought}" if both_are_text else thought
        else:
            rest.append(block)
    if calls:
        changed["tool_calls"] = calls
    if rest or calls or changed.get("thinking"):
        yield {**changed, "content": rest or None}


def _type_of(block: object) -> object:
    return block.get("type") if isinstance(block, Mapping) else None


# --- fields that are not read


def unused_fields(fields: Mapping[str, object], format_name: str, text_column: str) -> Iterator[str]:
    """Describe the fields of a row and of its messages that nothing reads; the switches come first."""
    lists: list[object] = []
    read = {"weight"}
    # In any other type it is no reasoning, but a switch or a number that goes by the same name.
    reasoning = {name for name in REASONING_FIELDS if isinstance(fields.get(name), str)}
    if format_name == "text":
        read.add(text_column)
    else:
        read |= {_tools_name(fields), "chat_template_kwargs", *SYSTEM_FIELDS}
    if format_name in ("messages", "sharegpt"):
        name = list_field_of(fields) or LIST_FIELDS[0]
        read.add(name)
        lists = [fields.get(name)]
    elif format_name == "alpaca":
        read |= {"instruction", "history", *reasoning}
        read |= {first if fields.get(first) is not None else other for first, other in ALPACA_NAMES}
    elif format_name == "prompt-completion":
        pair = pair_of(fields) or ()
        # A list of text parts is a text.
        lists = [fields[name] for name in pair if first_turn(fields[name]).keys() & {"role", "from"}]
        if not any(isinstance(value, (list, tuple)) for value in lists):
            read |= {"history", *reasoning}
        read |= {*pair}
        if is_raw_text(fields):
            read -= {*TOOL_FIELDS}  # plain text, without a template that could write them
    turns = [turn for turns in lists if isinstance(turns, (list, tuple)) for turn in turns if isinstance(turn, Mapping)]
    if turns and (turns[0].get("role") or turns[0].get("from")) in ("system", "developer"):
        read -= {*SYSTEM_FIELDS}  # the conversation has a system prompt of its own
    yield from describe_unread(fields, read, unread_of_turns(turns))


def unread_of_turns(turns: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """The fields of messages that nothing reads, with one value of each."""
    return {name: value for turn in turns for name, value in _unread(turn, read_fields_of(turn))}


def describe_unread(
    fields: Mapping[str, object], read: AbstractSet[str], in_turns: Mapping[str, object] | None = None
) -> Iterator[str]:
    """Describe the fields of a row beside those `read`, and those `in_turns`, of its messages; switches come first."""
    beside = dict(_unread(fields, read))
    for is_switch in (True, False):
        for where, unread in ((" of a message", in_turns or {}), ("", beside)):
            names = sorted(str(name) for name, value in unread.items() if isinstance(value, bool) == is_switch)
            for name in names[:UNUSED_SHOWN]:
                yield f"{'switch ' if is_switch else ''}`{name[:60]}`{where}"


def _unread(fields: Mapping[str, object], read: AbstractSet[str]) -> Iterator[tuple[str, object]]:
    """Other fields than `read` with a value: an empty one loses nothing, and tables give every row all columns."""
    return ((name, value) for name, value in fields.items() if name not in read and value not in (None, "", [], {}))
