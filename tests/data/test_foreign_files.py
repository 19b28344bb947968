"""A file that holds no rows is named as what it is, by its bytes or its ending, with the way to rows."""

import gzip

import pytest

from llmtune.config.schema import SourceConfig
from llmtune.data.reading.find_files import find_files
from llmtune.errors import DataError
from read_rows import read_rows


def answer(path):
    with pytest.raises(DataError) as refused:
        find_files((SourceConfig(str(path)),), "train")
    (problem,) = refused.value.problems
    return problem


@pytest.mark.parametrize(
    ("name", "content", "says", "fix"),
    [
        ("a.jsonl", gzip.compress(b'{"text": "x"}', mtime=0), "is gzip, whatever its name says", "end its name in .gz"),
        ("a.json", b"\x28\xb5\x2f\xfd....", "is zstd", "end its name in .zst"),
        ("a.csv", b"PK\x03\x04....", "is a zip archive, as workbooks are", "save its sheet as CSV"),
        ("a.jsonl", b"PAR1....", "is parquet", "end its name in .parquet"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "is gzip", "end its name in .gz"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS", "`git lfs pull`"),
        ("a.csv", b"<!DOCTYPE html><html>", "is a web page", "download the file itself"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS", "`git lfs pull`"),
        ("a.xlsx", b"PK", "is not a kind of file that is read", "save its sheet as CSV"),
        ("a.zip", b"PK", "is not a kind of file that is read", "unpack it"),
        ("a.arrow", b"ARROW1", "is not a kind of file that is read", "`save_to_disk`"),
        ("a.yaml", b"- x", "is not a kind of file that is read", "JSON lines"),
        ("a.strange", b"x", "is not a kind of file that is read", "give it the right ending: .jsonl"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_way_to_rows(name, content, says, fix, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    problem = answer(path)
    assert says in problem.problem
    assert fix in problem.fix


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_that_only_begins_alike_is_read(name, tmp_path):
    path = tmp_path / name
    path.write_text('{"text": "PAR1 and <html>"}\n' if name == "a.jsonl" else "PAR1 is a golf course\n")
    assert [file.path for file in find_files((SourceConfig(str(path)),), "train")] == [path]


@pytest.mark.parametrize(
    ("part", "slice_"),
    [("[:10]", "train[:10]"), ("[5:9]", "train[5:9]"), ("[:10%]", "train[:10%]"), (":10", "train[:10]")],
)
def test_a_part_of_a_file_is_answered_with_the_split_that_takes_it(part, slice_, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\n' * 20)
    fix = answer(f"{path}{part}").fix
    assert f'{{path: {path}, split: "{slice_}"}}' in fix
    find_files((SourceConfig(str(path), split=slice_),), "train")


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32"),
     ("utf-32-le", "UTF-32"), ("utf-32-be", "UTF-32")],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["a.jsonl", "a.csv", "a.json", "a.txt"])
def test_wide_encodings_are_named_with_or_without_a_byte_order_mark(encoding, name, ending, tmp_path):
    path = tmp_path / ending
    path.write_bytes('{"prompt": "q"}\n'.encode(encoding))
    (row,) = read_rows((SourceConfig(str(path)),))
    assert row.problem == f"the file is {name}, not UTF-8"
    assert f"iconv -f {name} -t UTF-8" in row.fix


@pytest.mark.parametrize("ending", ["a.jsonl", "a.csv", "a.txt"])
def test_lines_that_end_with_a_carriage_return_alone_are_named(ending, tmp_path):
    path = tmp_path / ending
    path.write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    (row,) = read_rows((SourceConfig(str(path)),))
    assert "end with a carriage return alone" in row.problem
    assert "tr" in row.fix
    path.write_bytes(b'{"text":\r "a"}\r\n{"text": "b"}')
    assert len(list(read_rows((SourceConfig(str(path)),)))) == (1 if ending == "a.csv" else 2)


def test_json_under_the_name_of_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b' {"error": "not found"}')
    (row,) = read_rows((SourceConfig(str(path)),))
    assert row.problem == "the file is JSON, whatever its name says"
    assert row.fix.startswith("end its name in .jsonl")


def test_a_table_under_the_name_of_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("prompt,completion\nq,é\n")
    (row,) = read_rows((SourceConfig(str(path)),))
    assert (row.problem, row.fix) == (
        "the file is text, whatever its name says",
        "end its name in .csv, .tsv or .txt",
    )


@pytest.mark.parametrize(
    ("name", "data", "other"),
    [("rows.jsonl.gz", b"\x28\xb5\x2f\xfdxx", ".zst"), ("rows.jsonl.zst", b"\x1f\x8bxx", ".gz")],
)
def test_a_file_that_is_compressed_in_another_way_is_named(name, data, other, tmp_path):
    (tmp_path / name).write_bytes(data)
    (row,) = read_rows((SourceConfig(str(tmp_path / name)),))
    assert row.problem == f"the file is {other} inside, whatever its name says"
    assert row.fix == f"end its name in {other}"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_is_told_from_one_that_was_cut_off(ending, tmp_path):
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_text('{"text": "a"}\n')
    (row,) = read_rows((SourceConfig(str(path)),))
    assert row.problem == "the file is not compressed, whatever its name says"
    assert row.fix == f"take {ending} off its name"


def test_a_link_to_nothing_and_an_address_of_a_file_are_named(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("gone.jsonl")
    assert answer(tmp_path / "rows.jsonl").fix == "it is a link to 'gone.jsonl', where there is nothing"
    assert answer(f"file://{tmp_path}/other.jsonl").fix == f"write the path alone: {tmp_path}/other.jsonl"
