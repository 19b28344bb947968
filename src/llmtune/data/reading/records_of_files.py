"""Read the rows of data sources one after another, without ever holding more than a little of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmtune.config.schema import SourceConfig
from llmtune.data.example import Row
from llmtune.data.reading.data_files import DataFile, Purpose, find_files
from llmtune.data.reading.parse import BadRow
from llmtune.data.reading.readers import READERS, DamagedFileError, Record, compression_errors, open_bytes, source_of

__all__ = ["BadRow", "parse_record", "read_records", "read_rows"]

_DATASET_BATCH = 128


def read_rows(
    sources: Sequence[SourceConfig], *, purpose: Purpose = "train", max_samples: int | None = None
) -> Iterator[Row | BadRow]:
    """Yield every row of the sources in order; a record that is no row comes out as the reason why.

    At most `max_samples` records are read, and of each source at most its own `max_samples`. Memory is bounded by the
    longest row (`MAX_ROW_BYTES`). Raises DataError for a source that leads to no file; what is wrong inside a file is
    yielded.
    """
    files = find_files(sources, purpose)
    for file_index, record in read_records(files, max_samples):
        yield record if isinstance(record, BadRow) else parse_record(files[file_index], record)


def read_records(files: Sequence[DataFile], max_samples: int | None = None) -> Iterator[tuple[int, Record | BadRow]]:
    """Yield `(index of the file, record)` in order, not yet parsed, within the limits of `read_rows`.

    Where a file cannot be read any further a `BadRow` with `whole_file` stands for the rest of it.
    """
    left = max_samples
    left_of_source = {file.source_index: file.source.max_samples for file in files}
    for file_index, file in enumerate(files):
        for record in _records_of(file, left_of_source[file.source_index], left):
            yield file_index, record
            limit = left_of_source[file.source_index]
            left_of_source[file.source_index] = None if limit is None else limit - 1
            left = None if left is None else left - 1


def _records_of(file: DataFile, *limits: int | None) -> Iterator[Record | BadRow]:
    asked = [limit for limit in limits if limit is not None]
    left = min(asked) if asked else -1
    if left == 0:
        return
    records = _split(file)
    for record in records:
        yield record
        left -= 1
        if left == 0:
            break


def _split(file: DataFile) -> Iterator[Record | BadRow]:
    reached = None
    try:
        if file.path is None:
            yield from _dataset_records(file)
            return
        with open_bytes(file.path) as stream:
            for record in READERS[file.kind].split(stream):
                yield record
                reached = record.number + 1
    except DamagedFileError as damage:
        yield _damaged(file, damage.number, damage.what, damage.fix)
    except compression_errors() as error:
        what = f"the compressed file is damaged or cut off: {error}"
        yield _damaged(file, reached, what, "write or download it again; nothing after this place can be read")
    except OSError as error:
        yield _damaged(
            file,
            reached,
            f"the file cannot be read: {error.strerror or error}",
            "check the file, its permissions and its disk",
        )


def _damaged(file: DataFile, number: int | None, what: str, fix: str) -> BadRow:
    source = file.label if number is None else source_of(file.label, file.numbering, number)
    return BadRow(source, None, what, fix, whole_file=True, number=-1 if number is None else number)


def _dataset_records(file: DataFile) -> Iterator[Record]:
    number = 0
    for batch in file.dataset.iter(batch_size=_DATASET_BATCH):
        for values in zip(*batch.values(), strict=True):
            yield Record(number, dict(zip(batch, values, strict=True)))
            number += 1


def parse_record(file: DataFile, record: Record) -> Row | BadRow:
    """Make a row of a record; needs nothing of `file` but its label, kind and the weight of its source."""
    source = source_of(file.label, file.numbering, record.number)
    return READERS[file.kind].parse(source, record, file.source.weight)
