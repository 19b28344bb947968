"""Rows come out of every kind of file with their place; what is no row comes out with its reason; memory stays bounded
(Q4).
"""

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llmtune.config.schema import SourceConfig
from llmtune.data.example import Row
from llmtune.data.reading.find_files import find_files, split_of_name
from llmtune.data.reading.parse import MAX_ROW_BYTES, BadRow
from llmtune.errors import DataError
from read_rows import read_rows

ROWS = [{"text": "one"}, {"text": "two\u2028lines, and \u0085"}, {"text": 'drei, "vier"\nfünf 🌱'}]


def sources(*paths, **options):
    return tuple(SourceConfig(str(path), **options) for path in paths)


def read(path, **options):
    return list(read_rows(sources(path), **options))


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows, delimiter=","):
    import io

    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def as_parquet(rows):
    import io

    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


KINDS = {
    ".jsonl": (jsonl, [":1", ":2", ":3"]),
    ".ndjson": (jsonl, [":1", ":2", ":3"]),
    ".json": (lambda rows: json.dumps(rows, ensure_ascii=False).encode(), ["[0]", "[1]", "[2]"]),
    ".csv": (as_csv, [":2", ":3", ":4"]),
    ".tsv": (lambda rows: as_csv(rows, "\t"), [":2", ":3", ":4"]),
    ".parquet": (as_parquet, ["[0]", "[1]", "[2]"]),
}
PACKINGS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, kind, packing):
    write, names = KINDS[kind]
    path = tmp_path / f"rows{kind}{packing}"
    path.write_bytes(PACKINGS[packing](write(ROWS)))
    assert read(path) == [Row(f"{path}{name}", fields) for name, fields in zip(names, ROWS, strict=True)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_txt_file_is_one_row_a_line_and_only_a_newline_ends_a_line(tmp_path, packing):
    path = tmp_path / f"rows.txt{packing}"
    path.write_bytes(PACKINGS[packing]("one\n\n two\u2028three\r\nfour".encode()))
    assert [(row.source, row.fields["text"]) for row in read(path)] == [
        (f"{path}:1", "one"),
        (f"{path}:3", " two\u2028three"),
        (f"{path}:4", "four"),
    ]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + (b"one" if kind == ".txt" else KINDS[kind][0](ROWS[:1])))
    assert [dict(row.fields) for row in read(path)] == [{"text": "one"}]


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        (
            '{"version": 1, "tags": ["a"], "data": [{"text": "a"}, {"text": "b"}], "n": 2}',
            [{"text": "a"}, {"text": "b"}],
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', [{"messages": [{"role": "user", "content": "a"}]}]),
        ('{"text":\n "a"}', [{"text": "a"}]),
        ('{"data": []}', []),
        (" \n[ ] ", []),
        ("", []),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ('[{"text": "]},[{\\"\\\\"}]', [{"text": ']},[{"\\'}]),
    ],
)
def test_a_json_file_is_a_list_or_an_object_with_one_list_or_one_row_or_lines(tmp_path, document, rows):
    path = tmp_path / "rows.json"
    path.write_text(document)
    assert [row.fields for row in read(path)] == rows


def test_one_broken_element_of_a_json_list_does_not_take_the_others_with_it(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}, {"text": nope}, 3, {"text": "b"}]')
    rows = read(path)
    assert [type(row).__name__ for row in rows] == ["Row", "BadRow", "BadRow", "Row"]
    assert rows[1].source == f"{path}[1]"
    assert rows[2].problem == "a row must be an object, this is the number 3"


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ', "the file ends before its list does"),
        ("a.json", b'[{"text": "a', "the file ends inside a quoted text"),
        ("a.json", b'[{"text": "a"}] x', "something follows the end of the list"),
        ("a.json", b'{"a": [{"text": "a"}], "b": [{"text": "b"}]}', "more than one list of rows: `a`, `b`"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS) * 99)[:-20], "damaged or cut off"),
        ("a.jsonl.gz", b"not gzip", "not compressed"),
        ("a.jsonl.zst", zstandard.compress(jsonl(ROWS) * 99)[:-5], "cut off"),
        ("a.jsonl.zst", b"not zstd", "not compressed"),
        ("a.parquet", b"not parquet", "the file is text, whatever its name says"),
        ("a.csv", b"text,text\na,b\n", "names the column 'text' twice"),
        ("a.csv", b"text,\na,b\n", "a column without a name"),
        ("a.csv", b'"text"s,more\na,b\nc,d\n', "the header is not a table row"),
    ],
)
def test_a_damaged_file_is_named_and_never_silently_shorter(tmp_path, name, data, problem):
    path = tmp_path / name
    path.write_bytes(data)
    *rows, last = read(path)
    assert isinstance(last, BadRow)
    assert last.whole_file
    assert problem in last.problem
    assert last.source.startswith(str(path))
    assert last.source not in {row.source for row in rows}


