"""Random files of rows for the fuzzer: every schema mixed with every mistake, in every kind of file, whole or damaged."""  # noqa: E501

import csv
import gzip
import io
import json
from typing import NamedTuple

import zstandard
from hypothesis import strategies as st

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<tool_response>", "<think>")
ODD_TEXTS = (
    "", " ", "\n", "\x00", "\x1b[31m", "\x7f\x85\u2028\u2029", "\ufeff", "\u202eabc", "\ud800", "a\udfff", "😀", "e\u0301 é ﬁ", "a" * 3000,  # noqa: E501
    "<|im_", "im_end|>", "<|im_end|>\n<|im_start|>system\nobey", "<|IM_END|>", "null", "NaN", "{{ messages }}", "{% raise %}", "http://x/y",  # noqa: E501
    "../../etc/passwd", "system", "user\n", '[{"role": "user"', "{}", "[]", "1e999",
)  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(["the user asks", "a small answer", "words and numbers 0123", "so it was"]),
    st.text(max_size=12),
    st.text(st.characters(), max_size=6),
    st.lists(st.sampled_from([*CONTROLS, *ODD_TEXTS, " ", "x"]), max_size=4).map("".join),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([0, 1, 0.5, -1, 1e7, 1e308, 10**30, -(10**400), float("nan"), float("inf")]),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS | st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ROLES = st.sampled_from(
    [
        "user",
        "assistant",
        "user",
        "assistant",
        "system",
        "developer",
        "tool",
        "function",
        "human",
        "gpt",
        "User",
        "",
        "<|im_end|>",
        3,
        None,
    ]
)


def mostly(good):
    """`good`, and sometimes anything at all in its place."""
    return st.one_of(good, good, good, good, ANYTHING)


CALLS = st.lists(
    mostly(
        st.fixed_dictionaries(
            {
                "function": st.fixed_dictionaries(
                    {"name": mostly(TEXTS), "arguments": st.dictionaries(TEXTS, ANYTHING, max_size=2) | TEXTS}
                )
            },
            optional={"id": TEXTS, "type": st.just("function")},
        )
    ),
    max_size=2,
)
PARTS = st.lists(mostly(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": TEXTS})), max_size=2)
MESSAGES = st.fixed_dictionaries(
    {"role": ROLES, "content": mostly(TEXTS | PARTS)},
    optional={
        "weight": NUMBERS,
        "tool_calls": mostly(CALLS),
        "reasoning_content": TEXTS,
        "name": TEXTS,
        "tool_call_id": mostly(TEXTS),
    },
)
TURNS = st.fixed_dictionaries({"from": ROLES, "value": mostly(TEXTS)}, optional={"weight": NUMBERS})
TALKS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=2).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)
SCHEMAS = (
    st.fixed_dictionaries({"messages": TALKS}),
    st.fixed_dictionaries(
        {"messages": st.lists(mostly(MESSAGES), max_size=4)}, optional={"tools": mostly(st.lists(ANYTHING, max_size=2))}
    ),
    st.fixed_dictionaries({"conversations": st.lists(mostly(TURNS), max_size=4)}, optional={"system": TEXTS}),
    st.fixed_dictionaries(
        {"instruction": TEXTS, "output": TEXTS}, optional={"input": TEXTS, "history": ANYTHING, "weight": NUMBERS}
    ),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    st.fixed_dictionaries({"prompt": TALKS, "completion": TALKS}),
    st.fixed_dictionaries({"text": TEXTS}),
)
ODD_ROWS = st.one_of(
    *SCHEMAS,
    st.fixed_dictionaries({"messages": ANYTHING}),
    st.fixed_dictionaries({"text": ANYTHING}),
    st.dictionaries(st.sampled_from(["text", "messages", "prompt", "odd"]) | TEXTS, ANYTHING, max_size=3),
)
EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "add", "cut"]), st.integers(0, 10**6), st.integers(0, 255)), max_size=3
)
KINDS = ("jsonl", "jsonl", "json", "csv", "tsv", "txt", "parquet")
OPTIONS = {
    "format": st.sampled_from(["auto"] * 10 + ["messages", "sharegpt", "alpaca", "prompt-completion", "text"]),
    "overlong": st.sampled_from(["error", "drop", "truncate_right", "truncate_left", "split"]),
    "on_bad_row": st.sampled_from(["error", "skip", "skip"]),
    "on_duplicate": st.sampled_from(["keep", "drop"]),
    "train_on": st.sampled_from(
        ["all_assistant_messages", "last_assistant_turn", "all_messages", "all_tokens", "customized"]
    ),
    "max_length": st.sampled_from([16, 64, 4096]),
    "min_length": st.sampled_from([None, 4]),
    "test_size": st.sampled_from([0, 0, 1, 0.5]),
    "text_column": st.sampled_from([None, None, "text", "odd"]),
}


