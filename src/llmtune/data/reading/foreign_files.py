"""What is no file of rows, named as what it is, with the way to one: by its ending, or by the bytes it begins with."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["READ_ENDINGS", "foreign_content", "part_of_a_file", "way_from_ending"]

READ_ENDINGS = ".jsonl, .json, .csv, .tsv, .parquet or .txt, each also with .gz or .zst"

_TABLE = "save its sheet as CSV (UTF-8)"
_UNPACK = "unpack it, and name the files that are in it"
_TEXT = "save its text as .txt, or as rows with a field `text` in a .jsonl file"
_CODE = "opening it could run code: save its rows as JSON lines where it was made"
_WAYS: dict[str, str] = {
    ".xlsx .xls .xlsm .ods .numbers": _TABLE,
    ".zip .tar .tgz .7z .rar .bz2 .xz": _UNPACK,
    ".pdf .doc .docx .odt .rtf .epub .html .htm .md": _TEXT,
    ".pkl .pickle .pt .pth .bin .npy .npz .joblib": _CODE,
    ".yaml .yml .toml .xml": "write its rows as JSON lines, one object a line",
    ".arrow .feather .ipc": "name the folder that `save_to_disk` wrote, or save it as parquet",
    ".db .sqlite .sqlite3 .duckdb": "save the table as CSV or parquet",
}
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "end its name in .gz, as in rows.jsonl.gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "end its name in .zst, as in rows.jsonl.zst"),
    (b"PAR1", "parquet", "end its name in .parquet"),
    (b"ARROW1", "an arrow file", "name the folder that `save_to_disk` wrote, or save it as parquet"),
    (b"PK\x03\x04", "a zip archive, as workbooks are", f"of a workbook {_TABLE}; else {_UNPACK}"),
    (b"BZh", "bzip2", _UNPACK),
    (b"\xfd7zXZ", "xz", _UNPACK),
    (b"%PDF", "a PDF", _TEXT),
    (b"SQLite format 3", "a database", "save the table as CSV or parquet"),
    (b"version https://git-lfs", "only a pointer of Git LFS", "fetch the file itself: `git lfs pull`"),
    (b"<!DOCTYPE html", "a web page", "download the file itself: a page was saved in its place"),
    (b"<html", "a web page", "download the file itself: a page was saved in its place"),
)


def way_from_ending(path: Path) -> str:
    """The fix for a file whose ending says that it holds no rows."""
    found = (way for endings, way in _WAYS.items() if path.suffix.lower() in endings.split())
    return next(found, f"give it the right ending: {READ_ENDINGS}")


def foreign_content(head: bytes, kind: str) -> tuple[str, str] | None:
    """What a file of this kind (a key of `READERS`) really holds, by its first bytes, and the fix; None for rows."""
    if kind in (".parquet", ".txt"):  # parquet says so itself; a text may begin with anything
        return None
    return next(((what, fix) for beginning, what, fix in _BEGINNINGS if head.startswith(beginning)), None)


def part_of_a_file(name: str) -> str | None:
    """The fix for a path that asks for a part of a file behind its name, as other programs take it.

    >>> part_of_a_file("rows.jsonl[:10]")
    'a part of a file is a split: `{path: rows.jsonl, split: "train[:10]"}`'
    >>> part_of_a_file("rows.jsonl") is None
    True
    """
    match = re.fullmatch(r"(.+\.\w+)(?:\[(\d*:?\d*%?)\]|[:@#](\d+))", name)
    if match is None:
        return None
    bounds = match[2] if match[2] is not None else f":{match[3]}"
    return f'a part of a file is a split: `{{path: {match[1]}, split: "train[{bounds}]"}}`'