@pytest.mark.parametrize(
    ("line", "problem"),
    [("a,b,c", "the row has 3 cells, the header 2"), ('"a"b,c', "not a table row"), ('"a', "not a table row")],
)
def test_a_table_row_that_does_not_fit_is_named_with_its_line(tmp_path, line, problem):
    path = tmp_path / "rows.csv"
    path.write_text(f"text,more\n\n{line}\n")
    (bad,) = read(path)
    assert bad.source == f"{path}:3"
    assert problem in bad.problem


def test_a_cell_of_a_table_may_hold_a_conversation_as_json(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('messages\n"[{""role"": ""user"", ""content"": ""a""}]"\n"[nope"\n')
    good, bad = read(path)
    assert good.fields["messages"] == [{"role": "user", "content": "a"}]
    assert (bad.source, bad.field) == (f"{path}:3", "messages")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_row_of_100_megabytes_is_refused_by_its_size_in_bounded_memory(tmp_path, kind):
    """The limit is on what is read, so the longest row decides about memory, never the file."""
    path = tmp_path / f"rows{kind}"
    huge = b'{"text": "' + b"x" * 100_000_000 + b'"}'
    before, after = {".json": (b'[{"text": "a"},', b',{"text": "b"}]'), ".csv": (b"text\na\n", b"\nb\n")}.get(
        kind, (b'{"text": "a"}\n', b'\n{"text": "b"}\n')
    )
    with path.open("wb") as file:
        file.write(before + (huge[10:-2] if kind == ".csv" else huge) + after)
    tracemalloc.start()
    rows = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(row).__name__ for row in rows] == ["Row", "BadRow", "Row"]
    assert "100,000,0" in rows[1].problem
    assert peak < 3 * MAX_ROW_BYTES


def test_reading_holds_no_more_of_a_long_file_than_of_a_short_one(tmp_path):
    peaks = []
    for count in (2_000, 40_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(jsonl([{"text": "x" * 100}]) * count)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(sources(path))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=3), min_size=1, max_size=5),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from("xid")), max_size=6),
    kind=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz", ".jsonl.zst", ".parquet"]),
)
def test_mangled_bytes_never_raise_anything_but_are_rows_or_reasons(tmp_path_factory, rows, edits, kind):
    """Q8: whatever the bytes, reading gives rows and reasons."""
    packing = kind.partition(".")[2].partition(".")[2]
    written = json.dumps(rows).encode() if kind == ".json" else jsonl(rows)
    data = bytearray(PACKINGS[f".{packing}" if packing else ""](written))
    for position, value, edit in edits:
        at = position % (len(data) + 1)
        if edit == "i":
            data.insert(at, value)
        elif at < len(data):
            if edit == "x":
                data[at] = value
            else:
                del data[at:]
    path = tmp_path_factory.mktemp("mangled") / f"rows{kind}"
    path.write_bytes(data)
    for row in read(path):
        assert isinstance(row, Row | BadRow)
        assert row.source.startswith(str(path))
        if isinstance(row, BadRow):
            assert row.problem
            assert row.fix
        said = dict(row.fields) if isinstance(row, Row) else list(row)
        json.dumps(said, ensure_ascii=False, default=lambda marked: marked.problem).encode()


