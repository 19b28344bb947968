"""Find the data files that a config names (as file, folder, glob, example or data set), in a fixed order."""

from __future__ import annotations

import contextlib
import difflib
import glob
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmtune.common.environment import home_expanded
from llmtune.common.text import printable
from llmtune.config.paths import shipped_path
from llmtune.config.schema import SourceConfig
from llmtune.data.reading.compression import COMPRESSION_ERRORS, open_bytes
from llmtune.data.reading.data_file import (
    READ_ENDINGS,
    DataFile,
    foreign_content,
    kind_of_file,
    part_of_a_file,
    way_from_ending,
)
from llmtune.data.reading.folders import SPLITS, Splits, UnknownConfigError, split_of_name, splits_of_config
from llmtune.data.reading.parse import DamagedFileError
from llmtune.data.reading.readers import kind_of_content
from llmtune.data.reading.split_slices import parse_split, slice_files
from llmtune.errors import DataError, LlmtuneError, Problem, in_one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = [
    "SPLITS_OF_PURPOSE",
    "Purpose",
    "find_files",
    "find_held_out_files",
    "is_folder",
    "is_pattern",
    "root_of",
    "split_stem",
]

Purpose = Literal["train", "eval"]

SPLITS_OF_PURPOSE: dict[Purpose, list[str]] = {"train": ["train"], "eval": ["validation", "test"]}
"""The splits whose files are of a purpose, the usual one first."""
_SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MEDIA_FEATURES = ("Audio", "Image", "Video", "Pdf")


class _SourceError(Exception):
    """A source of the config leads to nothing that can be read; holds (problem, fix) pairs, most often one."""

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(*problems)
        self.problems = problems


class _LabeledPath(NamedTuple):
    path: Path
    label: str


def find_files(sources: Sequence[SourceConfig], purpose: Purpose) -> list[DataFile]:
    """Find every file the sources name, in the order of the config and by name within one source.

    Raises DataError with all problems at once: no such file or example, a glob that matches nothing, a kind of file
    that is not read, a folder without the requested split, a data set that cannot be loaded.
    """
    files: list[DataFile] = []
    problems: list[Problem] = []
    for index, source in enumerate(sources):
        try:
            files.extend(_files_of(source, index, purpose))
        except _SourceError as error:
            problems += [Problem(problem, f"data.{purpose}[{index}]", fix) for problem, fix in error.problems]
    if problems:
        raise DataError.all(problems)
    return files


