"""One data file (or data set): its records in order, the row of a record, and the digest of its content."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.schema import SourceConfig
from llmtune.data.example import Row
from llmtune.data.reading.columns import renamed
from llmtune.data.reading.compression import COMPRESSION_ERRORS, COMPRESSIONS, open_bytes
from llmtune.data.reading.parse import BadRow, DamagedFileError, Record, with_lists
from llmtune.data.reading.readers import READERS, Numbering, source_name
from llmtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DataFile", "digest_files", "kind_of_file", "read_records"]

_DATASET_BATCH = 128


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
