"""What a merge starts from: the adapter, and the base it was trained on, found and checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtune.errors import AdapterError, LlmtuneError, ModelError
from llmtune.models.adapter_scan import read_adapter_config, read_base_record
from llmtune.models.catalog import ModelSource, resolve
from llmtune.models.scan import read_json_file, refuse_unsafe_folder, weight_files
from llmtune.models.store import local_folder, may_ignore_auto_map
from llmtune.models.tokenizer import load_tokenizer_folder

__all__ = ["Origin", "find_adapter", "find_origin"]


@dataclass(frozen=True)
class Origin:
    """An adapter and its base."""

    adapter: Path
    base: ModelSource
    base_folder: Path
    base_name: str
    recorded_digest: str | None
    """Digest of the base's weights as recorded in training; None for an adapter made elsewhere."""
    quantization: Literal["4bit", "8bit"] | None
    """How the base was held in training."""
    held_dtype: str | None
    """The type the base was loaded in, and quantized from."""
    tokenizer: Any


def find_adapter(source: Path) -> Path:
    """Return the adapter's folder: `source` itself, or what its run produced (final, else best, else the newest checkpoint).

    Raises AdapterError when there is none.
    """
    if not source.is_dir():
        raise AdapterError(f"there is no folder `{source}`", where="RUN|ADAPTER", fix="give the folder of a run or of an adapter")
    steps = sorted(source.glob("checkpoints/step-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    candidates = [source, source / "checkpoints" / "final", source / "final", source / "checkpoints" / "best", *steps]
    found = next((folder for folder in candidates if (folder / "adapter_config.json").is_file()), None)
    if found is not None:
        return found
    whole = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if whole is not None:
        raise AdapterError(f"`{whole}` is a whole model: there is nothing to merge", where=str(source), fix="use it as it is")
    raise AdapterError(
        "there is no adapter here", where=str(source), fix="give the folder of a run that trained an adapter, or an adapter's folder"
    )


def find_origin(source: Path, base: str | None, *, offline: bool = False) -> Origin:
    """Find the adapter in `source` and its base: the one named, or the one its record names.

    Raises AdapterError or ModelError, with what to give as --base, when either cannot be found or may not be loaded.
    """
    adapter = find_adapter(source)
    options, record = read_adapter_config(adapter), read_base_record(adapter)
    base_source = _resolve_base(adapter, base, options, record, offline=offline)
    if base_source.kind == "scratch":
        fix = "name the folder of the trained model with --base"
        raise AdapterError(f"the base `{base_source.name}` is built from scratch and stored nowhere", where=str(adapter), fix=fix)
    folder = local_folder(base_source)
    refuse_unsafe_folder(folder, ignore_auto_map=may_ignore_auto_map(base_source))
    if (read_json_file(folder / "config.json") or {}).get("quantization_config"):
        fix = "name the unquantized model with --base"
        raise ModelError("the base is published quantized, and its weights cannot be written back exactly", where=str(folder), fix=fix)
    weight_files(folder)
    own = (adapter / "tokenizer_config.json").is_file()
    return Origin(
        adapter=adapter,
        base=base_source,
        base_folder=folder,
        base_name=base or record.get("base_name") or options.get("base_model_name_or_path") or str(folder),
        recorded_digest=record.get("base_digest"),
        quantization=record.get("quantization"),
        held_dtype=record.get("dtype"),
        tokenizer=load_tokenizer_folder(adapter if own else folder).tokenizer,
    )


def _resolve_base(adapter: Path, base: str | None, options: Any, record: Any, *, offline: bool) -> ModelSource:
    """Try what was asked for; else the names on record, from the most exact on."""
    if base is not None:
        return resolve(base, offline=offline)
    revision = record.get("base_revision") or options.get("revision")
    names = [name for name in (record.get("base_name"), record.get("base_path"), options.get("base_model_name_or_path")) if name]
    refusal: LlmtuneError | None = None
    for name in dict.fromkeys(names):
        try:
            return resolve(name, revision, offline=offline)
        except ModelError as error:
            refusal = error
    known = f"`{names[0]}`" if names else "no base at all"
    raise AdapterError(
        f"the adapter names {known}, which is not to be found", where=str(adapter), fix="name its base with --base"
    ) from refusal
