"""Find and check the adapter of a merge and the base it was trained on, before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmtune.adapters.config_file import DtypeName, read_base_record
from llmtune.adapters.find import base_name_of, find_adapter, find_base, run_of
from llmtune.config.layers import load_config
from llmtune.deploy.base_weights import unquantized_folder
from llmtune.errors import AdapterError
from llmtune.evaluation.inference_model import find_prompt_defaults, find_tokenizer, labels_in
from llmtune.models.catalog import resolve
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.save import PromptDefaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["MergeInputs", "find_merge_inputs"]


@dataclass(frozen=True)
class MergeInputs:
    """An adapter and its base."""

    adapter: Path
    base: ModelSource
    base_folder: Path
    base_name: str
    recorded_digest: str | None
    """Digest of the base's weights as recorded in training; None for an adapter made by another program."""
    quantization: Literal["4bit", "8bit"] | None
    """How the base's linear layers were held in training."""
    loaded_dtype: DtypeName
    """Type the base was loaded in, and quantized from; float32 where none is recorded."""
    tokenizer: PreTrainedTokenizerFast
    defaults: PromptDefaults
    """What training put around each prompt."""
    labels: tuple[str, ...] = ()
    """Labels of the units of the adapter's head, where it gives scores."""


def find_merge_inputs(source: Path, base: str | None, *, offline: bool = False) -> MergeInputs:
    """Find the adapter in `source` and its base: the one named, or the one its record names.

    Raises AdapterError or ModelError when either cannot be found or may not be loaded, with what to give as --base.
    """
    adapter = find_adapter(source)
    record = read_base_record(adapter)
    base_source = resolve(base, offline=offline) if base is not None else find_base(adapter, offline=offline)
    if base_source.kind == "scratch":
        fix = "name the folder of the trained model with --base"
        raise AdapterError(
            f"the base `{base_source.name}` is built from scratch and stored nowhere", where=str(adapter), fix=fix
        )
    folder = unquantized_folder(base_source, noun="base", fix="name the unquantized model with --base")
    run = run_of(adapter)
    config = load_config(str(run / "config.yaml"), environ={}).config if run is not None else None
    return MergeInputs(
        adapter=adapter,
        base=base_source,
        base_folder=folder,
        base_name=base or base_name_of(adapter) or str(folder),
        recorded_digest=record.get("base_digest"),
        quantization=record.get("quantization"),
        loaded_dtype=record.get("dtype") or "float32",
        tokenizer=find_tokenizer(adapter, run or adapter, base_source, config),
        defaults=find_prompt_defaults(adapter, run or adapter, config),
        labels=labels_in(adapter),
    )
