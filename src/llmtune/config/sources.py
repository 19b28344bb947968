"""The keys of a data source that depend on each other or on other sources, and the templates of `columns`."""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from llmtune.config.schema import SourceConfig

if TYPE_CHECKING:
    from llmtune.config.checks import Range

__all__ = [
    "COLUMN_FIELDS",
    "SOURCE_HINTS",
    "TURN_COLUMNS",
    "columns_of",
    "is_template",
    "source_names",
    "source_problems",
]

TURN_COLUMNS = ("role", "content", "tool_calls", "tool_call_id")
"""Names in `columns` that mean the keys of each message of a conversation, not columns of the row."""

COLUMN_FIELDS = (
    *("messages", "conversations", "conversation", *TURN_COLUMNS),
    *("prompt", "completion", "instruction", "input", "output", "history", "question", "answer", "query", "response"),
    *("chosen", "rejected", "chosen_response", "rejected_response", "label", "kto_tag"),
    *("text", "system", "system_prompt", "tools", "weight", "reasoning_content", "thinking", "reasoning"),
    *("chat_template_kwargs", "chosen", "rejected", "chosen_response", "rejected_response", "label", "kto_tag"),
)
"""Fields of the formats: what `columns` may give another name."""

_PATH = "write it as `path`"
_COLUMNS = "say it in `columns`, such as `columns: {messages: dialogue, role: speaker, content: text}`"
SOURCE_HINTS = {
    **dict.fromkeys(("file", "files", "file_name", "data_files", "data", "name_or_path", "hf_hub_url"), _PATH),
    "type": "take it out: the format is told from the rows, or set `format`",
    "formatting": "take it out: the format is told from the rows, or set `format`",
    "ds_type": "take it out: the kind of a file is read from its name and content",
    "chat_template": "set `model.chat_template`: one template counts for all sources",
    "roles_to_train": "set `train_on`",
    "train_on_inputs": "set `train_on: all_tokens`",
    "train_on_eos": "take it out: the token that ends a trained answer is trained, and no other",
    "shards": "write a slice: `split: 'train[:10%]'`",
    "num_samples": "write it as `max_samples`",
    "samples": "write it as `max_samples`",
    "probability": "write it as `share`",
    "ratio": "write it as `share`",
    "subset": "write it as `config`",
    "data_dir": "write it as part of `path`",
    "field": _COLUMNS,
    **dict.fromkeys(("field_messages", "field_instruction", "field_output", "field_input", "field_system"), _COLUMNS),
    **dict.fromkeys(("message_property_mappings", "message_field_role", "message_field_content", "tags"), _COLUMNS),
    "drop_system_message": "take it out: a system message is never trained",
}
"""The fix for keys that sources have in other toolkits."""

_SUM_TOLERANCE = 1e-6


def is_template(text: str) -> bool:
    """Whether a value of `columns` joins several columns, as in `{context}`, instead of naming one."""
    return "{" in text or "}" in text


@cache
def columns_of(text: str) -> list[str]:
    """The columns that a value of `columns` names. Raises ValueError for a template that is not well formed.

    >>> columns_of("{context}, {meta.title}"), columns_of("answers.text.0")
    (['context', 'meta.title'], ['answers.text.0'])
    """
    if not is_template(text):
        return [text]
    names = []
    # Python's own parser of braces, so that `{{` is a brace here too.
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError("a column stands in braces by its name alone")
        names.append(name)
    if not names:
        raise ValueError("it names no column")
    return names


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A name for each source, all different: its own, else the end of its path, else all of its path.

    >>> source_names([SourceConfig("a/chats.jsonl.gz"), SourceConfig("b/*.json"), SourceConfig("c", name="mine")])
    ['chats', 'b', 'mine']
    """
    ends = [source.name or _end_of(source.path) for source in sources]
    whole = [
        end if source.name or ends.count(end) == 1 else source.path for source, end in zip(sources, ends, strict=True)
    ]
    return [
        f"{name}#{whole[:place].count(name) + 1}" if whole.count(name) > 1 else name for place, name in enumerate(whole)
    ]


def _end_of(path: str) -> str:
    parts = [part for part in path.removeprefix("example:").split("/") if part and not set(part) & set("*?[")]
    return parts[-1].split(".")[0] or parts[-1] if parts else path


def source_problems(sources: Sequence[SourceConfig], ranges: Mapping[str, Range], *, held_out: bool) -> list[str]:
    """What the keys of sources must not be, each as the end of a sentence that begins with the name of the list."""
    problems = [] if all(source.path for source in sources) else ["must not hold an empty path"]
    for source in sources:
        for name, bounds in ranges.items():
            number = getattr(source, name)
            if number is not None and not bounds.holds(number):
                problems.append(f"must have `{name}` {bounds}")
    problems += [
        f"must not have {problem} (in {source.path!r})"
        for source in sources
        for problem in (*_own_problems(source), *(_of_training(source) if held_out else ()))
    ]
    names = [source.name for source in sources if source.name is not None]
    problems += [f"must not have two sources named {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not held_out and (problem := _share_problem(sources)):
        problems.append(problem)
    return problems


def _own_problems(source: SourceConfig) -> Iterator[str]:
    if source.name is not None and not source.name.strip():
        yield "an empty `name`"
    if source.text_column is not None and source.format not in (None, "auto", "text"):
        yield f"`text_column` beside `format: {source.format}`: only text rows have one"
    if source.share is not None and source.repeat != 1:
        yield "`share` and `repeat` in one source: the share decides how often its rows are seen"
    for field, text in source.columns.items():
        if field not in COLUMN_FIELDS:
            near = difflib.get_close_matches(field, COLUMN_FIELDS, n=1)
            listed = f"did you mean `{near[0]}`?" if near else f"the fields are {', '.join(COLUMN_FIELDS)}"
            yield f"`{field}` in `columns`, which is no field of a format: {listed}"
        try:
            names = columns_of(text)
        except ValueError as error:
            yield f"`columns: {{{field}: {text!r}}}`: {error}"
            continue
        if not all(name.strip() for name in names):
            yield f"`columns: {{{field}: {text!r}}}`: it names no column"
        elif field in TURN_COLUMNS and is_template(text):
            yield f"`columns: {{{field}: {text!r}}}`: a key of a message is one name"


def _of_training(source: SourceConfig) -> Iterator[str]:
    for name, value, default in (("share", source.share, None), ("repeat", source.repeat, 1)):
        if value != default:
            yield f"`{name}`, which only training rows have"


def _share_problem(sources: Sequence[SourceConfig]) -> str | None:
    """Shares are fractions of an epoch: they add up to 1, or leave room for the sources without one."""
    shares = [source.share for source in sources if source.share is not None]
    if not shares:
        return None
    total = sum(shares)
    way_out = "(a part of a source's own rows is drawn by `repeat: 0.5`)"
    if len(shares) == len(sources):
        is_whole = abs(total - 1) <= _SUM_TOLERANCE
        return None if is_whole else f"must have shares of an epoch that add up to 1, not to {total:g} {way_out}"
    if total < 1:
        return None
    rest = "a source without `share` makes up the rest of an epoch"
    return f"must have shares below 1 together, not {total:g}: {rest} {way_out}"
