"""The data files of a folder, by configuration of its data set (README.md, else its folders) and by split (names)."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from llmtune.config.dataset_card import CardConfig, card_configs
from llmtune.data.reading.data_file import kind_of_file

__all__ = [
    "SPLITS",
    "Splits",
    "UnknownConfigError",
    "folder_configs",
    "folder_splits",
    "split_of_name",
    "splits_of_config",
]

SPLITS = {
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
"""Words in names of files and folders, and the split that each means."""

Splits = dict[str | None, list[Path]]
"""Data files by the split in their names (None: without one)."""


class UnknownConfigError(Exception):
    """A folder has several configurations (`names`) and none is named, or another one is."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def split_of_name(path: Path) -> str | None:
    """The split in the name of a file (or of its folder), if any.

    >>> split_of_name(Path("train-00000-of-00002.parquet")), split_of_name(Path("my_dev.jsonl"))
    ('train', 'validation')
    >>> split_of_name(Path("rows.csv"))
    """
    for part in (path.name.split(".")[0], path.parent.name):
        words = [word for word in re.split(r"[-_. ]", part.lower()) if word]
        for word in (*words[:1], *words[-1:]):
            if word in SPLITS:
                return SPLITS[word]
    return None


def folder_splits(path: Path) -> Splits:
    """Data files of a folder and the folders in it, by the split in their names (None: without one)."""
    splits: Splits = {}
    for file in sorted([*path.glob("*"), *path.glob("*/*")]):
        if kind_of_file(file) is not None and file.is_file() and not file.name.startswith("."):
            splits.setdefault(split_of_name(file.relative_to(path)), []).append(file)
    return splits


def folder_configs(path: Path) -> tuple[dict[str, Splits], str | None]:
    """The configurations of the data set in a folder, and the name of the default one.

    README.md lists them. A folder inside is one more where its files have splits of their own, no listed configuration
    has them, and no data file lies beside it.
    """
    cards = card_configs(path / "README.md") if (path / "README.md").is_file() else []
    configs = {card.name: _files_of_card(path, card) for card in cards}
    covered = {file for splits in configs.values() for files in splits.values() for file in files}
    has_own_files = any(file.parent == path for files in folder_splits(path).values() for file in files)
    for folder in () if has_own_files else _folders_inside(path):
        if folder.name.startswith(".") or folder.name in configs or split_of_name(folder):
            continue
        splits = folder_splits(folder)
        if set(splits) - {None} and not covered & {file for files in splits.values() for file in files}:
            configs[folder.name] = splits
    return configs, next((card.name for card in cards if card.is_default), None)


def _folders_inside(path: Path) -> list[Path]:
    """The folders in a folder; in the place of one called `data` those in it that have splits of their own."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    inner = [
        folder
        for folder in sorted(path.glob("data/*"))
        if folder.is_dir() and not split_of_name(Path(folder.name)) and set(folder_splits(folder)) - {None}
    ]
    return [*(folder for folder in folders if folder.name != "data"), *inner] if len(inner) > 1 else folders


def splits_of_config(path: Path, name: str | None) -> Splits:
    """The files of the configuration `name` of a folder, by split; all files where the folder has no configurations.

    A name that is no configuration may be that of a folder inside. Raises UnknownConfigError.
    """
    configs, default = folder_configs(path)
    if name is None:
        if len(configs) > 1 and default is None:
            raise UnknownConfigError(list(configs))
        return configs[default or next(iter(configs))] if configs else folder_splits(path)
    if name in configs:
        return configs[name]
    if name == "default" and len(configs) <= 1:  # as `datasets` calls the only one
        return splits_of_config(path, None)
    inside = {folder.name: folder for folder in _folders_inside(path) if folder_splits(folder)}
    if name in inside:
        return folder_splits(inside[name])
    raise UnknownConfigError([*configs, *(key for key in inside if key not in configs)])


def _files_of_card(path: Path, card: CardConfig) -> Splits:
    if not card.files:
        folder = path / (card.folder or "")
        return folder_splits(folder) if _is_inside(path, folder) else {}
    splits: Splits = {}
    for split, pattern in card.files:
        found: list[Path] = []
        with contextlib.suppress(ValueError, NotImplementedError):  # an empty or an absolute pattern
            found = sorted(path.glob(pattern))
        for file in found:
            if file.is_file() and kind_of_file(file) is not None and _is_inside(path, file):
                name = SPLITS.get(split, split) if split else split_of_name(file.relative_to(path))
                splits.setdefault(name, []).append(file)
    return splits


def _is_inside(path: Path, file: Path) -> bool:
    """Whether a file lies in the folder: a README may come from anywhere, and names no file outside."""
    return file.resolve().is_relative_to(path.resolve())
