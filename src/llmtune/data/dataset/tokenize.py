"""Tokenize all rows of one side (train or eval) on all cores, or take them from the cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llmtune.common.decisions import Decision
from llmtune.common.environment import available_cores, cache_folder, home_expanded
from llmtune.config.schema import DataConfig
from llmtune.data.dataset.cache import cache_key, open_or_build
from llmtune.data.dataset.ledger import LedgerPart
from llmtune.data.dataset.parts import Part, build_part
from llmtune.data.dataset.row_result import RowResult, RowRules
from llmtune.data.dataset.workers import Batch, Job, tokenize_batches
from llmtune.data.example import Row
from llmtune.data.reading.columns import missing_columns
from llmtune.data.reading.data_file import DataFile, read_records
from llmtune.data.reading.find_files import Purpose
from llmtune.data.reading.parse import BadRow, Record
from llmtune.data.reading.readers import READERS
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.formats import DETECTION_ROWS, Recognize, detect_format
from llmtune.errors import DataError, MachineError, Problem

__all__ = ["Progress", "detect_formats", "row_rules", "tokenize_part", "tokenize_side"]

Progress = Callable[[int, int | None, float], None]
"""Called with `(rows done, estimate of all rows, rows per second)` a few times a second."""

_UNUSED_KEYS = {
    "text": {"roles": "take it out", "train_on": "take it out: all of a text is trained"},
    "alpaca": {"roles": "take it out"},
}
"""Keys of a source that rows of a format do not use, and what to do."""

_BATCH_ROWS = 256
_BATCH_BYTES = 2**19
_SIZE_OF_FIELDS = 1024
_PROGRESS_EVERY_S = 0.1


def row_rules(config: DataConfig) -> RowRules:
    """The settings that decide about a row by itself."""
    return RowRules(config.train_on, config.text_column, config.min_length, config.max_length, config.overlong)


def detect_formats(
    config: DataConfig, files: Sequence[DataFile], formats: Mapping[str, Recognize] | None = None
) -> tuple[list[str], list[Decision]]:
    """The format of each file, detected from its first rows, and a decision for each format of a source.

    It is one of `formats`, or of FORMATS where None. Raises DataError for files whose rows have
    the fields of none, and for sources without a row.
    """
    empty = _empty_files(files)
    names: list[str] = []
    decisions: dict[tuple[int, str], Decision] = {}
    problems: list[Problem] = []
    for file in files:
        try:
            name, decision = _format_of(file, config, formats)
        except DataError as error:
            problems += error.problems
            continue
        names.append(name)
        if decision is not None:
            # One decision speaks for all files of a source with the same format.
            decisions.setdefault((file.source_index, name), decision)
    if problems:
        raise DataError.all(problems)
    return names, [*empty, *decisions.values()]


def _format_of(
    file: DataFile, config: DataConfig, formats: Mapping[str, Recognize] | None
) -> tuple[str, Decision | None]:
    """The format of a file: that of its source or the config, else detected, with a decision.

    Raises DataError where its rows have the fields of no format, or lack a column that the source names, and for keys
    of the source that rows of this format do not use.
    """
    name, decision = _given_or_detected(file, config, formats)
    problems = [
        Problem(f"`{key}` is not used: rows of the format `{name}` have no messages with roles", file.label, fix)
        for key, fix in _UNUSED_KEYS.get(name, {}).items()
        if getattr(file.source, key) not in (None, {}, "all_tokens")
    ]
    if problems:
        raise DataError.all(problems)
    return name, decision


def _given_or_detected(
    file: DataFile, config: DataConfig, formats: Mapping[str, Recognize] | None
) -> tuple[str, Decision | None]:
    source = file.source
    given = source.format or ("text" if source.text_column else config.format)
    if given != "auto" and not source.columns:
        return given, None
    first = [record for _, record in itertools.islice(read_records([file]), DETECTION_ROWS)]
    if source.columns:
        _refuse_missing_columns(file, first)
    if given != "auto":
        return given, None
    rows = [row for record in first if isinstance(row := file.parse(record), Row)]
    name, decision = detect_format(rows, config.text_column, formats)
    if not rows:  # the file is empty, or its rows are named as bad ones
        return name, None
    shape = READERS[file.kind].shape
    place = file.label if shape is None else f"{file.label}, read as {shape}"
    return name, Decision("data.format", name, f"{place}: {decision.reason}")


def _empty_files(files: Sequence[DataFile]) -> list[Decision]:
    """Name the files without a record. Raises DataError for sources of which no file has one."""
    is_empty = [next(file.records(), None) is None for file in files]
    with_rows = {file.source_index for file, without in zip(files, is_empty, strict=True) if not without}
    problems, decisions = list[Problem](), list[Decision]()
    for file in itertools.compress(files, is_empty):
        size = file.size_bytes() if file.path is not None else 0
        problem = "the file is empty" if file.path is not None and not size else f"no row is in it ({size:,} bytes)"
        if file.source_index in with_rows:
            decisions.append(Decision(file.label, "no row", f"{problem}, so nothing of it is used"))
        else:
            problems.append(Problem(problem, file.label, "write rows into it, or take it out of the data"))
    if problems:
        raise DataError.all(problems)
    return decisions


def _refuse_missing_columns(file: DataFile, first: Sequence[Record | BadRow]) -> None:
    """Raise DataError with every column of the source's `columns` that none of these first records has."""
    rows = [row for record in first if isinstance(row := file.parse_as_written(record), Row)]
    if not rows:
        return
    problems = [
        Problem(f"no {what} that `columns` names", file.label, hint)
        for what, hint in missing_columns(rows, file.source)
    ]
    if problems:
        raise DataError.all(problems)


