"""From what a config names (a file, folder, glob, example, data set) to the files that are read, in a fixed order."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmtune.common.text import printable
from llmtune.config.presets import shipped_path
from llmtune.config.schema import SourceConfig
from llmtune.data.reading.readers import (
    COMPRESSIONS,
    READERS,
    DamagedFileError,
    Numbering,
    compression_errors,
    is_json_lines,
    open_bytes,
)
from llmtune.errors import DataError, LlmtuneError, Problem, in_one_line

__all__ = [
    "DataFile",
    "Purpose",
    "digest_files",
    "find_files",
    "find_held_out_files",
    "folder_splits",
    "home_expanded",
    "split_of_name",
]

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
_SAVED = ("dataset_info.json", "dataset_dict.json")
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SUFFIXES = ".jsonl, .json, .csv, .tsv, .parquet or .txt, each also with .gz or .zst"


@dataclass(frozen=True)
class DataFile:
    """One file (or data set) to read: the name its rows go by, its kind (a row of `READERS`), and what the config says
    about it.
    """

    label: str
    kind: str
    source: SourceConfig
    source_index: int
    path: Path | None = None
    dataset: Any = None
    """The opened data set where `kind` is `dataset`; it is never sent to another process."""

    @property
    def numbering(self) -> Numbering:
        """How this file's rows are numbered."""
        return READERS[self.kind].numbering

    def size_bytes(self) -> int:
        """Bytes on disk; 0 where nobody knows."""
        return self.path.stat().st_size if self.path is not None else 0

    def digest(self) -> str:
        """sha256 of the file's bytes, or of the files a data set lies in. Raises DataError."""
        if self.path is not None:
            return _sha256(self.path)
        digest = hashlib.sha256(f"{len(self.dataset)} {self.dataset.column_names}".encode())
        files = [Path(one["filename"]) for one in self.dataset.cache_files]
        if not files or self.dataset._indices is not None:
            digest.update(self.dataset._fingerprint.encode())
        for path in files:
            digest.update(_sha256(path).encode())
        return digest.hexdigest()


