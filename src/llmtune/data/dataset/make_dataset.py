"""Make the examples of a run from its data files: find, read, tokenize, compare, hold out, and account for every row.

The status of a row by itself is cached (`cache`); what depends on other rows (duplicates, overlap, the held-out choice)
is computed here, on the tables, each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtune.common.decisions import Decision
from llmtune.config.schema import DataConfig
from llmtune.data.dataset import selection
from llmtune.data.dataset.ledger import Ledger, LedgerPart
from llmtune.data.dataset.mixture import mixture_of
from llmtune.data.dataset.parts import Part
from llmtune.data.dataset.row_result import conversations_of
from llmtune.data.dataset.store import JoinedExamples, MappedExamples
from llmtune.data.dataset.tokenize import Progress, detect_formats, row_rules, tokenize_part, tokenize_side
from llmtune.data.example import Conversation, Row
from llmtune.data.reading.data_file import DataFile, digest_files, read_records
from llmtune.data.reading.find_files import (
    SPLITS_OF_PURPOSE,
    Purpose,
    find_files,
    find_held_out_files,
    is_folder,
    is_pattern,
    root_of,
    split_stem,
)
from llmtune.data.reading.folders import split_of_name
from llmtune.data.reading.parse import BadRow, Record
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.formats import Recognize
from llmtune.data.rows.row_fields import UnusableRowError
from llmtune.errors import ConfigError, DataError, Problem

__all__ = [
    "PreparedData",
    "Progress",
    "iter_conversations",
    "iter_texts",
    "named_twice",
    "prepare_data",
    "prepare_part",
    "raise_problems",
    "rows_of",
    "survey_data",
    "swept_in",
]

BAD_ROWS_SHOWN = 3
"""Bad rows listed where none of the rows could be read for a tokenizer; `data report` lists them all."""


@dataclass(frozen=True)
class PreparedData:
    """The examples to train on and to evaluate on, and the status of every row."""

    train: MappedExamples
    eval: MappedExamples | JoinedExamples | None
    ledger: Ledger
    decisions: list[Decision]
    problems: tuple[Problem, ...] = ()
    """Why these data may not be used; always empty when they come from `prepare_data`."""


def prepare_data(
    config: DataConfig,
    renderer: Renderer,
    *,
    formats: Mapping[str, Recognize] | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Make the examples of all sources in `config`, their format detected among `formats` (FORMATS where None).

    Raises DataError with every problem at once: rows that cannot be used (unless `on_bad_row` is skip), rows over
    `max_length` where `overlong` is error, overlap where `on_overlap` is error, no row left to train on.
    """
    prepared = survey_data(config, renderer, formats=formats, progress=progress)
    raise_problems(prepared)
    return prepared


def raise_problems(prepared: PreparedData) -> None:
    """Raise DataError with the problems of a survey, if there are any."""
    if prepared.problems:
        raise DataError.all(prepared.problems)


def prepare_part(
    config: DataConfig,
    renderer: Renderer,
    part: Part,
    *,
    formats: Mapping[str, Recognize] | None = None,
    progress: Progress | None = None,
) -> list[int]:
    """Tokenize one part of the rows of all sources into the cache, and join the parts with the last one.

    Returns the numbers of the parts that are missing. Raises as `survey_data`, and MachineError without a cache folder.
    """
    _check(config)
    train, held_out, _ = _find(config)
    digests = digest_files([*train, *held_out])
    missing = tokenize_part(config, "train", train, digests[: len(train)], renderer, part, progress, formats)
    if held_out:
        own = digests[len(train) :]
        missing += tokenize_part(config, "eval", held_out, own, renderer, part, progress, formats)
    return sorted(set(missing))


