"""What a source could say about rows that have the fields of no format, for the fix of the error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from llmtune.data.reading.columns import leaf_columns
from llmtune.data.rows.field_names import SPEAKER_KEYS, TEXT_KEYS, first_turn

__all__ = ["columns_of_turn", "proposed_columns"]

_SPEAKER_KEYS = ("speaker", "author", "sender", "participant", "who", "type")
_TEXT_KEYS = ("parts", "message", "utterance", "body", "say", "response", "msg")
"""Keys of other programs' messages; the first that a message has is proposed."""
_ASKED = (
    *("question", "prompt", "instruction", "query", "problem", "input", "inputs", "user", "human", "request"),
    *("source", "src", "ask", "q", "message", "article", "document", "text", "sentence", "title", "x"),
)
_ANSWERED = (
    *("answer", "response", "completion", "output", "outputs", "solution", "assistant", "bot", "reply", "gpt"),
    *("target", "targets", "tgt", "a", "label", "summary", "translation", "sql", "code", "body", "y"),
)
"""Words in the names of columns that often hold what is asked, and what is answered."""
_DIALOGUES = (
    "dialog",
    "dialogue",
    "dialogs",
    "dialogues",
    "conversation",
    "conversations",
    "turns",
    "utterances",
    "chat",
)
"""The same for a list of texts that take turns."""
_ANSWER_LISTS = ("answers", "answer", "responses", "solutions", "targets", "references", "summaries", "completions")
"""The same for several answers, of which the first is taken."""
_WORSE = (
    *("rejected", "reject", "dispreferred", "non", "negative", "neg", "worse", "worst", "loser", "lose", "losing"),
    *("bad", "incorrect", "wrong", "l", "k"),
)
_BETTER = (
    *("chosen", "preferred", "accepted", "accept", "positive", "pos", "better", "best", "winner", "win", "winning"),
    *("good", "correct", "right", "w", "j"),
)
"""The same for the worse and the better of two answers; `y_w`, `y_l` and `response_j`, `response_k` are usual."""
_DEPTH = 3
"""Levels of objects that are searched for a list of messages."""
_TABLE_ROW = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?:\d+")


def proposed_columns(
    fields: Mapping[str, object], source: str, is_row: Callable[[Mapping[str, object]], bool], *, compares: bool = False
) -> str:
    """The fix for a row without the fields of a format: where its messages seem to be, or what a table's header is.

    is_row: whether fields of these names are those of a format. compares: training compares answers.

    >>> proposed_columns({"body": {"messages": [{"role": "user", "content": "q"}]}}, "a.jsonl:1", lambda fields: False)
    'say in the source where the messages are: `columns: {messages: body.messages}`'
    """
    own = {name.strip().casefold(): name for name in fields if name != name.strip().casefold()}
    if own and is_row({**fields, **{name: fields[given] for name, given in own.items()}}):
        first = next((turn for _, turns in _lists(fields, "", 0) if (turn := first_turn(turns))), {})
        return f"say in the source which they are: {_columns({**own, **(columns_of_turn(first) or {})})}"
    sides = _sides_like(fields)
    if sides is not None:
        return _proposed_sides(fields, *sides, compares=compares)
    if compares:
        return (
            "give each row a prompt and two answers, `chosen` and `rejected`; or, for kto, one answer and its `label`"
        )
    if "input_ids" in fields:
        return "give the texts or messages themselves: rows are tokenized here, by the tokenizer of the model"
    for path, turns in _lists(fields, "", _DEPTH):
        if _are_texts(turns) and set(_words(path)) & {*_DIALOGUES}:
            return f"say in the source that its texts take turns: {_columns({'messages': path})}"
        turn = first_turn(turns)
        if isinstance(turn.get("label"), bool) and isinstance(turn.get("text"), str):
            return "write the parts that are only read as `prompt`, and the part that is trained as `completion`"
        keys = columns_of_turn(turn) if turn else None
        if keys is not None:
            return f"say in the source where the messages are: {_columns({'messages': path, **keys})}"
    pair = _pair_like(fields) or _pair_inside(fields) or _pair_like(leaf_columns(fields))
    if pair is not None:
        return f"say in the source which they are: {_columns({'question': pair[0], 'answer': pair[1]})}"
    header = "check that the first line of the file names its columns, or " if _TABLE_ROW.search(source) else ""
    inside = next((path for path, turns in _lists(fields, "", _DEPTH) if first_turn(turns)), None)
    if inside is not None:
        header += f"write a row for each object in `{inside}`, or "
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    if len(texts) == 1:
        return f"{header}say which texts are trained: 'data.text_column={_as_yaml(texts[0])}'"
    return f"{header}say in the source which they are (`columns: {{question: ..., answer: ...}}`)"


