"""Give the fields of a row the names of a format, and the speakers of its messages the roles, as its source says."""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Iterator, Mapping, Sequence

from llmtune.config.schema import SourceConfig
from llmtune.config.sources import TURN_COLUMNS, columns_of, is_template
from llmtune.data.example import Row
from llmtune.data.reading.dialogue import alternating, messages_of_text
from llmtune.data.reading.parse import BadRow, Unreadable, parse_json_value

__all__ = ["leaf_columns", "missing_columns", "renamed"]

REPLACED = "(its place is taken by `columns`)"
_MESSAGE_FIELDS = ("messages", "conversations", "conversation")
_SIDE_FIELDS = ("chosen", "rejected", "chosen_response", "rejected_response")
"""Answers that are compared: also a whole dialogue in one text."""
_LIST_FIELDS = (*_MESSAGE_FIELDS, "history", "tools")
_SPEAKER_KEYS = ("role", "from")
_MISSING = object()

Fields = Mapping[str, object]


def renamed(row: Row, source: SourceConfig) -> Row | BadRow:
    """The row under the names of a format: `columns` and `roles` of its source are applied.

    A column that is read under another name is no longer there under its own. One that the row lacks gives no field,
    and an empty text inside a template. BadRow for a list given as JSON text that is none.
    """
    of_row = {field: text for field, text in source.columns.items() if field not in TURN_COLUMNS}
    of_turns = {field: text for field, text in source.columns.items() if field in TURN_COLUMNS}
    roles = {name.casefold(): role for name, role in source.roles.items()}
    fields: dict[str, object] = {}
    taken: set[str] = set()
    for field, text in of_row.items():
        taken |= {name if name in row.fields else name.split(".")[0] for name in columns_of(text)}
        value = _joined(row.fields, text) if is_template(text) else _value(row.fields, text)
        if field in _LIST_FIELDS and isinstance(value, str) and value.lstrip()[:1] == "[":  # a cell of a table
            parsed = parse_json_value(row.source, value.encode("utf-8", "surrogateescape"))
            if isinstance(parsed, BadRow):
                return parsed._replace(field=text)
            (value,) = parsed
        if field in _SIDE_FIELDS and isinstance(value, str):
            value = messages_of_text(value, roles) or value
        elif field in _MESSAGE_FIELDS:
            value = _as_messages(value, roles)
            if value is None:
                problem = "the text is no list of messages, and no two of its turns begin with a speaker"
                fix = "name a column with messages, or give its speakers with `roles`: {prompter: user}"
                return BadRow(row.source, text, problem, fix)
        if value is not _MISSING:
            fields[field] = value
    rest = {name: value for name, value in row.fields.items() if name not in taken}
    # Kept under a name that nothing reads, so that it is named among the unused fields.
    replaced = {f"{name} {REPLACED}": rest.pop(name) for name in list(rest) if name in fields}
    named = {name: _turns(value, of_turns, roles) for name, value in (rest | fields).items()}
    return Row(row.source, named | replaced, row.loss_weight)


def _value(fields: object, path: str) -> object:
    """The value at a dotted path: through objects by name, through lists by index; `_MISSING` where there is none.

    >>> _value({"answers": {"text": ["Pisa"]}}, "answers.text.0"), _value({"a.b": 1}, "a.b")
    ('Pisa', 1)
    """
    if isinstance(fields, Mapping):
        if path in fields:
            return fields[path]
        for end in (at for at, mark in enumerate(path) if mark == "."):
            if path[:end] in fields:
                return _value(fields[path[:end]], path[end + 1 :])
    elif isinstance(fields, (list, tuple)):
        name, _, rest = path.partition(".")
        if name.isdecimal() and int(name) < len(fields):
            return _value(fields[int(name)], rest) if rest else fields[int(name)]
    return _MISSING


