"""Check a model folder by plain reading, before any library opens it.

A folder of weights is data from a stranger. Its JSON files can name code (`auto_map`), repositories
(`_attn_implementation`) and files outside the folder (a shard index); its weight files can be pickles, which run code
when opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.errors import ModelError, Problem

__all__ = ["read_json_file", "refuse_unsafe_folder", "scan_json_files", "weight_files"]

MAX_JSON_BYTES = 64 * 2**20
"""Limit for configs and shard indexes; tokenizer files, which are larger, are read by the tokenizer library."""

_TRUST_FIX = (
    "use a copy without it, or, if you have read and trust that code, pass --trust-remote-code on the command line"
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".mdl", ".msgpack", ".h5")
_INDEX = "model.safetensors.index.json"


def refuse_unsafe_folder(folder: Path, *, trust_remote_code: bool = False, ignore_auto_map: bool = False) -> None:
    """Raise ModelError for JSON files that name code or a repository, and for an adapter beside a model.

    All such entries are named. ignore_auto_map: for models that ship code and are known to load without it; their code
    is not run.
    """
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise ModelError(
            "the folder holds a model and an adapter; a library would join them unasked, "
            "and import what the adapter's config names",
            where=str(folder),
            fix="move the adapter (adapter_config.json, adapter_model.safetensors) to a folder of its own",
        )
    if trust_remote_code:
        return
    problems = list(scan_json_files(folder, ignore_auto_map=ignore_auto_map))
    if problems:
        raise ModelError.all(problems)


def scan_json_files(folder: Path, *, ignore_auto_map: bool = False) -> Iterator[Problem]:
    """Yield a problem for each entry of the folder's config files that would make a library run or fetch code.

    Raises ModelError for a file that is no JSON mapping.
    """
    for name in _CONFIG_FILES:
        path = folder / name
        if path.is_file():
            content = read_json_file(path)
            if not isinstance(content, dict):
                raise ModelError(f"{name} holds no mapping", where=str(path), fix="fetch the file again")
            for key, problem in _code_references(content, ""):
                if not (ignore_auto_map and key.rsplit(".", 1)[-1] == "auto_map"):
                    yield Problem(problem, f"{path}: {key}", _TRUST_FIX)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in the order of their names.

    Raises ModelError when the weights are pickles or missing, or when the shard index names a file outside the folder
    or one that is not there.
    """
    index = folder / _INDEX
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(folder, index)
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in _PICKLES and not path.name.startswith("training_args")
    )
    if pickles:
        guide = "https://huggingface.co/docs/safetensors/convert-weights"
        raise ModelError(
            f"the weights in {folder} are only there as {', '.join(pickles[:3])}, "
            "a format that can run code when it is opened",
            where=str(folder),
            fix=f"use a revision with safetensors, or convert a copy you trust: {guide}",
        )
    raise ModelError(
        f"{folder} holds no model.safetensors", where=str(folder), fix="name a folder saved with `save_pretrained`"
    )


def read_json_file(path: Path) -> Any:
    """Return the value in a JSON file. Raises ModelError when it is no JSON, unreadable or larger than 64 MiB."""
    try:
        # Before it is read: a file made to fill the memory must not get that far.
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(
                f"{path.name} has {path.stat().st_size:,} bytes",
                where=str(path),
                fix="a config file is smaller than 64 MiB",
            )
        return json.loads(path.read_text(encoding="utf-8"))
    # RecursionError: JSON nested a thousand deep is a known way to crash a reader.
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path), fix="fetch the file again") from error
    except OSError as error:
        fix = "check the file and its permissions"
        raise ModelError(f"{path.name} cannot be read: {error.strerror}", where=str(path), fix=fix) from error


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    content = read_json_file(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(
            "the shard index has no `weight_map` of file names", where=str(index), fix="fetch the file again"
        )
    names = sorted(set(weight_map.values()))
    # Only plain names: `../x`, an absolute path or a link by a strange name would leave the folder.
    outside = [name for name in names if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name)]
    if outside:
        problem = f"the shard index names `{outside[0]}`, which is not a plain file name in its folder"
        raise ModelError(problem, where=str(index), fix=_TRUST_NONE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        problem = f"{len(missing)} of {len(names)} shards are missing, first {missing[0]}"
        raise ModelError(problem, where=str(index), fix="fetch the model again")
    return [folder / name for name in names]


def _code_references(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, problem) for each entry that names code, in nested mappings and lists too."""
    if isinstance(value, list):
        for position, item in enumerate(value):
            yield from _code_references(item, f"{key}[{position}]")
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        item_key = f"{key}.{name}" if key else str(name)
        if name == "auto_map" and item:
            yield item_key, f"`auto_map` names code that comes with the model: {_shortened(item)}"
        elif name == "trust_remote_code" and item:
            # A file may not grant itself what only the user may grant.
            yield item_key, "`trust_remote_code` is asked for by the model's own files"
        elif name in ("custom_pipelines", "custom_generate") and item:
            yield item_key, f"`{name}` names code that comes with the model: {_shortened(item)}"
        elif str(name).lstrip("_").startswith(("attn_implementation", "experts_implementation")) and _names_repository(
            item
        ):
            yield item_key, f"`{name}` names a repository to fetch code from: {_shortened(item)}"
        else:
            yield from _code_references(item, item_key)


def _names_repository(value: object) -> bool:
    if isinstance(value, dict):
        return any(_names_repository(item) for item in value.values())
    # Names of implementations in the library are words; a repository has a slash in it.
    return value is not None and not (isinstance(value, str) and re.fullmatch(r"[a-z0-9_]*", value))


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


_TRUST_NONE = "do not use this model: a well-made index never points elsewhere"
_CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