def _proposed_sides(fields: Mapping[str, object], better: str, worse: str, *, compares: bool) -> str:
    """The fix for a row with two answers, of which one is better."""
    rest = {name: value for name, value in fields.items() if name not in (better, worse)}
    names = [name for name in rest if set(_words(name)) & {*_ASKED}]
    messages = next(
        (path for path, turns in _lists(rest, "", _DEPTH) if columns_of_turn(first_turn(turns)) == {}), None
    )
    asked = next(
        (name for word in _ASKED for name in names if word in _words(name) and isinstance(rest[name], str)), None
    )
    name = messages or asked
    prompt = {} if name is None else {"prompt": name}
    if compares:
        return f"say in the source which they are: {_columns({**prompt, 'chosen': better, 'rejected': worse})}"
    is_text = isinstance(fields[better], str)
    columns = {**prompt, "completion": better} if is_text and prompt else {"messages": better}
    return (
        "learn from both answers with `objective.method=dpo`, or say in the source which are trained: "
        f"{_columns(columns)}"
    )


def _columns(columns: Mapping[str, str]) -> str:
    return "`columns: {" + ", ".join(f"{field}: {_as_yaml(name)}" for field, name in columns.items()) + "}`"


def _are_texts(turns: object) -> bool:
    return isinstance(turns, (list, tuple)) and len(turns) > 1 and all(isinstance(turn, str) for turn in turns)


def _words(name: str) -> list[str]:
    """The words of a column's name, in lower case: of `inputText`, `input_text` and `Input Text` alike."""
    return re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name)).strip().lower())


def _sides_like(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """The names of two columns of one type that look like the better and the worse of two answers."""
    given = [name for name, value in fields.items() if isinstance(value, (str, list, tuple, Mapping)) and value]

    def first(known: Sequence[str], others: Sequence[str]) -> str | None:
        return next((name for word in known for name in given if word in _words(name) and name not in others), None)

    worse = first(_WORSE, [])
    better = first(_BETTER, [name for name in given if set(_words(name)) & {*_WORSE}])
    if worse is None or better is None or isinstance(fields[worse], str) != isinstance(fields[better], str):
        return None
    return better, worse


def _as_yaml(name: str) -> str:
    return name if re.fullmatch(r"\w+([ .-]\w+)*", name) else f'"{name}"'


def _pair_like(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """The names of two text columns that look like a question and its answer."""
    texts = [name for name, value in fields.items() if isinstance(value, str) and re.fullmatch(r"[\w. -]+", str(name))]

    def first(known: Sequence[str], other: str | None = None) -> str | None:
        return next((name for word in known for name in texts if word in _words(name) and name != other), None)

    answer = first(_ANSWERED)
    question = first(_ASKED, answer)
    return None if question is None or answer is None else (question, answer)


def _pair_inside(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """The columns of a question and the first of its answers, or of the two texts of an only object (a translation)."""
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    asked = next((name for word in _ASKED for name in texts if word in _words(name)), None)
    read = next((name for name in ("context", "passage") if name in texts and name != asked), None)
    for name in (name for word in _ANSWER_LISTS for name in fields if word in _words(name) and asked is not None):
        value, path = fields[name], name
        if isinstance(value, Mapping):
            value, path = value.get("text"), f"{name}.text"
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
            return f"{{{read}}} {{{asked}}}" if read is not None else str(asked), f"{path}.0"
    objects = [(name, value) for name, value in fields.items() if isinstance(value, Mapping)]
    if len(objects) == 1 and len(objects[0][1]) == 2 and all(isinstance(text, str) for text in objects[0][1].values()):
        first, second = (f"{objects[0][0]}.{key}" for key in objects[0][1])
        return first, second
    return None


def columns_of_turn(turn: Mapping[str, object]) -> dict[str, str] | None:
    """The `columns` under which a message could be read, {} where it needs none, None where it shows no speaker."""
    named = {name: name.strip().casefold() for name in turn}
    columns = {
        field: name
        for field, keys in (("role", SPEAKER_KEYS), ("content", TEXT_KEYS))
        for name, key in named.items()
        if key in keys and name != key
    }
    if len(columns) == 2:
        return columns
    columns = {}
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