def find_held_out_files(sources: Sequence[SourceConfig]) -> list[DataFile]:
    """Files in the training folders that are named after a held-out split, where the config names no split."""
    files: list[DataFile] = []
    for index, source in enumerate(sources):
        unlimited = replace(source, max_samples=None)
        for split in ("validation", "test") if source.split is None and is_folder(source) else ():
            with contextlib.suppress(_SourceError):
                files += _files_of(replace(unlimited, split=split), index, "eval")
                break
    return files


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern, and not the name of a file that has such a mark in it."""
    return any(mark in path for mark in "*?[") and not home_expanded(path).exists()


def root_of(source: SourceConfig) -> Path:
    """The path of a source; that of an example lies among the files that come with the program."""
    name = source.path.removeprefix("example:")
    return _example_folder() / name if name != source.path else home_expanded(name)


def is_folder(source: SourceConfig) -> bool:
    """Whether a source is a folder of data files."""
    path = root_of(source)
    return path.is_dir() and not _is_saved_dataset(path)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED_DATASET_FILES)


def _files_of(source: SourceConfig, index: int, purpose: Purpose) -> list[DataFile]:
    """The files of a source, with the rows that its `split` takes."""
    if source.split is None:
        return _whole_files_of(source, index, purpose)
    parts = parse_split(source.split)
    if parts is None:
        fix = "write a name, a slice such as `train[:10%]` or `train[100:200]`, or several joined by `+`"
        raise _SourceError((f"`split: {source.split}` is no split", fix))
    files: list[DataFile] = []
    for part in parts:
        whole = _whole_files_of(replace(source, split=part.name or None), index, purpose)
        taken = slice_files(whole, part)
        if not taken:
            problem = f"`split: {source.split}` takes no row of the {sum(file.count() for file in whole):,} there are"
            raise _SourceError((problem, "give bounds within the rows"))
        files += [replace(file, source=source) for file in taken]
    return files


def _whole_files_of(source: SourceConfig, index: int, purpose: Purpose) -> list[DataFile]:
    if not source.path.strip():
        raise _SourceError(("the source has no path", "name a file, folder, glob, `example:NAME` or `datasets` name"))
    # Every call of the system would fail on it, with a ValueError that names nothing.
    if "\0" in source.path:
        raise _SourceError((f"{source.path!r} is not a path", "take the NUL character out"))
    if source.path.startswith("example:"):
        return [_data_file(file, source, index) for file in _example(source, purpose)]
    path = home_expanded(source.path)
    try:
        if path.is_dir():
            if _is_saved_dataset(path):
                _refuse_unused(source, "a saved data set", config=True)
                return [_saved_dataset(path, source, index, purpose)]
            return [_data_file(file, source, index) for file in _folder(path, source.path, source, purpose)]
        if path.exists():
            _refuse_unused(source, "a file", config=True, split=bool(source.split) and not _is_split_of(path, source))
            return [_data_file(_LabeledPath(path, source.path), source, index)]
    except OSError as error:
        problem = f"cannot look at {source.path!r}: {error.strerror}"
        raise _SourceError((problem, "check the path and its permissions")) from None
    if any(mark in source.path for mark in "*?["):
        return [_data_file(file, source, index) for file in _matches(path, source)]
    # A name with the ending of a file is a file that is missing, never the name of a data set to be downloaded.
    if kind_of_file(path) is not None or not _DATASET_NAME.fullmatch(source.path):
        names = [name.strip() for name in source.path.split(",")]
        fix = f"check the path; it is taken from the working folder{_near_name(path)}"
        part = part_of_a_file(source.path)
        if part is not None:
            fix = part
        elif path.is_symlink():
            fix = f"it is a link to {str(path.readlink())!r}, where there is nothing"
        elif source.path.startswith("file://"):
            fix = f"write the path alone: {source.path.removeprefix('file://')}"
        elif _URL.match(source.path):
            fix = "download it and name the file: no address is opened here"
        elif len(names) > 1 and all(kind_of_file(Path(name)) is not None for name in names):
            fix = f"write several as a list: 'data.{purpose}=[{','.join(names)}]'"
        raise _SourceError((f"there is no file {source.path!r}", fix))
    endings = [near for near in sorted(path.parent.glob(f"{glob.escape(path.name)}.*")) if kind_of_file(near)]
    if endings:
        fix = f"write its ending: {str(endings[0])!r}"
        raise _SourceError((f"there is no file {source.path!r}, and one of that name with an ending", fix))
    return [_hub_dataset(source, index, purpose)]


def _split_name(source: SourceConfig) -> str | None:
    return SPLITS.get(source.split.lower(), source.split) if source.split else None


def _is_split_of(path: Path, source: SourceConfig) -> bool:
    """Whether the split of a source is that of a single file: `train`, or the one that its name says."""
    return _split_name(source) in ("train", split_of_name(path))


def _refuse_unused(source: SourceConfig, what: str, *, config: bool = False, split: bool = False) -> None:
    """Raise _SourceError with each key among those marked that is given: this kind of source does not use it."""
    problems = []
    if config and source.config is not None:
        problem = f"{what} has no configurations, so `config: {source.config}` names nothing ({source.path!r})"
        problems.append((problem, "take `config` out, or name the data set's folder"))
    if split and source.split is not None:
        problem = f"{what} has no split {source.split!r} ({source.path!r})"
        problems.append((problem, "take `split` out; a slice such as `train[:10%]` takes some of its rows"))
    if problems:
        raise _SourceError(*problems)


def _matches(path: Path, source: SourceConfig) -> list[_LabeledPath]:
    """The files that match a pattern; with a split, those that are named after it, or all where no name says one."""
    _refuse_unused(source, "a pattern", config=True)
    # Sorted, because a file system lists names in any order, and the order of rows must not depend on it.
    names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - patterns may be absolute
    matches = [_LabeledPath(Path(name), name) for name in names if Path(name).is_file()]
    if not matches:
        fix = part_of_a_file(source.path) or "check the pattern; it is taken from the working folder"
        raise _SourceError((f"no file matches {source.path!r}", fix))
    requested = _split_name(source)
    by_split: Splits = {}
    for match in matches:
        by_split.setdefault(split_of_name(match.path), []).append(match.path)
    if requested is None or (set(by_split) == {None} and requested == "train"):
        return matches
    _refuse_unused(source, "the pattern", split=requested not in by_split)
    return [match for match in matches if match.path in by_split[requested]]


def _data_file(file: _LabeledPath, source: SourceConfig, index: int) -> DataFile:
    kind = kind_of_file(file.path)
    if kind is None:
        raise _SourceError((f"{file.label!r} is not a kind of file that is read", way_from_ending(file.path)))
    if not file.path.is_file():
        # A pipe (`<(zcat ...)`) gives its bytes one time only.
        fix = "copy what it holds into a file: rows are read more than once"
        raise _SourceError((f"{file.label!r} is not a plain file", fix))
    try:
        with open_bytes(file.path) as stream:
            foreign = foreign_content(stream.read(32), kind)
        if foreign is not None:
            raise _SourceError((f"{file.label!r} is {foreign[0]}, whatever its name says", foreign[1]))
        with open_bytes(file.path) as stream:
            kind = kind_of_content(stream, kind)
            # So that a file which may not be read is refused here, with all the others.
            stream.read(1)
    except (DamagedFileError, *COMPRESSION_ERRORS):
        pass  # reported with its line when the file is read
    except OSError as error:
        problem = f"cannot read {file.label!r}: {error.strerror or error}"
        raise _SourceError((problem, "check its permissions")) from None
    return DataFile(printable(file.label), kind, source, index, path=file.path)


def _near_name(path: Path) -> str:
    try:
        names = [sibling.name for sibling in path.parent.iterdir() if sibling.name != path.name]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


# --- folders


def split_stem(path: Path) -> str:
    """The name of a file without its endings and the number of its part.

    >>> split_stem(Path("train_sft-00000-of-00003.parquet"))
    'train_sft'
    """
    return re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", path.name.split(".")[0])


def _folder(path: Path, label: str, source: SourceConfig, purpose: Purpose) -> list[_LabeledPath]:
    split = source.split
    try:
        splits = splits_of_config(path, source.config)
    except UnknownConfigError as error:
        known = ", ".join(error.names)
        if source.config is not None:
            problem = f"the folder {label!r} has no config {source.config!r} (there are: {known or 'none'})"
            raise _SourceError((problem, "name one of them with `config`" if known else "take `config` out")) from None
        problem = f"the folder {label!r} has {len(error.names)} configs: {known}"
        raise _SourceError((problem, f"name one: `{{path: {label}, config: {error.names[0]}}}`")) from None
    if not splits:
        fix = f"put files into it that end in {READ_ENDINGS}"
        raise _SourceError((f"the folder {label!r} holds no file that is read", fix))
    named = {name for name in splits if name is not None}
    requested = [SPLITS.get(split.lower(), split)] if split else SPLITS_OF_PURPOSE[purpose]
    files = next((splits[name] for name in requested if name in splits), None)
    if files is None and split:
        files = [file for found in splits.values() for file in found if split_stem(file) == split] or None
    if files is None and not named and (not split or requested == ["train"]):
        files = splits[None]
    if files is None:
        known = ", ".join(sorted(named)) or "none"
        problem = f"the folder {label!r} has no {' or '.join(requested)} files (splits found by name: {known})"
        raise _SourceError((problem, "name the file itself, or set `split` to a split that is there"))
    return [_LabeledPath(file, str(Path(label) / file.relative_to(path))) for file in files]


def _example(source: SourceConfig, purpose: Purpose) -> list[_LabeledPath]:
    name = source.path.removeprefix("example:")
    root = _example_folder()
    by_name = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_dir() or kind_of_file(path) is not None
    }
    by_stem = {key.split(".")[0]: path for key, path in by_name.items()}
    path = by_name.get(name) or by_stem.get(name)
    if path is None:
        raise _SourceError((f"there is no example {name!r}", f"the examples are {', '.join(sorted(by_stem))}"))
    if path.is_dir():
        return _folder(path, f"example:{name}", source, purpose)
    _refuse_unused(source, "a file", config=True, split=bool(source.split) and not _is_split_of(path, source))
    return [_LabeledPath(path, f"example:{path.relative_to(root).as_posix()}")]


def _example_folder() -> Path:
    try:
        return Path(shipped_path("example-data"))
    except (LlmtuneError, FileNotFoundError) as error:
        raise _SourceError((f"the example data is missing: {error}", "install llmtune again")) from None


# --- data sets; `datasets` takes seconds to import, and most runs read plain files


def _saved_dataset(path: Path, source: SourceConfig, index: int, purpose: Purpose) -> DataFile:
    """Open a folder that `datasets` saved with `save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{source.path!r} is not a readable saved data set: {in_one_line(error)}"
        raise _SourceError((problem, "save it again with save_to_disk")) from None
    return _dataset_file(loaded, source.path, source, index, purpose)


def _hub_dataset(source: SourceConfig, index: int, purpose: Purpose) -> DataFile:
    """Load a data set by name through the `datasets` library, from its cache where there is no network."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = f"{source.path!r} is neither a file here nor a data set that can be had: {in_one_line(error)}"
        fix = "check the name, or download the data once with a network and name the file"
        raise _SourceError((problem, fix)) from None
    label = "/".join(part for part in (source.path, source.config) if part)
    return _dataset_file(loaded, label, source, index, purpose)


def _dataset_file(
    loaded: Dataset | DatasetDict, label: str, source: SourceConfig, index: int, purpose: Purpose
) -> DataFile:
    if isinstance(loaded, dict):  # a `DatasetDict`
        requested = [source.split] if source.split else SPLITS_OF_PURPOSE[purpose]
        split = next((name for name in requested if name in loaded), None)
        if split is None:
            problem = f"{label!r} has no split {' or '.join(requested)}"
            raise _SourceError((problem, f"set `split` to one of {', '.join(loaded)}"))
        loaded, label = loaded[split], f"{label}/{split}"
    else:
        own_split = str(loaded.split) if loaded.split is not None else None
        _refuse_unused(source, "the saved data set", split=source.split not in (None, "train", own_split))
    media = [name for name, feature in loaded.features.items() if type(feature).__name__ in _MEDIA_FEATURES]
    if media:
        loaded = loaded.remove_columns(media)  # reading such a column would open the files or URLs in its rows
    return DataFile(label, "dataset", source, index, dataset=loaded)
