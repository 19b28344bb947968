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

from llmtune.common.folders import home_expanded
from llmtune.common.text import printable
from llmtune.config.presets import shipped_path
from llmtune.config.schema import SourceConfig
from llmtune.data.reading.compression import COMPRESSION_ERRORS, COMPRESSIONS, open_bytes
from llmtune.data.reading.data_file import DataFile
from llmtune.data.reading.readers import READERS, DamagedFileError, is_json_lines
from llmtune.errors import DataError, LlmtuneError, Problem, in_one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["Purpose", "find_files", "find_held_out_files", "folder_splits", "split_of_name"]

Purpose = Literal["train", "eval"]

_SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "heldout": "validation",
    "test": "test",
}
_SPLITS_OF_PURPOSE: dict[Purpose, list[str]] = {"train": ["train"], "eval": ["validation", "test"]}
_SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SUFFIXES = ".jsonl, .json, .csv, .tsv, .parquet or .txt, each also with .gz or .zst"
_MEDIA_FEATURES = ("Audio", "Image", "Video", "Pdf")


class _SourceError(Exception):
    """A source of the config leads to nothing that can be read."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


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
            problems.append(Problem(error.problem, f"data.{purpose}[{index}]", error.fix))
    if problems:
        raise DataError.all(problems)
    return files


def find_held_out_files(sources: Sequence[SourceConfig]) -> list[DataFile]:
    """Files in the training folders that are named after a held-out split, where the config names no split."""
    files: list[DataFile] = []
    for index, source in enumerate(sources):
        unlimited = replace(source, max_samples=None)
        for split in ("validation", "test") if source.split is None and _is_folder(source) else ():
            with contextlib.suppress(_SourceError):
                files += _files_of(replace(unlimited, split=split), index, "eval")
                break
    return files


def _is_folder(source: SourceConfig) -> bool:
    name = source.path.removeprefix("example:")
    path = shipped_path("example-data") / name if name != source.path else home_expanded(name)
    return path.is_dir() and not _is_saved_dataset(path)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED_DATASET_FILES)


def _files_of(source: SourceConfig, index: int, purpose: Purpose) -> list[DataFile]:
    if not source.path.strip():
        raise _SourceError("the source has no path", "name a file, folder, glob, `example:NAME` or `datasets` name")
    if "\0" in source.path:
        raise _SourceError(f"{source.path!r} is not a path", "take the NUL character out")
    if source.path.startswith("example:"):
        return [_data_file(file, source, index) for file in _example(source, purpose)]
    path = home_expanded(source.path)
    try:
        if path.is_dir():
            if _is_saved_dataset(path):
                return [_saved_dataset(path, source, index, purpose)]
            return [_data_file(file, source, index) for file in _folder(path, source.path, source.split, purpose)]
        if path.exists():
            return [_data_file(_LabeledPath(path, source.path), source, index)]
    except OSError as error:
        problem = f"cannot look at {source.path!r}: {error.strerror}"
        raise _SourceError(problem, "check the path and its permissions") from None
    if any(mark in source.path for mark in "*?["):
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - patterns may be absolute
        matches = [_LabeledPath(Path(name), name) for name in names if Path(name).is_file()]
        if not matches:
            fix = "check the pattern; it is taken from the working folder"
            raise _SourceError(f"no file matches {source.path!r}", fix)
        return [_data_file(file, source, index) for file in matches]
    # A name with the ending of a file is a file that is missing, never the name of a data set to be downloaded.
    if _kind(path) is not None or not _DATASET_NAME.fullmatch(source.path):
        fix = f"check the path; it is taken from the working folder{_near_name(path)}"
        raise _SourceError(f"there is no file {source.path!r}", fix)
    return [_hub_dataset(source, index, purpose)]


def _data_file(file: _LabeledPath, source: SourceConfig, index: int) -> DataFile:
    kind = _kind(file.path)
    if kind is None:
        fix = f"give it the right ending: {_SUFFIXES}"
        raise _SourceError(f"{file.label!r} is not a kind of file that is read", fix)
    if not file.path.is_file():
        fix = "copy what it holds into a file: rows are read more than once"
        raise _SourceError(f"{file.label!r} is not a plain file", fix)
    try:
        with open_bytes(file.path) as stream:
            if kind == ".json" and is_json_lines(stream):
                kind = ".jsonl"
            stream.read(1)
    except (DamagedFileError, *COMPRESSION_ERRORS):
        pass  # reported with its line when the file is read
    except OSError as error:
        problem = f"cannot read {file.label!r}: {error.strerror or error}"
        raise _SourceError(problem, "check its permissions") from None
    return DataFile(printable(file.label), kind, source, index, path=file.path)


def _kind(path: Path) -> str | None:
    """The key of `READERS` for this file name, below its .gz or .zst."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    kind = name.suffix.lower()
    return kind if kind in READERS and kind.startswith(".") else None