def test_a_byte_that_is_no_text_in_a_header_can_be_written_with_its_problem(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\x80}\n{"": "", "0": ""}\n')
    (row,) = read(path)
    assert "(`\\udc80}`; is that a line above the header?)" in row.problem
    assert row.problem.encode()


# --- places
# -----------------------------------------------------------------------------------------------------------------------  # noqa: E501


@pytest.fixture
def folder(tmp_path):
    for name in ("train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "dev.jsonl", "test.jsonl.gz", "notes.md"):
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(jsonl(ROWS)) if name.endswith("gz") else jsonl(ROWS))
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("purpose", "split", "names"),
    [
        ("train", None, ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        ("eval", None, ["dev.jsonl"]),
        ("train", "test", ["test.jsonl.gz"]),
        ("eval", "valid", ["dev.jsonl"]),
    ],
)
def test_a_folder_gives_the_files_of_the_split_its_names_say(folder, purpose, split, names):
    files = find_files([SourceConfig(str(folder), split=split)], purpose)
    assert [file.label for file in files] == [f"{folder}/{name}" for name in names]


def test_globs_lists_weights_and_limits(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "c.txt").write_text("x\ny\n")
    both = (SourceConfig(f"{tmp_path}/*.jsonl", weight=0.5, max_samples=4), SourceConfig(f"{tmp_path}/c.txt"))
    rows = list(read_rows(both, max_samples=5))
    assert [(row.source.removeprefix(f"{tmp_path}/"), row.loss_weight) for row in rows] == [
        ("a.jsonl:1", 0.5),
        ("a.jsonl:2", 0.5),
        ("a.jsonl:3", 0.5),
        ("b.jsonl:1", 0.5),
        ("c.txt:1", 1.0),
    ]


def test_examples_that_come_with_the_program_are_found_by_name():
    rows = list(
        read_rows((SourceConfig("example:records", max_samples=2), SourceConfig("example:alpaca", max_samples=1)))
    )
    assert [row.source for row in rows] == [
        "example:records/train.jsonl:1",
        "example:records/train.jsonl:2",
        "example:alpaca.json[0]",
    ]


def test_a_saved_data_set_is_read_without_a_network(tmp_path):
    import datasets

    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    rows = read(tmp_path / "saved")
    assert [row.source for row in rows] == [f"{tmp_path}/saved/train[{index}]" for index in range(3)]
    assert [row.fields for row in rows] == ROWS
    assert len(list(read_rows(sources(tmp_path / "saved"), purpose="eval"))) == 1


def test_everything_that_cannot_be_found_is_said_at_once(tmp_path):
    (tmp_path / "near.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.xls").write_text("")
    names = ["neat.jsonl", "*.csv", "empty", "rows.xls", "x" * 300 + ".jsonl"]
    paths = [str(tmp_path / name) for name in names] + [
        "example:nothing",
        "example:../configs",
        "",
        "no-such/data-set",
        "a\0b",
        "~no-such-user/a.jsonl",
    ]
    with pytest.raises(DataError) as caught:
        find_files(sources(*paths), "train")
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == len(paths)
    expected = [
        "did you mean",
        "no file matches",
        "holds no file",
        "not a kind of file",
        "File name too long",
        "no example",
        "no example",
        "no path",
    ]
    expected += ["neither a file here nor a data set", "not a path", "there is no file"]
    for index, (text, part) in enumerate(zip(problems, expected, strict=True)):
        assert part in text
        assert text.startswith(f"data.train[{index}]: ")


def test_a_file_name_of_any_characters_gives_places_that_can_be_printed(tmp_path):
    path = tmp_path / "a b'\n\u2028\udcff🌱.jsonl"
    path.write_bytes(jsonl(ROWS[:1]) + b"nope")
    for row in read(path):
        assert row.source.isprintable()
        assert row.source.encode()


def test_split_names_are_words_of_a_file_name():
    names = ["retrained.jsonl", "my_train.csv", "data-val.json", "test/0001.parquet", "latest.txt"]
    assert [split_of_name(Path(name)) for name in names] == [None, "train", "validation", "test", None]
