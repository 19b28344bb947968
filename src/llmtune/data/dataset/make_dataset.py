"""Rows -> examples, the whole way: found, read, rendered, cut, compared, held out, and every row accounted for.

What is decided about a row alone is cached (`cache`); what depends on other rows (duplicates, overlap, the held-out
choice) is decided here, on the tables, each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtune.common.decisions import Decision
from llmtune.config.schema import DataConfig
from llmtune.data.dataset import selection
from llmtune.data.dataset.ledger import Ledger, LedgerPart
from llmtune.data.dataset.store import JoinedExamples, MappedExamples
from llmtune.data.dataset.tokenize import Progress, detect_formats, row_rules, tokenize_side
from llmtune.data.example import Conversation, ExampleSet
from llmtune.data.reading.data_files import DataFile, digest_files, find_files, find_held_out_files
from llmtune.data.reading.readers import Record
from llmtune.data.reading.records_of_files import BadRow, parse_record, read_records
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.formats import UnusableRowError, conversation_of
from llmtune.errors import ConfigError, DataError, Problem

__all__ = ["PreparedData", "Progress", "iter_texts", "prepare_data", "refuse_problems", "survey_data"]

BAD_ROWS_NAMED = 3
"""Rows that are named where none of them could be read for a tokenizer; `data report` names them all."""


@dataclass(frozen=True)
class PreparedData:
    """Examples to train on and to judge by, and what became of every row."""

    train: ExampleSet
    eval: ExampleSet | None
    ledger: Ledger
    decisions: list[Decision]
    problems: tuple[Problem, ...] = ()
    """Why these data may not be used; always empty when they come from `prepare_data`."""


def prepare_data(config: DataConfig, renderer: Renderer, *, progress: Progress | None = None) -> PreparedData:
    """Turn everything `config` names into examples.

    Raises DataError with every problem at once: rows that cannot be used (unless `on_bad_row` is skip), rows over
    `max_length` where `overlong` is error, overlap where `on_overlap` is error, nothing left to train on.
    """
    prepared = survey_data(config, renderer, progress=progress)
    refuse_problems(prepared)
    return prepared


def refuse_problems(prepared: PreparedData) -> None:
    """Raise DataError with the problems of a survey, if it has any."""
    if prepared.problems:
        raise DataError.all(prepared.problems)


def survey_data(config: DataConfig, renderer: Renderer, *, progress: Progress | None = None) -> PreparedData:
    """Do what `prepare_data` does, but hand back the problems instead of raising them, so that a report can show
    everything.

    Raises DataError only where there is nothing to show: a source that leads to no file, a file in no known format.
    """
    _check(config)
    train_files, eval_files, decisions = _find(config)
    digests = digest_files([*train_files, *eval_files])
    train, said = tokenize_side(config, "train", train_files, digests[: len(train_files)], renderer, progress)
    parts = [train]
    decisions += said
    if eval_files:
        held_out, said = tokenize_side(config, "eval", eval_files, digests[len(train_files) :], renderer, progress)
        parts.append(held_out)
        decisions += [one for one in said if one not in decisions]
    decisions += selection.unread_sources(train, train_files, config.max_samples)
    problems = [
        problem for part in parts for problem in selection.row_problems(part, row_rules(config), config.on_bad_row)
    ]
    selection.judge_duplicates(train, config.on_duplicate)
    for part in parts[1:]:
        problems += selection.judge_overlap(train, part.store, part.rows_that_are("used", "cut"), config.on_overlap)
    if config.test_size:
        taken, refused = selection.hold_out(train, config.test_size, config.shuffle_seed)
        problems += refused
        problems += selection.judge_overlap(train, train.store, taken, config.on_overlap)
    return _prepared(parts, decisions, problems)


def _prepared(parts: list[LedgerPart], decisions: list[Decision], problems: list[Problem]) -> PreparedData:
    """Collect the examples of every kept row; nothing left is a problem of its own, unless another explains it."""
    train = MappedExamples.of_rows(parts[0].store, parts[0].rows_that_are("used", "cut"))
    held_out = [MappedExamples.of_rows(part.store, part.rows_that_are("used", "cut")) for part in parts[1:]]
    taken = parts[0].rows_that_are("held_out")
    if len(taken):
        held_out.append(MappedExamples.of_rows(parts[0].store, taken))
    for name, examples, part in (
        ("train on", train, parts[0]),
        *(("judge by", one, part) for one, part in zip(held_out, parts[1:], strict=False)),
    ):
        if not len(examples) and not problems:
            problems.append(selection.nothing_left(part, name))
    evaluation = None if not held_out else held_out[0] if len(held_out) == 1 else JoinedExamples(held_out)
    return PreparedData(train, evaluation, Ledger(parts), decisions, tuple(problems))


def iter_texts(config: DataConfig) -> Iterator[str]:
    """Yield every text of the training rows (contents of messages, plain texts), for training a tokenizer.

    Bad rows are passed over.

    Raises DataError for a source that leads to no file, and at the end where every row was bad: with what is wrong with
    the first of them.
    """
    files = find_files(config.train, "train")
    formats, _ = detect_formats(config, files)
    good, bad = 0, list[Problem]()
    for index, record in read_records(files, config.max_samples):
        conversation = _conversation(record, files[index], formats[index], config.text_column)
        if isinstance(conversation, BadRow):
            bad += [conversation.problem()] if len(bad) < BAD_ROWS_NAMED else []
            continue
        good += 1
        if conversation.text is not None:
            yield conversation.text
        yield from (message.content for message in conversation.messages)
    if bad and not good:
        raise DataError.all(bad)


def _conversation(
    record: Record | BadRow, file: DataFile, row_format: str, text_column: str | None
) -> Conversation | BadRow:
    row = record if isinstance(record, BadRow) else parse_record(file, record)
    if isinstance(row, BadRow):
        return row
    try:
        return conversation_of(row, row_format, text_column)
    except UnusableRowError as error:
        return BadRow(row.source, error.field, error.what, error.fix)


# --- finding
# ----------------------------------------------------------------------------------------------------------------------


def _check(config: DataConfig) -> None:
    problems = []
    if not config.train:
        problems.append(Problem("no training data is named", "data.train", "name a file: `data.train=rows.jsonl`"))
    if config.max_length < 2:
        problems.append(
            Problem(f"{config.max_length} tokens are too few to train on", "data.max_length", "give at least 2")
        )
    if not (0 <= config.test_size < 1 or config.test_size == int(config.test_size) >= 1):
        fix = "give a fraction below 1, or a whole number of rows"
        problems.append(
            Problem(f"{config.test_size} is neither a fraction nor a number of rows", "data.test_size", fix)
        )
    for name, least in (("max_samples", 1), ("num_workers", 0), ("min_length", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            problems.append(Problem(f"{value} is too small", f"data.{name}", f"give at least {least}"))
    if problems:
        raise ConfigError.all(problems)


def _find(config: DataConfig) -> tuple[list[DataFile], list[DataFile], list[Decision]]:
    """Find the files of both sides; problems of both are raised at once."""
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
    if config.eval or config.test_size:
        return train, held_out, []
    held_out = find_held_out_files(config.train)
    names = ", ".join(file.label for file in held_out[:4])
    return (
        train,
        held_out,
        [Decision("data.eval", names, "the training folder holds files named as held out")] if held_out else [],
    )