def _near_name(path: Path) -> str:
    try:
        names = [sibling.name for sibling in path.parent.iterdir() if sibling.name != path.name]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


# --- folders


def split_of_name(path: Path) -> str | None:
    """The split in the name of a file (or of its folder), if any.

    >>> split_of_name(Path("train-00000-of-00002.parquet")), split_of_name(Path("my_dev.jsonl"))
    ('train', 'validation')
    >>> split_of_name(Path("rows.csv"))
    """
    for part in (path.name.split(".")[0], path.parent.name):
        words = [word for word in re.split(r"[-_. ]", part.lower()) if word]
        for word in (*words[:1], *words[-1:]):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def folder_splits(path: Path) -> dict[str | None, list[Path]]:
    """Data files of a folder and the folders in it, by the split in their names (None: without one)."""
    splits: dict[str | None, list[Path]] = {}
    for file in sorted([*path.glob("*"), *path.glob("*/*")]):
        if _kind(file) is not None and file.is_file() and not file.name.startswith("."):
            splits.setdefault(split_of_name(file.relative_to(path)), []).append(file)
    return splits


def _folder(path: Path, label: str, split: str | None, purpose: Purpose) -> list[_LabeledPath]:
    splits = folder_splits(path)
    if not splits:
        fix = f"put files into it that end in {_SUFFIXES}"
        raise _SourceError(f"the folder {label!r} holds no file that is read", fix)
    named = {name for name in splits if name is not None}
    requested = [_SPLITS.get(split.lower(), split)] if split else _SPLITS_OF_PURPOSE[purpose]
    files = next((splits[name] for name in requested if name in splits), None)
    if files is None and not named and not split:
        files = splits[None]
    if files is None:
        known = ", ".join(sorted(named)) or "none"
        problem = f"the folder {label!r} has no {' or '.join(requested)} files (splits found by name: {known})"
        raise _SourceError(problem, "name the file itself, or set `split`")
    return [_LabeledPath(file, str(Path(label) / file.relative_to(path))) for file in files]


def _example(source: SourceConfig, purpose: Purpose) -> list[_LabeledPath]:
    name = source.path.removeprefix("example:")
    root = _example_folder()
    by_name = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_dir() or _kind(path) is not None
    }
    by_stem = {key.split(".")[0]: path for key, path in by_name.items()}
    path = by_name.get(name) or by_stem.get(name)
    if path is None:
        raise _SourceError(f"there is no example {name!r}", f"the examples are {', '.join(sorted(by_stem))}")
    if path.is_dir():
        return _folder(path, f"example:{name}", source.split, purpose)
    return [_LabeledPath(path, f"example:{path.relative_to(root).as_posix()}")]


def _example_folder() -> Path:
    try:
        return Path(shipped_path("example-data"))
    except (LlmtuneError, FileNotFoundError) as error:
        raise _SourceError(f"the example data is missing: {error}", "install llmtune again") from None


# --- data sets; `datasets` takes seconds to import, and most runs read plain files


def _saved_dataset(path: Path, source: SourceConfig, index: int, purpose: Purpose) -> DataFile:
    """Open a folder that `datasets` saved with `save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{source.path!r} is not a readable saved data set: {in_one_line(error)}"
        raise _SourceError(problem, "save it again with save_to_disk") from None
    return _dataset_file(loaded, source.path, source, index, purpose)


def _hub_dataset(source: SourceConfig, index: int, purpose: Purpose) -> DataFile:
    """Load a data set by name through the `datasets` library, from its cache where there is no network."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = f"{source.path!r} is neither a file here nor a data set that can be had: {in_one_line(error)}"
        fix = "check the name, or download the data once with a network and name the file"
        raise _SourceError(problem, fix) from None
    label = "/".join(part for part in (source.path, source.config) if part)
    return _dataset_file(loaded, label, source, index, purpose)


def _dataset_file(
    loaded: Dataset | DatasetDict, label: str, source: SourceConfig, index: int, purpose: Purpose
) -> DataFile:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        requested = [source.split] if source.split else _SPLITS_OF_PURPOSE[purpose]
        split = next((name for name in requested if name in loaded), None)
        if split is None:
            problem = f"{label!r} has no split {' or '.join(requested)}"
            raise _SourceError(problem, f"set `split` to one of {', '.join(loaded)}")
        loaded, label = loaded[split], f"{label}/{split}"
    media = [name for name, feature in loaded.features.items() if type(feature).__name__ in _MEDIA_FEATURES]
    if media:
        loaded = loaded.remove_columns(media)  # reading such a column would open the files or URLs in its rows
    return DataFile(label, "dataset", source, index, dataset=loaded)
