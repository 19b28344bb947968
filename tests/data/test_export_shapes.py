"""The shapes in which tables and lists are exported are read, or named as what they are (F16)."""

import gzip
import json

import pytest

from llmtune.config.schema import DataConfig, SourceConfig
from llmtune.data.dataset.make_dataset import iter_texts
from llmtune.data.dataset.tokenize import detect_formats
from llmtune.data.example import Row
from llmtune.data.reading.find_files import find_files
from llmtune.data.reading.json_file import table_rows
from llmtune.data.reading.parse import BadRow
from llmtune.errors import DataError
from read_rows import read_rows

PAIRS = [{"prompt": "q", "completion": "a"}, {"prompt": "q2", "completion": "a2"}]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OTHER = [{"role": "user", "content": "q2\n"}, {"role": "assistant", "content": 'a2 },{ "x"'}]


def rows_of(path):
    return list(read_rows((SourceConfig(str(path)),)))


def fields_of(path):
    rows = rows_of(path)
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [dict(row.fields) for row in rows]


@pytest.fixture
def file(tmp_path):
    """Write a text to a file of this name; a name that ends in .gz is compressed."""

    def file(name, text):
        path = tmp_path / name
        data = text.encode() if isinstance(text, str) else text
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return file


# --- tables as text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", ",prompt,completion\n0,q,a\n1,q2,a2\n"),  # DataFrame.to_csv
        ("a.csv", ",prompt,completion\n5,q,a\n17,q2,a2\n"),  # ... after a selection
        ("a.csv", "prompt,completion,\nq,a,\nq2,a2,\n"),
        ("a.csv", "prompt,completion,,,\nq,a,,,\nq2,a2,, ,\n"),
        ("a.csv", "prompt;completion\nq;a\nq2;a2\n"),
        ("a.csv", ";prompt;completion\n0;q;a\n1;q2;a2\n"),
        ("a.csv", "prompt\tcompletion\nq\ta\nq2\ta2\n"),
        ("a.csv", "prompt|completion\r\nq|a\r\nq2|a2\r\n"),
        ("a.csv", '"prompt";"completion"\n"q";"a"\n"q2";"a2"\n'),
        ("a.tsv", "prompt,completion\nq,a\nq2,a2\n"),
        ("a.tsv", "\tprompt\tcompletion\n0\tq\ta\n1\tq2\ta2\n"),
        ("a.csv.gz", "\n\nprompt;completion\nq;a\nq2;a2\n"),
        ("a.csv", 'prompt, completion\nq, a\nq2, "a2"\n'),
        ("a.csv", "prompt , completion\nq, a\nq2, a2\n"),
        ("a.txt", "prompt\tcompletion\nq\ta\nq2\ta2\n"),  # a workbook's "text (tab delimited)"
        ("a.txt", "prompt,completion\nq,a\nq2,a2\n"),
        ("a.csv", "prompt,completion\nq,a,\n,\nq2,a2,, \n,,,\n"),  # what a spreadsheet leaves of deleted cells
    ],
)
def test_a_table_is_read_with_row_numbers_empty_columns_and_other_delimiters(name, text, file):
    assert fields_of(file(name, text)) == PAIRS


def test_a_line_above_the_header_is_named(file):
    (first, _) = rows_of(file("a.csv", "# rows of May\nprompt,completion\nq,a\n"))
    assert first.problem == "the row has 2 cells, the header 1 (`# rows of May`; is that a line above the header?)"