class _NotFoundError(Exception):
    """One source of the config leads to nothing that can be read."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class _Place(NamedTuple):
    path: Path
    label: str


def find_files(sources: Sequence[SourceConfig], purpose: Purpose) -> list[DataFile]:
    """Find every file the sources name, in the order of the config and by name within one source.

    Raises DataError with all problems at once: no such file or example, a glob that matches nothing, a kind of file
    that is not read, a folder without the asked split, a data set that cannot be had.
    """
    files: list[DataFile] = []
    problems: list[Problem] = []
    for index, source in enumerate(sources):
        try:
            files.extend(_files_of(source, index, purpose))
        except _NotFoundError as refused:
            problems.append(Problem(refused.what, f"data.{purpose}[{index}]", refused.fix))
    if problems:
        raise DataError.all(problems)
    return files


def find_held_out_files(sources: Sequence[SourceConfig]) -> list[DataFile]:
    """Files that stand in the training folders under the name of a held-out split, where the config names no split."""
    files: list[DataFile] = []
    for index, source in enumerate(sources):
        whole = replace(source, max_samples=None)
        for split in ("validation", "test") if source.split is None and _is_folder(source) else ():
            with contextlib.suppress(_NotFoundError):
                files += _files_of(replace(whole, split=split), index, "eval")
                break
    return files


def _is_folder(source: SourceConfig) -> bool:
    name = source.path.removeprefix("example:")
    path = shipped_path("example-data") / name if name != source.path else home_expanded(name)
    return path.is_dir() and not any((path / info).is_file() for info in _SAVED)


def _files_of(source: SourceConfig, index: int, purpose: Purpose) -> list[DataFile]:
    if not source.path.strip():
        raise _NotFoundError("the source has no path", "name a file, folder, glob, `example:NAME` or `datasets` name")
    if "\0" in source.path:
        raise _NotFoundError(f"{source.path!r} is not a path", "take the NUL character out")
    if source.path.startswith("example:"):
        return [_data_file(place, source, index) for place in _example(source, purpose)]
    path = home_expanded(source.path)
    try:
        if path.is_dir():
            if any((path / info).is_file() for info in _SAVED):
                return [_saved_dataset(path, source, index, purpose)]
            return [_data_file(place, source, index) for place in _folder(path, source.path, source.split, purpose)]
        if path.exists():
            return [_data_file(_Place(path, source.path), source, index)]
    except OSError as error:
        raise _NotFoundError(
            f"cannot look at {source.path!r}: {error.strerror}", "check the path and its permissions"
        ) from None
    if any(mark in source.path for mark in "*?["):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - patterns may be absolute
        matches = [_Place(Path(one), one) for one in found if Path(one).is_file()]
        if not matches:
            raise _NotFoundError(
                f"no file matches {source.path!r}", "check the pattern; it is taken from the working folder"
            )
        return [_data_file(place, source, index) for place in matches]
    if _kind(path) is not None or not _DATASET_NAME.fullmatch(source.path):
        raise _NotFoundError(
            f"there is no file {source.path!r}",
            f"check the path; it is taken from the working folder{_neighbour(path)}",
        )
    return [_hub_dataset(source, index, purpose)]


def home_expanded(path: str) -> Path:
    """The path with a leading `~` filled in; left as it is where there is no such home folder."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def _data_file(place: _Place, source: SourceConfig, index: int) -> DataFile:
    kind = _kind(place.path)
    if kind is None:
        raise _NotFoundError(
            f"{place.label!r} is not a kind of file that is read", f"give it the right ending: {_SUFFIXES}"
        )
    if not place.path.is_file():
        raise _NotFoundError(
            f"{place.label!r} is not a plain file", "copy what it holds into a file: rows are read more than once"
        )
    try:
        with open_bytes(place.path) as stream:
            if kind == ".json" and is_json_lines(stream):
                kind = ".jsonl"
            stream.read(1)
    except DamagedFileError:
        pass  # said with its place when it is read
    except OSError as error:
        if error.errno is not None:
            raise _NotFoundError(f"cannot read {place.label!r}: {error.strerror}", "check its permissions") from None
    except compression_errors():
        pass  # likewise
    return DataFile(printable(place.label), kind, source, index, path=place.path)