def survey_data(
    config: DataConfig,
    renderer: Renderer,
    *,
    formats: Mapping[str, Recognize] | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Make the examples like `prepare_data`, but return problems instead of raising them: a report shows them all.

    Raises ConfigError for settings out of range, DataError where there is nothing to show: a source that leads to no
    file, a file in no known format.
    """
    _check(config)
    train_files, eval_files, decisions = _find(config)
    digests = digest_files([*train_files, *eval_files])
    train, train_decisions = tokenize_side(
        config, "train", train_files, digests[: len(train_files)], renderer, progress, formats
    )
    parts = [train]
    decisions += train_decisions
    if eval_files:
        side, side_decisions = tokenize_side(
            config, "eval", eval_files, digests[len(train_files) :], renderer, progress, formats
        )
        parts.append(side)
        decisions += [decision for decision in side_decisions if decision not in decisions]
    decisions += selection.unread_sources(train, train_files, config.max_samples)
    problems = [
        problem for part in parts for problem in selection.row_problems(part, row_rules(config), config.on_bad_row)
    ]
    # The order decides the status of a row for which several would fit: duplicate and overlap before held out.
    selection.mark_duplicates(train, config.on_duplicate)
    for part in parts[1:]:
        eval_rows = part.rows_with_status("used", "cut")
        problems += selection.mark_overlap(train, part.store, eval_rows, config.on_overlap)
    if config.test_size:
        held_out, held_out_problems = selection.hold_out(train, config.test_size, config.shuffle_seed)
        problems += held_out_problems
        problems += selection.mark_overlap(train, train.store, held_out, config.on_overlap)
    return _mixed(_collect(parts, decisions, problems), config)


def _collect(parts: list[LedgerPart], decisions: list[Decision], problems: list[Problem]) -> PreparedData:
    """Collect the examples of all kept rows; an empty side is a problem, unless another problem explains it."""
    train, *evaluation = (MappedExamples.of_rows(part.store, part.rows_with_status("used", "cut")) for part in parts)
    purposes = ["train on", *("judge by" for _ in evaluation)]
    for purpose, examples, part in zip(purposes, (train, *evaluation), parts, strict=True):
        if not len(examples) and not problems:
            problems.append(selection.no_rows_problem(part, purpose))
    held_out = parts[0].rows_with_status("held_out")
    if len(held_out):
        evaluation.append(MappedExamples.of_rows(parts[0].store, held_out))
    joined = JoinedExamples(evaluation) if len(evaluation) > 1 else next(iter(evaluation), None)
    return PreparedData(train, joined, Ledger(parts), decisions, tuple(problems))


def _mixed(prepared: PreparedData, config: DataConfig) -> PreparedData:
    """Add what an epoch has of each source, where that is not every row once, or why it cannot be."""
    if not config.is_mixed or prepared.problems:
        return prepared
    try:
        mixture = mixture_of(prepared.train, config.train)
    except DataError as error:
        return replace(prepared, problems=error.problems)
    return replace(prepared, decisions=[*prepared.decisions, *mixture.decisions(config.train)])


def iter_texts(config: DataConfig, formats: Mapping[str, Recognize] | None = None) -> Iterator[str]:
    """Yield every text of the training rows (contents of messages, plain texts), for training a tokenizer.

    Bad rows are skipped. Raises DataError for a source that leads to no file, and at the end where every row was bad.
    """
    good, bad = 0, list[Problem]()
    for conversations in iter_conversations(config, formats):
        if isinstance(conversations, BadRow):
            bad += [conversations.as_problem()] if len(bad) < BAD_ROWS_SHOWN else []
            continue
        good += 1
        first, *others = conversations
        if first.text is not None:
            yield first.text
        yield from (message.content for message in first.messages)
        # The prompt of a pair counts once: what the other side has beside it begins where the two part.
        for other in others:
            yield from (message.content for message in other.messages if message not in first.messages)
    if bad and not good:
        raise DataError.all(bad)


def iter_conversations(
    config: DataConfig, formats: Mapping[str, Recognize] | None = None
) -> Iterator[tuple[Conversation, ...] | BadRow]:
    """Yield the conversations of each training row, one for each of its sides, in the order of the files.

    Raises DataError for a source that leads to no file.
    """
    files = find_files(config.train, "train")
    names, _ = detect_formats(config, files, formats)
    for index, record in read_records(files, config.max_samples):
        text_column = files[index].source.text_column or config.text_column
        yield _conversations(record, files[index], names[index], text_column)


def rows_of(config: DataConfig) -> dict[str, Row]:
    """Read the training and held-out rows once more, by their source; those that cannot be read are left out.

    Raises DataError for a source that leads to no file.
    """
    train, held_out, _ = _find(config)
    found: dict[str, Row] = {}
    for files, limit in ((train, config.max_samples), (held_out, None)):
        for index, record in read_records(files, limit):
            row = files[index].parse(record)
            if not isinstance(row, BadRow):
                found[row.source] = row
    return found


def _conversations(
    record: Record | BadRow, file: DataFile, row_format: str, text_column: str | None
) -> tuple[Conversation, ...] | BadRow:
    row = file.parse(record)
    if isinstance(row, BadRow):
        return row
    try:
        return conversations_of(row, row_format, text_column)
    except UnusableRowError as error:
        return BadRow(row.source, error.field, error.problem, error.fix)


def _check(config: DataConfig) -> None:
    """Raise ConfigError with every setting that is out of range."""
    problems = []
    if not config.train:
        problems.append(Problem("no training data is named", "data.train", "name a file: `data.train=rows.jsonl`"))
    if config.max_length < 2:
        problem = f"{config.max_length} tokens are too few to train on"
        problems.append(Problem(problem, "data.max_length", "give at least 2"))
    if not (0 <= config.test_size < 1 or config.test_size == int(config.test_size) >= 1):
        problem = f"{config.test_size} is neither a fraction nor a number of rows"
        fix = "give a fraction below 1, or a whole number of rows"
        problems.append(Problem(problem, "data.test_size", fix))
    for name, least in (("max_samples", 1), ("num_workers", 0), ("min_length", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            problems.append(Problem(f"{value} is too small", f"data.{name}", f"give at least {least}"))
    if problems:
        raise ConfigError.all(problems)


def _find(config: DataConfig) -> tuple[list[DataFile], list[DataFile], list[Decision]]:
    """Find the files of both sides. Raises DataError with the problems of both."""
    problems: list[Problem] = []
    train: list[DataFile] = []
    held_out: list[DataFile] = []
    try:
        train = find_files(config.train, "train")
    except DataError as error:
        problems += error.problems
    try:
        held_out = find_files(config.eval, "eval")
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError.all(problems)
    decisions = [*swept_in(train, "train"), *swept_in(held_out, "eval"), *named_twice(train, "train")]
    if config.eval or config.test_size:
        return train, held_out, decisions
    held_out = find_held_out_files(config.train)
    if not held_out:
        return train, [], decisions
    labels = ", ".join(file.label for file in held_out[:4])
    decisions.append(Decision("data.eval", labels, "the training folder holds files named as held out"))
    return train, held_out, decisions


def swept_in(files: Sequence[DataFile], purpose: Purpose) -> list[Decision]:
    """A decision for each source in which a pattern or a folder also takes files that may not be meant.

    A pattern takes those that are named after another split; a folder those of several folders inside, or of several
    splits of one kind (`train_sft`, `train_gen`).
    """
    decisions: list[Decision] = []
    for index in dict.fromkeys(file.source_index for file in files):
        own = [file for file in files if file.source_index == index and file.path is not None]
        if not own or own[0].source.split is not None:
            continue
        found = _swept_by_pattern(own, purpose) if is_pattern(own[0].source.path) else _swept_by_folder(own)
        if found is not None:
            decisions.append(Decision(f"data.{purpose}[{index}]", *found))
    return decisions


def _swept_by_pattern(files: list[DataFile], purpose: Purpose) -> tuple[str, str] | None:
    others = [file.label for file in files if not _fits(split_of_name(Path(file.label)), purpose)]
    if len(others) in (0, len(files)):  # a pattern of test files alone says so itself
        return None
    shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    way_out = f"to leave them out, set `split: {SPLITS_OF_PURPOSE[purpose][0]}`"
    return f"{len(files)} files", f"the pattern also takes {shown}; {way_out}"


def _swept_by_folder(files: list[DataFile]) -> tuple[str, str] | None:
    source = files[0].source
    if source.config is not None or not is_folder(source):
        return None
    root, paths = root_of(source), [file.path for file in files if file.path is not None]
    inside = {path.parent.name for path in paths if path.parent != root}
    if len(inside) > 1:
        return ", ".join(sorted(inside)), "files of all these folders are read; to read one, name it with `config`"
    stems = {split_stem(path) for path in paths}
    if len(stems) > 1 and all(split_of_name(Path(stem)) for stem in stems):
        return ", ".join(sorted(stems)), "files of all these splits are read; to read one, name it with `split`"
    return None


def _fits(split: str | None, purpose: Purpose) -> bool:
    return split is None or split in SPLITS_OF_PURPOSE[purpose]


def named_twice(files: Sequence[DataFile], purpose: Purpose) -> Iterator[Decision]:
    """A decision for each file that several sources read in the same way: its rows count as often."""
    first: dict[object, DataFile] = {}
    for file in files:
        source = file.source
        if file.path is None:
            continue
        read = (file.path.resolve(), file.rows, tuple(source.columns.items()), source.format, source.text_column)
        earlier = first.setdefault(read, file)
        if earlier.source_index != file.source_index:
            reason = f"it is read for data.{purpose}[{earlier.source_index}] too; to mean that, write `repeat: 2` there"
            yield Decision(f"data.{purpose}[{file.source_index}]", file.label, reason)
