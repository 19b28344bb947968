"""A whole model in a folder, read one weight at a time: what an export starts from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtune import durable
from llmtune.config.schema import ModelConfig
from llmtune.deploy.base_weights import BaseWeights, open_base_weights, tied_names
from llmtune.deploy.compare_logits import logits_of
from llmtune.deploy.merge_math import round_once
from llmtune.deploy.write_merged import MAX_SHARD_BYTES, copy_generation_config, write_shards
from llmtune.errors import ModelError
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.load import load_model
from llmtune.models.quiet_libraries import quiet_libraries
from llmtune.models.read_config import read_config
from llmtune.models.save import write_tokenizer
from llmtune.models.scan import read_json_file, refuse_unsafe_folder, weight_files
from llmtune.models.tokenizer import load_tokenizer

__all__ = ["ModelFolder", "open_model_folder", "write_model_folder"]


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder: weights that are not read yet, and everything that is written beside them."""

    source: ModelSource
    folder: Path
    config: Any
    class_name: str
    weights: BaseWeights
    names: tuple[str, ...]
    """The weights that are written; a tied head is one with its embedding, and left out."""
    tokenizer: Any

    def dtype(self, name: str, asked: torch.dtype | None) -> torch.dtype:
        """Return the type a weight is written in: the one asked for, where it is a number with a fraction.

        Else as it is stored.
        """
        stored = self.weights.dtype(name)
        return asked if asked is not None and stored.is_floating_point else stored

    def rounded(self, name: str, asked: torch.dtype | None) -> Tensor:
        """Read a weight and round it once. Raises ModelError for values that do not fit."""
        dtype = self.dtype(name, asked)
        result = round_once(self.weights.read(name), dtype)
        if not bool(torch.isfinite(result).all()):
            problem = f"`{name}` has values that do not fit {dtype}".replace("torch.", "")
            raise ModelError(problem, where="--dtype", fix="export with --dtype bfloat16 or float32")
        return result

    def logits(self, prompts: list[list[int]]) -> list[Tensor]:
        """Return the source's own logits on each prompt, float32 [T, V]."""
        config = ModelConfig(name=self.source.name, dtype="float32")
        place = torch.device("cpu")
        loaded = load_model(
            self.source, config, tokenizer=self.tokenizer, device=place, trained="full", precision="fp32", seed=0
        )
        return logits_of(loaded.model, prompts)

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, as generation_config.json and the tokenizer say."""
        path = self.folder / "generation_config.json"
        said = read_json_file(path).get("eos_token_id") if path.is_file() else None
        ids = [*(said if isinstance(said, list) else [said]), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(int(one) for one in ids if one is not None))


def open_model_folder(source: ModelSource, tokenizer: Any | None = None) -> ModelFolder:
    """Open the model of `source`: a folder, a GGUF file (converted first) or a hub id.

    Its own tokenizer unless another is given.

    Raises ModelError where there are no weights to write: one that is only built from scratch, or is published
    quantized.
    """
    from transformers import AutoModelForCausalLM

    if source.kind == "scratch":
        fix = "name the run that trained it, or its folder"
        raise ModelError(f"`{source.name}` is built from scratch and stored nowhere", where="RUN|MODEL", fix=fix)
    folder = local_folder(source)
    refuse_unsafe_folder(folder, ignore_auto_map=may_ignore_auto_map(source))
    if read_json_file(folder / "config.json").get("quantization_config"):
        fix = "name the unquantized model"
        raise ModelError(
            "the model is published quantized, and its weights cannot be written back exactly",
            where=str(folder),
            fix=fix,
        )
    config = read_config(folder)
    with quiet_libraries(), torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    weights = open_base_weights(weight_files(folder), meta)
    own = tokenizer if tokenizer is not None else load_tokenizer(source, ModelConfig(name=source.name)).tokenizer
    tied = set(tied_names(meta))
    return ModelFolder(
        source,
        folder,
        config,
        type(meta).__name__,
        weights,
        tuple(one for one in weights.names if one not in tied),
        own,
    )


def write_model_folder(
    whole: ModelFolder, folder: Path, *, dtype: torch.dtype | None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `whole` as a folder that `AutoModelForCausalLM.from_pretrained` loads: weights, config, tokenizer,
    generation config, card.

    dtype: type of every weight, rounded once; as stored when None. Raises ModelError (a weight that does not fit),
    MachineError.
    """
    described = {
        name: torch.empty(whole.weights.shape(name), dtype=whole.dtype(name, dtype), device="meta")
        for name in whole.names
    }
    write_shards(folder, described, lambda name: whole.rounded(name, dtype), max_shard_bytes)
    config = {**whole.config.to_dict(), "architectures": [whole.class_name]}
    types = {one.dtype for one in described.values() if one.is_floating_point()}
    if len(types) == 1:
        config["dtype"] = str(next(iter(types))).removeprefix("torch.")
    durable.write_json(folder / "config.json", config)
    copy_generation_config((whole.folder,), folder)
    write_tokenizer(whole.tokenizer, folder)
    durable.write_text(folder / "README.md", _card(whole))


def _card(whole: ModelFolder) -> str:
    name = json.dumps(whole.source.name if whole.source.kind == "hub" else whole.folder.name)
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [llmtune]\n---\n\n# {name.strip(chr(34))}\n\n"
        "Exported with llmtune. `export_report.json` says how close the weights are to the source.\n\n"
        '```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```\n'
    )