def _kind(path: Path) -> str | None:
    """The row of `READERS` for this file name, below its .gz or .zst."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    kind = name.suffix.lower()
    return kind if kind in READERS and kind.startswith(".") else None


def _neighbour(path: Path) -> str:
    import difflib

    try:
        names = [one.name for one in path.parent.iterdir() if one.name != path.name]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


# --- folders
# ----------------------------------------------------------------------------------------------------------------------


def split_of_name(path: Path) -> str | None:
    """The split a file's name (or its folder's) says it belongs to.

    >>> split_of_name(Path("train-00000-of-00002.parquet")), split_of_name(Path("my_dev.jsonl")), split_of_name(Path("rows.csv"))
    ('train', 'validation', None)
    """
    for part in (path.name.split(".")[0], path.parent.name):
        words = [word for word in re.split(r"[-_. ]", part.lower()) if word]
        for word in (*words[:1], *words[-1:]):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def folder_splits(path: Path) -> dict[str | None, list[Path]]:
    """Data files of a folder (one level of folders below it included) by the split their names say.

    None: they say none.
    """
    found: dict[str | None, list[Path]] = {}
    for one in sorted([*path.glob("*"), *path.glob("*/*")]):
        if _kind(one) is not None and one.is_file() and not one.name.startswith("."):
            split = split_of_name(one.relative_to(path))
            found.setdefault(split, []).append(one)
    return found


def _folder(path: Path, label: str, split: str | None, purpose: Purpose) -> list[_Place]:
    splits = folder_splits(path)
    if not splits:
        raise _NotFoundError(
            f"the folder {label!r} holds no file that is read", f"put files into it that end in {_SUFFIXES}"
        )
    named = {one for one in splits if one is not None}
    wanted = (
        [_SPLITS.get(split.lower(), split)] if split else ["train"] if purpose == "train" else ["validation", "test"]
    )
    chosen = next((splits[one] for one in wanted if one in splits), None)
    if chosen is None and not named and not split:
        chosen = splits[None]
    if chosen is None:
        known = ", ".join(sorted(named)) or "none"
        asked = " or ".join(wanted)
        raise _NotFoundError(
            f"the folder {label!r} has no {asked} files (splits found by name: {known})",
            "name the file itself, or set `split`",
        )
    return [_Place(one, str(Path(label) / one.relative_to(path))) for one in chosen]


def _example(source: SourceConfig, purpose: Purpose) -> list[_Place]:
    name = source.path.removeprefix("example:")
    root = _shipped("example-data")
    by_name = {
        one.relative_to(root).as_posix(): one
        for one in sorted(root.rglob("*"))
        if one.is_dir() or _kind(one) is not None
    }
    by_stem = {key.split(".")[0]: one for key, one in by_name.items()}
    found = by_name.get(name) or by_stem.get(name)
    if found is None:
        raise _NotFoundError(f"there is no example {name!r}", f"the examples are {', '.join(sorted(by_stem))}")
    if found.is_dir():
        return _folder(found, f"example:{name}", source.split, purpose)
    return [_Place(found, f"example:{found.relative_to(root).as_posix()}")]


def _shipped(name: str) -> Path:
    try:
        return Path(shipped_path(name))
    except (LlmtuneError, FileNotFoundError) as error:
        raise _NotFoundError(f"the example data is missing: {error}", "install llmtune again") from None


# --- data sets
# --------------------------------------------------------------------------------------------------------------------


def _saved_dataset(path: Path, source: SourceConfig, index: int, purpose: Purpose) -> DataFile:
    """Open a folder that `datasets` saved with `save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _NotFoundError(
            f"{source.path!r} is not a readable saved data set: {in_one_line(error)}", "save it again with save_to_disk"
        ) from None
    return _dataset_file(loaded, source.path, source, index, purpose)


def _hub_dataset(source: SourceConfig, index: int, purpose: Purpose) -> DataFile:
    """Load a data set by name through the `datasets` library, from its cache where there is no network."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = f"{source.path!r} is neither a file here nor a data set that can be had: {in_one_line(error)}"
        raise _NotFoundError(
            what, "check the name, or download the data once with a network and name the file"
        ) from None
    label = "/".join(one for one in (source.path, source.config) if one)
    return _dataset_file(loaded, label, source, index, purpose)


def _dataset_file(loaded: Any, label: str, source: SourceConfig, index: int, purpose: Purpose) -> DataFile:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        wanted = [source.split] if source.split else ["train"] if purpose == "train" else ["validation", "test"]
        split = next((one for one in wanted if one in loaded), None)
        if split is None:
            raise _NotFoundError(
                f"{label!r} has no split {' or '.join(wanted)}", f"set `split` to one of {', '.join(loaded)}"
            )
        loaded, label = loaded[split], f"{label}/{split}"
    media = [
        name
        for name, feature in loaded.features.items()
        if type(feature).__name__ in ("Audio", "Image", "Video", "Pdf")
    ]
    if media:
        # Reading such a column would open what its rows point to.
        loaded = loaded.remove_columns(media)
    return DataFile(label, "dataset", source, index, dataset=loaded)


# --- digests
# ----------------------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    try:
        with path.open("rb", 0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror}", str(path), "check its permissions and its disk"
        ) from None


def digest_files(files: Iterable[DataFile]) -> list[str]:
    """sha256 of every file, several at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(DataFile.digest, files))
