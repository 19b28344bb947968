"""A complete model in a folder, read one weight at a time: the source of an export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtune.config.schema import ModelConfig
from llmtune.deploy.base_weights import BaseWeights, meta_model, open_base_weights, tied_names, unquantized_folder
from llmtune.deploy.compare_logits import logits_of
from llmtune.deploy.merge_math import round_once
from llmtune.deploy.model_files import refuse_overflow, write_model_files, write_shards
from llmtune.deploy.usage import Result, folder_result, usage
from llmtune.errors import ModelError
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.load import load_model
from llmtune.models.model_card import THIS_FOLDER, exported_model_card
from llmtune.models.read_config import read_config
from llmtune.models.save import PromptDefaults, read_prompt_defaults
from llmtune.models.scan import read_json_file, weight_files
from llmtune.models.score_head import labels_of
from llmtune.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

__all__ = ["ModelFolder", "open_model_folder", "write_model_folder"]


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder with weights that are not read yet, and everything that is written beside them."""

    source: ModelSource
    folder: Path
    config: PreTrainedConfig
    class_name: str
    weights: BaseWeights
    names: tuple[str, ...]
    """Names of the weights to write; a tied head is left out, because it is one with its embedding."""
    tokenizer: PreTrainedTokenizerFast
    defaults: PromptDefaults
    """What training put around each prompt."""
    labels: tuple[str, ...] = ()
    """Labels of the units of its head, where it gives scores."""

    def dtype(self, name: str, requested: torch.dtype | None) -> torch.dtype:
        """Return the type a weight is written in: `requested` for floating-point weights, else as stored."""
        stored = self.weights.dtype(name)
        return requested if requested is not None and stored.is_floating_point else stored

    def rounded(self, name: str, requested: torch.dtype | None) -> Tensor:
        """Read a weight, in its stored shape, and round it once to `dtype(name, requested)`.

        To the nearest, ties to even (IEEE 754, section 4.3.1): twice would be another number.

        Raises ModelError for values that do not fit that type.
        """
        weight = round_once(self.weights.read(name), self.dtype(name, requested))
        refuse_overflow(name, weight, command="export")
        return weight

    def logits(
        self, prompts: list[list[int]], rounded: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> list[Tensor]:
        """Return the source's own logits on each prompt, float32 [T, V].

        rounded: name of a weight -> function that rounds it first.
        """
        loaded = load_model(
            self.source,
            ModelConfig(name=self.source.name, dtype="float32"),
            tokenizer=self.tokenizer,
            device=torch.device("cpu"),
            trained="full",
            precision="fp32",
            seed=0,
            labels=self.labels,
        )
        parameters = dict(loaded.model.named_parameters())
        with torch.no_grad():
            for name, round_weight in (rounded or {}).items():
                parameters[name].copy_(round_weight(parameters[name].detach()))
        return logits_of(loaded.model, prompts)

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    def result(self, path: str) -> Result:
        """Describe it, for the command lines that serve it from the folder `path`."""
        return folder_result(path, self.config, self.tokenizer, self.defaults)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, by generation_config.json and the tokenizer."""
        path = self.folder / "generation_config.json"
        published = read_json_file(path).get("eos_token_id") if path.is_file() else None
        ids = [*(published if isinstance(published, list) else [published]), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(int(token) for token in ids if token is not None))


def open_model_folder(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerFast | None = None,
    defaults: PromptDefaults | None = None,
) -> ModelFolder:
    """Open the model of `source`: a folder, a GGUF file (converted first) or a hub id.

    tokenizer, defaults: of a run, whose checkpoints have none; the model's own when None.

    Raises ModelError where there are no weights to write back: for a model that is only built from scratch, or is
    published quantized, or has unsafe or unreadable files; TokenizerError; MachineError when it cannot be fetched.
    """
    if source.kind == "scratch":
        fix = "name the run that trained it, or its folder"
        raise ModelError(f"`{source.name}` is built from scratch and stored nowhere", where="RUN|MODEL", fix=fix)
    folder = unquantized_folder(source, noun="model", fix="name the unquantized model")
    config, labels = read_config(folder), labels_of(read_json_file(folder / "config.json"))
    model = meta_model(config, labels)
    weights = open_base_weights(weight_files(folder), model)
    tokenizer = tokenizer or load_tokenizer(source, ModelConfig(name=source.name)).tokenizer
    tied = set(tied_names(model))
    names = tuple(name for name in weights.names if name not in tied)
    return ModelFolder(
        source,
        folder,
        config,
        type(model).__name__,
        weights,
        names,
        tokenizer,
        defaults or read_prompt_defaults(folder),
        labels,
    )


def write_model_folder(model_folder: ModelFolder, output: Path, *, dtype: torch.dtype | None) -> None:
    """Write a folder that transformers' `from_pretrained` loads: weights, config, tokenizer and card.

    dtype: type of every floating-point weight, rounded once; as stored when None. Raises ModelError for a weight that
    does not fit, MachineError when the system refuses to write.
    """
    described = {
        name: torch.empty(model_folder.weights.shape(name), dtype=model_folder.dtype(name, dtype), device="meta")
        for name in model_folder.names
    }
    write_shards(output, described, lambda name: model_folder.rounded(name, dtype))
    source = model_folder.source
    write_model_files(
        output,
        config=model_folder.config,
        class_name=model_folder.class_name,
        dtypes={tensor.dtype for tensor in described.values() if tensor.is_floating_point()},
        generation_config_from=() if model_folder.labels else (model_folder.folder,),
        tokenizer=model_folder.tokenizer,
        card=exported_model_card(
            source.name if source.kind == "hub" else model_folder.folder.name,
            prompts=model_folder.defaults.described(),
            usage=usage(model_folder.result(THIS_FOLDER)),
            labels=model_folder.labels,
        ),
        defaults=model_folder.defaults,
    )
