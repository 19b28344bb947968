"""What a merge starts from: the adapter, and the base it was trained on, found and checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtune.adapters.config_file import read_base_record
from llmtune.adapters.find import base_name_of, find_adapter, find_base
from llmtune.errors import AdapterError, ModelError
from llmtune.models.catalog import resolve
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.scan import read_json_file, refuse_unsafe_folder, weight_files
from llmtune.models.tokenizer import load_tokenizer_folder

__all__ = ["MergeInputs", "find_merge_inputs"]


@dataclass(frozen=True)
class MergeInputs:
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


def find_merge_inputs(source: Path, base: str | None, *, offline: bool = False) -> MergeInputs:
    """Find the adapter in `source` and its base: the one named, or the one its record names.

    Raises AdapterError or ModelError, with what to give as --base, when either cannot be found or may not be loaded.
    """
    adapter = find_adapter(source)
    record = read_base_record(adapter)
    base_source = resolve(base, offline=offline) if base is not None else find_base(adapter, offline=offline)
    if base_source.kind == "scratch":
        fix = "name the folder of the trained model with --base"
        raise AdapterError(
            f"the base `{base_source.name}` is built from scratch and stored nowhere", where=str(adapter), fix=fix
        )
    folder = local_folder(base_source)
    refuse_unsafe_folder(folder, ignore_auto_map=may_ignore_auto_map(base_source))
    if (read_json_file(folder / "config.json") or {}).get("quantization_config"):
        fix = "name the unquantized model with --base"
        raise ModelError(
            "the base is published quantized, and its weights cannot be written back exactly",
            where=str(folder),
            fix=fix,
        )
    weight_files(folder)
    own = (adapter / "tokenizer_config.json").is_file()
    return MergeInputs(
        adapter=adapter,
        base=base_source,
        base_folder=folder,
        base_name=base or base_name_of(adapter) or str(folder),
        recorded_digest=record.get("base_digest"),
        quantization=record.get("quantization"),
        held_dtype=record.get("dtype"),
        tokenizer=load_tokenizer_folder(adapter if own else folder).tokenizer,
    )