def test_a_cell_may_hold_the_delimiter_of_other_tables(file):
    assert fields_of(file("a.csv", 'instruction;input;output\n"hi; you";;yes, a,b\n')) == [
        {"instruction": "hi; you", "input": "", "output": "yes, a,b"}
    ]
    assert fields_of(file("a.csv", "text\na;b\nc;d\n")) == [{"text": "a;b"}, {"text": "c;d"}]
    assert fields_of(file("a.csv", 'text\n"a,b"\n')) == [{"text": "a,b"}]
    assert fields_of(file("a.csv", "prompt,completion\na;b,c;d\n")) == [{"prompt": "a;b", "completion": "c;d"}]
    assert fields_of(file("a.csv", "question;answer\n1,5+1;2,5\n")) == [{"question": "1,5+1", "answer": "2,5"}]
    assert fields_of(file("a.csv", "a,b\nq, a\n")) == [{"a": "q", "b": " a"}]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (",prompt,completion\n0,q,a\nx,q2,a2\n", "'x'"),
        (",prompt\nfirst,q\n", "'first'"),
        ("prompt,completion,\nq,a,more\n", "'more'"),
        ("prompt,,completion\nq,,a\n", "without a name"),
    ],
)
def test_a_column_without_a_name_that_holds_data_is_named(text, held, file):
    *_, last = rows_of(file("a.csv", text))
    assert isinstance(last, BadRow)
    assert last.whole_file
    assert "the header has a column without a name" in last.problem
    assert held in last.problem


# --- JSON


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize(
    "document",
    [
        {"prompt": {"0": "q", "1": "q2"}, "completion": {"0": "a", "1": "a2"}},  # DataFrame.to_json
        {"prompt": ["q", "q2"], "completion": ["a", "a2"]},  # Dataset.to_dict
        {"0": {"prompt": "q", "completion": "a"}, "1": {"prompt": "q2", "completion": "a2"}},  # orient="index"
        {"columns": ["prompt", "completion"], "index": [0, 1], "data": [["q", "a"], ["q2", "a2"]]},  # orient="split"
        {"columns": ["prompt", "completion"], "data": [["q", "a"], ["q2", "a2"]]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_table_that_is_one_object_is_read_by_its_rows(name, document, indent, file):
    assert fields_of(file(name, json.dumps(document, indent=indent) + "\n")) == PAIRS


def test_columns_of_conversations_are_read(file):
    expected = [{"messages": CHAT}, {"messages": OTHER}]
    assert fields_of(file("a.json", json.dumps({"messages": [CHAT, OTHER]}))) == expected
    assert fields_of(file("b.json", json.dumps({"messages": {"0": CHAT, "1": OTHER}}))) == expected


def test_a_table_longer_than_the_beginning_of_its_file_is_read(file):
    rows = [{"text": "x" * 1000, "n": str(number)} for number in range(500)]
    columns = {name: [row[name] for row in rows] for name in ("text", "n")}
    assert fields_of(file("a.json", json.dumps(columns))) == rows


@pytest.mark.parametrize(
    "document",
    [
        {"messages": CHAT},
        {"prompt": "q", "completion": "a"},
        {"messages": CHAT, "tags": ["a"]},
        {"prompt": ["q", "q2"], "completion": ["a"]},
        {"text": "q", "meta": {"0": "a"}},
        {"columns": ["prompt"], "data": [["q", "a"]]},
    ],
)
def test_an_object_that_is_no_table_stays_one_row(document, file):
    assert table_rows(document) is None
    assert fields_of(file("a.json", json.dumps(document))) == [document]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(PAIRS, indent=1)[:-2] + ",\n]\n"),
        ("a.json", json.dumps(PAIRS)[:-1] + ",]"),
        ("a.json", '{"data": ' + json.dumps(PAIRS)[:-1] + ', ], "n": 2}'),
        ("a.jsonl", "".join(json.dumps(row) + ",\n" for row in PAIRS)),
        ("a.jsonl", ", \n".join(json.dumps(row) for row in PAIRS)),
        ("a.json", "".join(json.dumps(row) + ",\n" for row in PAIRS)),
        ("a.jsonl", "[\n" + ",\n".join(json.dumps(row) for row in PAIRS) + "\n]\n"),
        ("a.jsonl", json.dumps(PAIRS)),
        ("a.jsonl", json.dumps({"data": PAIRS}, indent=2)),
        ("a.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in PAIRS)),
        ("a.json", "".join(json.dumps(row, indent=2) + "\n" for row in PAIRS)),
        ("a.jsonl.gz", ",\n\n".join(json.dumps(row, indent="\t") for row in PAIRS)),
        ("a.ndjson", json.dumps(PAIRS[0], indent=2) + "\n" + json.dumps(PAIRS[1])),
    ],
)
def test_commas_and_lines_do_not_decide_what_a_row_is(name, text, file):
    assert fields_of(file(name, text)) == PAIRS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps(CHAT) + "\n" + json.dumps(OTHER) + "\n"),
        ("a.json", json.dumps(CHAT) + "\n" + json.dumps(OTHER) + "\n"),
        ("a.json", json.dumps([CHAT, OTHER])),
        ("a.json", json.dumps([CHAT, OTHER], indent=2)),
        ("a.jsonl", json.dumps([CHAT, OTHER], indent=2)),
        ("a.jsonl", json.dumps([CHAT, OTHER])),
    ],
)
def test_a_bare_list_of_messages_is_a_row(name, text, file):
    assert fields_of(file(name, text)) == [{"messages": CHAT}, {"messages": OTHER}]


