"""What is said of the sources of a config: files that a pattern or a folder also takes, and files named twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtune.common.decisions import Decision
from llmtune.data.reading.data_file import DataFile
from llmtune.data.reading.find_files import SPLITS_OF_PURPOSE, Purpose, is_folder, is_pattern, root_of, split_stem
from llmtune.data.reading.folders import split_of_name

__all__ = ["named_twice", "swept_in"]


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