class _Side(NamedTuple):
    """One side (train or eval) before it is tokenized."""

    job: Job
    key: str
    folder: Path | None
    """Where tokenized rows are kept; None for nowhere."""
    limit: int | None
    """Records that are read at most."""
    decisions: list[Decision]


def _side(
    config: DataConfig,
    purpose: Purpose,
    files: list[DataFile],
    digests: list[str],
    renderer: Renderer,
    formats: Mapping[str, Recognize] | None,
) -> _Side:
    names, decisions = detect_formats(config, files, formats)
    rules = row_rules(config)
    # Held-out rows are never cut short: a smaller set would be another measurement.
    limit = config.max_samples if purpose == "train" else None
    facts = {"renderer": renderer.digest, "formats": names, "rules": rules._asdict(), "max_samples": limit}
    folder = home_expanded(config.cache_dir) if config.cache_dir else cache_folder()
    job = Job(tuple(files), tuple(names), renderer, rules)
    return _Side(job, cache_key(files, digests, facts), folder, limit, decisions)


def _workers(config: DataConfig) -> int:
    return available_cores() if config.num_workers is None else config.num_workers


def tokenize_side(
    config: DataConfig,
    purpose: Purpose,
    files: list[DataFile],
    digests: list[str],
    renderer: Renderer,
    progress: Progress | None,
    formats: Mapping[str, Recognize] | None = None,
) -> tuple[LedgerPart, list[Decision]]:
    """Return every row of one side with its status before rows are compared, and the decisions made on the way.

    `digests` are those of `files`, in order. Raises DataError for a file in no known format, MachineError where
    `cache_dir` cannot be used.
    """
    side = _side(config, purpose, files, digests, renderer, formats)
    store, cache_decisions = open_or_build(
        side.folder,
        side.key,
        files,
        lambda: _results(side, _workers(config), progress),
        must_be_cached=config.cache_dir is not None,
    )
    return LedgerPart(purpose, store), [*side.decisions, *cache_decisions]


def tokenize_part(
    config: DataConfig,
    purpose: Purpose,
    files: list[DataFile],
    digests: list[str],
    renderer: Renderer,
    part: Part,
    progress: Progress | None,
    formats: Mapping[str, Recognize] | None = None,
) -> list[int]:
    """Tokenize a part of one side into the cache, and join all parts with the last one; returns which are missing.

    Raises DataError as `tokenize_side`, MachineError where there is no cache folder or it cannot be used.
    """
    side = _side(config, purpose, files, digests, renderer, formats)
    if side.folder is None:
        raise MachineError(
            "there is no home folder to keep tokenized rows in", "data.cache_dir", "name a shared folder"
        )
    return build_part(side.folder, side.key, files, lambda: _results(side, _workers(config), progress, part), part)


def _results(side: _Side, workers: int, progress: Progress | None, part: Part | None = None) -> Iterator[RowResult]:
    """Tokenize all records, or those of a part, in order, and report the progress."""
    files, limit = side.job.files, side.limit
    total_bytes = sum(file.size_bytes() for file in files)
    records = _CountedRecords(read_records(files, limit))
    started = reported = time.monotonic()
    done = 0
    own, count = (records, 1) if part is None else (part.of(records), part.count)
    for results in tokenize_batches(side.job, _batches(own), workers):
        yield from results
        done += len(results)
        now = time.monotonic()
        if progress is not None and now - reported >= _PROGRESS_EVERY_S:
            reported = now
            rows = _estimate(records, total_bytes, limit)
            progress(done, rows and max(done, rows // count), done / (now - started))
    if progress is not None:
        progress(done, done, done / max(time.monotonic() - started, 1e-9))


class _CountedRecords:
    """Counts records and their approximate bytes as they pass."""

    def __init__(self, records: Iterator[tuple[int, Record | BadRow]]) -> None:
        self._records = records
        self.rows = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[tuple[tuple[int, Record | BadRow], int]]:
        for file_index, record in self._records:
            payload = record.payload if isinstance(record, Record) else None
            size = len(payload) if isinstance(payload, bytes) else _SIZE_OF_FIELDS
            self.rows += 1
            self.bytes += size
            yield (file_index, record), size


def _estimate(records: _CountedRecords, total_bytes: int, max_samples: int | None) -> int | None:
    if not total_bytes or not records.bytes:
        return max_samples
    # By bytes, because the number of rows is known only at the end; never below those already seen.
    rows = max(records.rows, total_bytes * records.rows // records.bytes)
    return rows if max_samples is None else min(rows, max_samples)


def _batches(records: Iterable[tuple[tuple[int, Record | BadRow], int]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for record, record_bytes in records:
        batch.append(record)
        size += record_bytes
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