@pytest.mark.parametrize("text", ["[Chorus]\nla la\n", "prompt, more text\nof a story\n", "[{ a set }]\nof maths\n"])
def test_a_text_that_begins_like_a_list_or_a_table_stays_text(text, file):
    assert fields_of(file("a.txt", text)) == [{"text": line} for line in text.splitlines()]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_in_a_text_file_is_read_as_json(indent, file):
    assert fields_of(file("a.txt", json.dumps(PAIRS, indent=indent))) == PAIRS
    assert fields_of(file("b.txt", json.dumps(CHAT, indent=indent))) == [{"messages": CHAT}]


def test_json_lines_under_the_name_of_a_table_are_read(file):
    lines = '{"prompt": "q", "completion": "a"}\n{"prompt": "q2", "completion": "a2"}\n'
    assert fields_of(file("a.csv", lines)) == fields_of(file("b.tsv", lines)) == PAIRS


def test_bytes_and_maps_in_parquet_are_texts_and_objects(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = pa.array([[list(turn.items()) for turn in CHAT]], pa.list_(pa.map_(pa.string(), pa.string())))
    columns = {"messages": messages, "id": pa.array([b"caf\xc3\xa9"]), "image": pa.array([b"\xff\xd8"])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert fields_of(tmp_path / "a.parquet") == [{"messages": CHAT, "id": "café", "image": b"\xff\xd8"}]


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ('{"prompt": "q", "completion": "a",}', "take out the comma before the bracket that closes"),
        ('{"messages": [{"role": "user"},]}', "take out the comma before the bracket that closes"),
        ("{prompt: 'q'}", "JSON wants double quotes around names and texts"),
        ('{"prompt": q, "a": 1', "give each row as one JSON object on one line"),
        ("prompt,completion", "give each row as one JSON object on one line; a table's file ends in .csv or .tsv"),
        ("{“prompt”: “q”}", "JSON wants straight double quotes"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, fix, file):
    bad = rows_of(file("a.jsonl", line + '\n{"text": "b"}\n'))[0]
    assert bad.fix.startswith(fix)


def test_a_file_may_be_one_conversation(file):
    for name, indent in (("a.json", None), ("b.json", 2), ("c.jsonl", None), ("d.jsonl", 2)):
        assert fields_of(file(name, json.dumps(CHAT, indent=indent))) == [{"messages": CHAT}]


def test_pretty_rows_in_many_pieces_are_found_and_a_broken_one_is_one_problem(file):
    rows = [{"text": '}] {[ \\" ' * 20_000, "n": {"a": [number]}} for number in range(20)]
    text = "\n".join(json.dumps(row, indent=2) for row in rows)
    assert fields_of(file("a.jsonl", text)) == rows
    broken = text.replace('"a": ', '"a" ', 1)
    assert [type(row) for row in rows_of(file("b.jsonl", broken))] == [BadRow, *[Row] * 19]
    *_, last = rows_of(file("c.jsonl", text[:-2]))
    assert last.whole_file
    assert "the file ends in an object" in last.problem


def test_a_broken_line_at_the_beginning_is_one_bad_row(file):
    for line in ('{"text": "a', "{'text': 'a'}", '{"text": "a"} {"text"', '{"messages": [{"role": "user"', "nope"):
        rows = rows_of(file("a.jsonl", line + '\n{"text": "b"}\n{"text": "c"}\n'))
        assert [type(row) for row in rows] == [BadRow, Row, Row]
        assert not rows[0].whole_file


def test_a_list_that_is_no_list_of_rows_is_one_bad_row(file):
    for line in ("[1, 2]", '["q", "a"]', "[" * 50_000, '[{"role": "user"'):
        rows = rows_of(file("a.jsonl", line + "\n" + json.dumps(CHAT) + "\n"))
        assert [type(row) for row in rows] == [BadRow, Row]
        assert not rows[0].whole_file
    (row,) = rows_of(file("a.jsonl", "[1, 2]\n"))
    assert row.source.endswith("a.jsonl:1")


def test_several_objects_on_one_line_are_named(file):
    (row,) = rows_of(file("a.jsonl", '{"text": "a"} {"text": "b"}\n'))
    assert row.problem.startswith("not JSON: extra data")
    assert row.fix == "write each row on a line of its own; several stand on this one"


# --- what is said


def found(path, **options):
    config = DataConfig(train=(SourceConfig(str(path)),), **options)
    return detect_formats(config, find_files(config.train, "train"))


def test_the_shape_is_said(file):
    for name, text, shape in (
        ("a.csv", "prompt;completion\nq;a\n", "a table with `;` between its columns"),
        ("b.json", json.dumps({"prompt": ["q"], "completion": ["a"]}), "one table, as pandas and `datasets` write it"),
        ("c.jsonl", json.dumps(PAIRS[0], indent=2) + json.dumps(PAIRS[1]), "objects one after another"),
        ("d.json", json.dumps(CHAT), "the messages of one conversation"),
    ):
        path = file(name, text)
        _, (decision,) = found(path)
        assert decision.reason.startswith(f"{path}, read as {shape}: ")


@pytest.mark.parametrize(
    ("name", "text", "problem", "fix"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, CHAT)), "here it is one message", '{"messages": [{...}, {...}]}'),
        ("a.csv", "role,content\nuser,q\nassistant,a\n", "here it is one message", "into one list"),
        ("a.json", json.dumps([{**turn, "id": 1} for turn in CHAT]), "here it is one message", "into one list"),
    ],
)
def test_rows_that_are_single_messages_are_named(name, text, problem, fix, file):
    with pytest.raises(DataError) as caught:
        found(file(name, text))
    assert problem in str(caught.value)
    assert fix in str(caught.value)