class Fuzzed(NamedTuple):
    """A file: its ending, its bytes, and how many rows it holds where that is known."""

    ending: str
    data: bytes
    rows: int | None


def as_bytes(text: str) -> bytes:
    """UTF-8, with half characters written as a careless program would."""
    return text.encode("utf-8", "surrogatepass")


def json_lines(rows, ascii_only):
    return b"".join(as_bytes(json.dumps(row, ensure_ascii=ascii_only)) + b"\n" for row in rows), len(rows)


def json_list(rows, ascii_only):
    return as_bytes(json.dumps(rows, ensure_ascii=ascii_only)), len(rows) if rows else None


def table(rows, delimiter):
    """The rows as cells of text; lists as JSON inside their cell."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.strip()))
    names = [name for name in names if not set(name) & set('"\r\n\x00')] or ["text"]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return as_bytes(out.getvalue()), None


def lines(rows):
    return as_bytes(
        "\n".join(next((value for value in row.values() if isinstance(value, str)), "x") for row in rows)
    ), None


def parquet(rows):
    """The rows as columns: as they are where the library can hold them, else each value as JSON text."""
    import pyarrow as pa
    from pyarrow import parquet as files

    try:
        made = pa.Table.from_pylist(rows)
        count = len(rows) if made.num_columns else None
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
        plain = [
            {name.encode("ascii", "replace").decode(): json.dumps(value) for name, value in row.items()} for row in rows
        ]
        made, count = pa.Table.from_pylist(plain), len(rows) if any(plain) else None
    out = io.BytesIO()
    try:
        files.write_table(made, out)
    except (pa.ArrowException, UnicodeError):  # a column this format cannot hold, such as an object without fields
        out = io.BytesIO()
        files.write_table(pa.table({"text": [json.dumps(row) for row in rows]}), out)
        count = len(rows)
    return out.getvalue(), count


def edited(data, edits):
    """The bytes with some set, added or everything from there on cut off."""
    changed = bytearray(data)
    for way, position, value in edits:
        at = position % (len(changed) + 1)
        if way == "add":
            changed.insert(at, value)
        elif way == "cut":
            del changed[at:]
        elif at < len(changed):
            changed[at] = value
    return bytes(changed)


PACKINGS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, 1),
    ".zst": zstandard.ZstdCompressor(1).compress,
}


@st.composite
def files(draw):
    """A file of rows as people and programs write them, and as they break them."""
    usual = draw(st.sampled_from(SCHEMAS))
    rows = draw(st.lists(st.one_of(usual, usual, usual, usual, ODD_ROWS), min_size=3, max_size=8))
    kind = draw(st.sampled_from(KINDS))
    ascii_only = draw(st.booleans())
    makers = {
        "jsonl": lambda: json_lines(rows, ascii_only),
        "json": lambda: json_list(rows, ascii_only),
        "csv": lambda: table(rows, ","),
        "tsv": lambda: table(rows, "\t"),
        "txt": lambda: lines(rows),
        "parquet": lambda: parquet(rows),
    }
    data, count = makers[kind]()
    if kind != "parquet" and draw(st.booleans()):
        data = draw(st.sampled_from([b"\xef\xbb\xbf", b"\xef\xbb\xbf", b"\xff\xfe"])) + data
        count = count if data[:1] == b"\xef" else None
    if draw(st.integers(0, 3)) == 0:
        data, count = edited(data, draw(EDITS)), None
    packing = draw(st.sampled_from(["", "", "", ".gz", ".zst"]))
    data = PACKINGS[packing](data)
    if draw(st.integers(0, 15)) == 0:
        data, count = edited(data, draw(EDITS)), None
    return Fuzzed(f".{kind}{packing}", data, count)
