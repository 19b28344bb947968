"""One data file (or data set): its records in order, the row of a record, the digest of its content; what is none."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.schema import SourceConfig
from llmtune.data.example import Row
from llmtune.data.reading.columns import renamed
from llmtune.data.reading.compression import COMPRESSION_ERRORS, COMPRESSIONS, compression_of, open_bytes
from llmtune.data.reading.parse import BadRow, DamagedFileError, Record, with_lists
from llmtune.data.reading.readers import READERS, Numbering, source_name
from llmtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "READ_ENDINGS",
    "DataFile",
    "digest_files",
    "foreign_content",
    "kind_of_file",
    "part_of_a_file",
    "read_records",
    "way_from_ending",
]

_DATASET_BATCH = 128
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


@dataclass(frozen=True)
class DataFile:
    """One file (or data set): the label that names its rows, its kind (a key of `READERS`), its source in config."""

    label: str
    kind: str
    source: SourceConfig
    source_index: int
    path: Path | None = None
    dataset: Dataset | None = None
    """The opened data set where `kind` is `dataset`; it is never sent to another process."""
    rows: tuple[int, int] | None = None
    """Rows [begin, end) of the file, counted from 0, that a slice of its source's `split` takes; None: all."""

    @property
    def numbering(self) -> Numbering:
        """How the rows of this file are numbered."""
        return READERS[self.kind].numbering

    def size_bytes(self) -> int:
        """Bytes on disk; 0 for a data set."""
        return self.path.stat().st_size if self.path is not None else 0

    def digest(self) -> str:
        """sha256 of the file's bytes, or of a data set's files. Raises DataError for a file that cannot be read."""
        if self.path is not None:
            return _sha256(self.path)
        assert self.dataset is not None
        digest = hashlib.sha256(f"{len(self.dataset)} {self.dataset.column_names}".encode())
        files = [Path(file["filename"]) for file in self.dataset.cache_files]
        # A selection of rows (or a data set in memory) is not told by its files; the library's fingerprint covers it.
        if not files or self.dataset._indices is not None:
            digest.update(self.dataset._fingerprint.encode())
        for path in files:
            digest.update(_sha256(path).encode())
        return digest.hexdigest()

    def count(self) -> int:
        """Rows of the whole file, bad ones too; it is read for that."""
        return sum(1 for _ in self._all_records())

    def records(self) -> Iterator[Record | BadRow]:
        """Yield the records in order, not yet parsed; a `BadRow` with `whole_file` stands for a damaged rest."""
        records = self._all_records()
        return records if self.rows is None else itertools.islice(records, *self.rows)

    def _all_records(self) -> Iterator[Record | BadRow]:
        next_number = None
        try:
            if self.path is None:
                yield from self._dataset_records()
                return
            with open_bytes(self.path) as stream:
                for record in READERS[self.kind].split(stream):
                    yield record
                    next_number = record.number + 1
        except DamagedFileError as damage:
            yield self._damaged(damage.number, damage.problem, damage.fix)
        except COMPRESSION_ERRORS as error:
            problem = f"the compressed file is damaged or cut off: {error}"
            fix = "write or download it again; nothing after this place can be read"
            found = compression_of(self.path) if self.path is not None else None
            if self.path is not None and found != self.path.suffix.lower():
                is_other = found is not None
                problem = f"the file is {f'{found} inside' if is_other else 'not compressed'}, whatever its name says"
                fix = f"end its name in {found}" if is_other else f"take {self.path.suffix} off its name"
            yield self._damaged(next_number, problem, fix)
        except OSError as error:
            problem = f"the file cannot be read: {error.strerror or error}"
            yield self._damaged(next_number, problem, "check the file, its permissions and its disk")

    def _dataset_records(self) -> Iterator[Record]:
        assert self.dataset is not None
        number = 0
        # A data set is much faster by columns of a batch than by rows.
        for batch in self.dataset.iter(batch_size=_DATASET_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield Record(number, dict(zip(batch, values, strict=True)))
                number += 1

    def _damaged(self, number: int | None, problem: str, fix: str) -> BadRow:
        source = self.label if number is None else source_name(self.label, self.numbering, number)
        return BadRow(source, None, problem, fix, whole_file=True, number=-1 if number is None else number)

    def parse(self, record: Record | BadRow) -> Row | BadRow:
        """Make a row of a record of this file, under the names of a format where its source has `columns` or `roles`.

        Needs the label, the kind and the source of the file only.
        """
        row = self.parse_as_written(record)
        if isinstance(row, BadRow) or not (self.source.columns or self.source.roles):
            return row
        return renamed(row, self.source)

    def parse_as_written(self, record: Record | BadRow) -> Row | BadRow:
        """Make a row of a record of this file with the fields that it has there."""
        if isinstance(record, BadRow):
            return record
        source = source_name(self.label, self.numbering, record.number)
        row = READERS[self.kind].parse(source, record, self.source.weight)
        return row if isinstance(row, BadRow) else with_lists(row)


def kind_of_file(path: Path) -> str | None:
    """The key of `READERS` for this file name, below its .gz or .zst; None for a kind that is not read."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    kind = name.suffix.lower()
    return kind if kind in READERS and kind.startswith(".") else None


def read_records(files: Sequence[DataFile], max_samples: int | None = None) -> Iterator[tuple[int, Record | BadRow]]:
    """Yield `(index of the file, record)` in order, not yet parsed.

    At most `max_samples` records are read, and of each source at most its own `max_samples`. Memory is bounded by the
    longest row (`MAX_ROW_BYTES`).
    """
    left = max_samples
    left_of_source = {file.source_index: file.source.max_samples for file in files}
    for index, file in enumerate(files):
        records = file.records()
        while left != 0 and left_of_source[file.source_index] != 0:
            record = next(records, None)
            if record is None:
                break
            yield index, record
            source_left = left_of_source[file.source_index]
            left_of_source[file.source_index] = None if source_left is None else source_left - 1
            left = None if left is None else left - 1


def _sha256(path: Path) -> str:
    try:
        with path.open("rb", 0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        problem = f"cannot read the file: {error.strerror}"
        raise DataError(problem, str(path), "check its permissions and its disk") from None


def digest_files(files: Iterable[DataFile]) -> list[str]:
    """sha256 of every file, several at once. Raises DataError for a file that cannot be read."""
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter's lock
        return list(pool.map(DataFile.digest, files))


def way_from_ending(path: Path) -> str:
    """The fix for a file whose ending says that it holds no rows."""
    found = (way for endings, way in _WAYS.items() if path.suffix.lower() in endings.split())
    return next(found, f"give it the right ending: {READ_ENDINGS}")


def foreign_content(head: bytes, kind: str) -> tuple[str, str] | None:
    """What a file of this kind (a key of `READERS`) really holds, by its first bytes, and the fix; None for rows."""
    if kind == ".txt" or (kind == ".parquet" and head.startswith(b"PAR1")):  # a text may begin with anything
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