def test_lists_that_are_no_conversations_are_named(file):
    for name, text in (("a.json", '[["q", "a"], ["q2", "a2"]]'), ("b.jsonl", '["q", "a"]\n["q2", "a2"]\n')):
        rows = rows_of(file(name, text))
        assert [row.problem for row in rows] == ["a row must be an object, this is a list of 2"] * 2
        assert 'for example {"prompt": "...", "completion": "..."}' in rows[0].fix


def test_nothing_is_said_about_the_format_of_rows_that_cannot_be_read(file):
    formats, decisions = found(file("a.jsonl", "nope\nnope\n"))
    assert (len(formats), decisions) == (1, [])


# --- files without a row


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", " \n\n\t\n", "no row is in it (5 bytes)"),
        ("a.json", "[ ]", "no row is in it (3 bytes)"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "prompt,completion\n", "no row is in it (18 bytes)"),
        ("a.txt", "\n", "no row is in it (1 bytes)"),
        ("a.jsonl.gz", "", "no row is in it"),
    ],
)
@pytest.mark.parametrize("format_name", ["auto", "messages"])
def test_a_file_without_a_row_is_named(name, text, problem, format_name, file):
    path = file(name, text)
    for read in (
        lambda: found(path, format=format_name),
        lambda: list(iter_texts(DataConfig(train=(SourceConfig(str(path)),), format=format_name))),
    ):
        with pytest.raises(DataError) as caught:
            read()
        assert problem in str(caught.value)
        assert str(path) in str(caught.value)


def test_an_empty_file_among_others_is_named_and_the_others_are_read(file, tmp_path):
    file("a.jsonl", "")
    file("b.jsonl", '{"text": "b"}\n')
    (name, other), decisions = found(tmp_path)
    assert (name, other) == ("text", "text")
    assert [(decision.key, decision.value) for decision in decisions] == [
        (str(tmp_path / "a.jsonl"), "no row"),
        ("data.format", "text"),
    ]