def _joined(fields: Fields, template: str) -> object:
    """The text of a template; `_MISSING` where the row has none of its columns.

    A null or missing column is an empty text. Where one is empty, white space at both ends goes: there `{context}` and
    the line break after it stand for nothing.
    """
    names = columns_of(template)
    values = {name: _value(fields, name) for name in names}
    if all(value is _MISSING for value in values.values()):
        return _MISSING
    unreadable = next((value for value in values.values() if isinstance(value, Unreadable)), None)
    if unreadable is not None:
        return unreadable
    texts = {name: "" if value is None or value is _MISSING else _as_text(value) for name, value in values.items()}
    joined = "".join(
        literal + ("" if name is None else texts[name]) for literal, name, _, _ in string.Formatter().parse(template)
    )
    return joined if all(texts.values()) else joined.strip()


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_messages(value: object, roles: Mapping[str, str]) -> object:
    """A dialogue in one text, or a list of plain texts, as a list of messages; None for a text that is no dialogue."""
    if isinstance(value, str) and value.strip():
        return messages_of_text(value, roles)
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, str) for turn in value):
        return alternating(value)
    return _MISSING if value is None else value


def _turns(value: object, columns: Mapping[str, str], roles: Mapping[str, str]) -> object:
    """A list of messages with its keys and roles renamed; any other value as it is."""
    if not isinstance(value, (list, tuple)) or not any(isinstance(turn, Mapping) for turn in value):
        return value
    return [_turn(turn, columns, roles) if isinstance(turn, Mapping) else turn for turn in value]


def _turn(turn: Fields, columns: Mapping[str, str], roles: Mapping[str, str]) -> dict[str, object]:
    found = {field: value for field, name in columns.items() if (value := _value(turn, name)) is not _MISSING}
    taken = {name if name in turn else name.split(".")[0] for name in columns.values()}
    changed = {key: value for key, value in turn.items() if key not in taken} | found
    for key in _SPEAKER_KEYS:
        speaker = changed.get(key)
        if isinstance(speaker, str):
            changed[key] = roles.get(speaker.casefold(), speaker)
    return changed


def leaf_columns(fields: Fields, prefix: str = "", depth: int = 2) -> dict[str, object]:
    """The fields of a row, those of objects in it under their dotted names, `depth` levels deep.

    >>> leaf_columns({"id": 1, "mail": {"body": "Hi", "to": {"name": "Kim"}}})
    {'id': 1, 'mail.body': 'Hi', 'mail.to.name': 'Kim'}
    """
    leaves: dict[str, object] = {}
    for name, value in fields.items():
        inside = leaf_columns(value, f"{prefix}{name}.", depth - 1) if isinstance(value, Mapping) and depth else {}
        leaves |= inside or {f"{prefix}{name}": value}
    return leaves


def missing_columns(rows: Sequence[Row], source: SourceConfig) -> Iterator[tuple[str, str]]:
    """(what is missing, what is there instead) for each column and key of messages that no unrenamed row has."""
    paths = [text for field, text in source.columns.items() if field not in TURN_COLUMNS and not is_template(text)]
    lists = [value for row in rows for value in (*row.fields.values(), *(_value(row.fields, path) for path in paths))]
    turns = [turn for value in lists if isinstance(value, (list, tuple)) for turn in value if isinstance(turn, Mapping)]
    for field, text in source.columns.items():
        if field in TURN_COLUMNS and field not in ("role", "content"):
            continue  # few messages have calls
        owners: Sequence[Fields] = turns if field in TURN_COLUMNS else [row.fields for row in rows]
        for name in columns_of(text):
            if any(_value(fields, name) is not _MISSING for fields in owners):
                continue
            known = list(dict.fromkeys(key for fields in owners for key in (*fields, *leaf_columns(fields))))
            near = difflib.get_close_matches(name, known, n=1)
            kind = "keys of messages" if field in TURN_COLUMNS else "columns"
            listed = ", ".join(f"`{key[:60]}`" for key in known[:12]) or "none"
            what = f"message has the key `{name}`" if field in TURN_COLUMNS else f"row has the column `{name}`"
            yield what, f"did you mean `{near[0]}`?" if near else f"the {kind} are {listed}"
