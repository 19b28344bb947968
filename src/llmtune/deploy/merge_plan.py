"""Plan a merge: the updates of each weight, decided on the meta device before a tensor is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.load import read_adapter_tensors
from llmtune.adapters.weight_updates import WeightUpdate, find_weight_updates
from llmtune.common.dtypes import torch_dtype
from llmtune.deploy.base_weights import BaseWeights, meta_model, open_base_weights, tied_names
from llmtune.deploy.merge_inputs import MergeInputs
from llmtune.errors import AdapterError
from llmtune.models.parameters import SCORE_HEADS
from llmtune.models.quantization import quantize_dequantize, quantized_layers
from llmtune.models.read_config import read_config
from llmtune.models.scan import weight_files
from llmtune.models.score_head import as_scoring
from llmtune.models.weights import digest_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["MergePlan", "plan_merge"]


@dataclass(frozen=True)
class MergePlan:
    """The weights of the result, each with its source in the base and the adapter's updates."""

    base: BaseWeights
    config: PreTrainedConfig
    """Config of the result."""
    class_name: str
    sources: Mapping[str, str]
    """Name in the result -> name in the base; they differ for a head that was tied and no longer is."""
    updates: Mapping[str, tuple[WeightUpdate, ...]]
    """Name in the result -> the adapter's updates, in order."""
    tensors: Mapping[str, Tensor]
    """The adapter's own tensors; small."""
    adapter_digest: str
    dtype: torch.dtype | None
    """Type of every floating-point weight of the result; as stored when None."""
    rows: int
    """Rows of the embedding: at least one for every token id."""
    embeddings: frozenset[str]
    """Weights that get a row for each token that training added."""
    quantization: Literal["4bit", "8bit"] | None
    """Quantization of the base that the adapter is added to, dequantized; None for the weights as published."""
    trained_quantization: Literal["4bit", "8bit"] | None
    """Quantization of the base in training."""
    loaded_dtype: torch.dtype
    """Type the base was loaded in for training."""
    quantized: frozenset[str]
    """Layers that were quantized in training."""
    transposed: frozenset[str]
    """Layers whose weight is stored as [in, out]."""
    notes: tuple[str, ...]

    @property
    def trained_rows(self) -> list[int]:
        """Token ids whose rows were trained, in order."""
        return sorted({row for updates in self.updates.values() for update in updates for row in update.rows})

    def with_added_rows(self, name: str, weight: Tensor) -> Tensor:
        """Return a base weight, [rows, width], with a row for each token that training added; others as they are.

        They are the rows that `resize_for_tokenizer` added: row = mean over all rows, in the type of the loaded base.
        """
        missing = self.rows - weight.shape[0] if name in self.embeddings else 0
        if missing <= 0:
            return weight
        loaded = weight.to(self.loaded_dtype)
        row = loaded.to(torch.float32).mean(dim=0).to(loaded.dtype).to(weight.dtype)
        return torch.cat([weight, row.expand(missing, -1)])

    def as_held_in_training(self, name: str, weight: Tensor) -> Tensor:
        """Return a floating-point weight of the base as training computed with it, float32 of the same shape.

        It went through the type it was loaded in, and through 4 or 8 bits where its layer was quantized: an adapter
        makes up for the errors of that base and not of the published one (QLoRA, arXiv:2305.14314).
        """
        layer = name.removesuffix(".weight")
        if self.trained_quantization is None or layer == name or layer not in self.quantized:
            return weight.to(self.loaded_dtype).to(torch.float32)
        is_transposed = layer in self.transposed
        # Blocks of 64 entries are quantized along the inputs, so the orientation decides which entries share a scale.
        weight_OI = weight.T if is_transposed else weight
        held_OI = quantize_dequantize(weight_OI, self.trained_quantization, self.loaded_dtype)
        return held_OI.T if is_transposed else held_OI


def plan_merge(inputs: MergeInputs, *, dtype: torch.dtype | None, dequantize: bool) -> MergePlan:
    """Plan the merge of an adapter into its base.

    dtype: type of the result's weights; as stored when None. dequantize: an adapter trained on a quantized base is
    added to that base, dequantized, instead of to the published weights.

    Raises AdapterError when the adapter does not fit the base, ModelError when the base cannot be read.
    """
    config = read_config(inputs.base_folder)
    if inputs.labels:
        as_scoring(config, inputs.labels, inputs.tokenizer, str(inputs.base_folder))
    text = config.get_text_config()
    stored_rows = int(text.vocab_size)
    # As in training, which gave the embedding a row for each token of the tokenizer.
    text.vocab_size = rows = max(stored_rows, max(inputs.tokenizer.get_vocab().values()) + 1)
    model = meta_model(config, inputs.labels)
    base = open_base_weights(weight_files(inputs.base_folder), model)
    embeddings = _embedding_names(model)
    _check_base(base, model, embeddings, stored_rows)
    tensors = read_adapter_tensors(inputs.adapter)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    updates = find_weight_updates(meta_model(config, inputs.labels), inputs.adapter, shapes)
    sources, by_weight, notes = _separate_tied_weights(model, base, updates, tensors)
    # A head that gets values of its own must not be tied again by whoever loads the result.
    if any(name not in base.names for name in sources):
        config.tie_word_embeddings = text.tie_word_embeddings = False
    if rows > stored_rows:
        notes.append(f"{rows - stored_rows} embedding rows are added for the tokens that training added")
    quantized: set[str] = set()
    if inputs.quantization:
        keeps = SCORE_HEADS if inputs.labels else ()
        quantized = quantized_layers(meta_model(config, inputs.labels), inputs.quantization, keeps)
    return MergePlan(
        base=base,
        config=config,
        class_name=type(model).__name__,
        sources=sources,
        updates=by_weight,
        tensors=tensors,
        adapter_digest=digest_tensors(sorted(tensors.items())),
        dtype=dtype,
        rows=rows,
        embeddings=frozenset(embeddings),
        quantization=inputs.quantization if dequantize else None,
        trained_quantization=inputs.quantization,
        loaded_dtype=torch_dtype(inputs.loaded_dtype),
        quantized=frozenset(quantized),
        transposed=frozenset(_transposed_layers(model)),
        notes=tuple(notes),
    )


def _embedding_names(model: PreTrainedModel) -> set[str]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(layer) for layer in layers if layer is not None}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in ids}


def _transposed_layers(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _check_base(base: BaseWeights, model: PreTrainedModel, embeddings: set[str], stored_rows: int) -> None:
    state = model.state_dict()
    for name in base.names:
        shape = tuple(state[name].shape)
        shape = (stored_rows, *shape[1:]) if name in embeddings else shape
        if base.shape(name) != shape:
            raise AdapterError(
                f"the base's `{name}` has shape {base.shape(name)} and its config says {shape}",
                where="--base",
                fix="name another base",
            )


def _separate_tied_weights(
    model: PreTrainedModel, base: BaseWeights, updates: list[WeightUpdate], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, tuple[WeightUpdate, ...]], list[str]]:
    """Return (sources, updates by weight, notes).

    A tied head becomes a weight of its own where the adapter changes it otherwise than the embedding.
    """
    by_weight: dict[str, list[WeightUpdate]] = defaultdict(list)
    for update in updates:
        by_weight[update.weight].append(update)
    tied = _tied_pairs(model)
    sources = {name: name for name in base.names if name not in tied}
    notes = []
    for head, embedding in tied.items():
        # Rows trained by peft in a tied embedding are trained in the head as well; every other update touches the one
        # it names.
        shared = [update for update in by_weight[embedding] if update.kind == "rows"]
        head_updates = [update for update in by_weight[head] if update.kind != "rows"] + shared
        # Still one weight: written once, and tied in the result as it was in the base.
        if _end_equal(by_weight[embedding], head_updates, tensors):
            by_weight.pop(head, None)
            continue
        by_weight[head] = head_updates
        sources[head] = embedding
        notes.append(
            f"`{head}` was tied to `{embedding}` and is now a weight of its own: the adapter treats the two differently"
        )
    return sources, {name: tuple(updates) for name, updates in by_weight.items() if updates}, notes


def _tied_pairs(model: PreTrainedModel) -> dict[str, str]:
    """Return head -> embedding for weights that are one weight under two names."""
    layer = model.get_input_embeddings()
    embedding = next(f"{name}.weight" for name, module in model.named_modules() if module is layer)
    return dict.fromkeys(tied_names(model), embedding)


def _end_equal(embedding: list[WeightUpdate], head: list[WeightUpdate], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether both weights end up equal: untouched, with the same rows, or replaced by the same values."""
    if all(update.kind == "rows" for update in (*embedding, *head)):
        return True
    if [update.kind for update in embedding] != ["replace"] or [update.kind for update in head] != ["replace"]:
        return False
    return torch.equal(tensors[embedding[0].tensors["value"]], tensors[head[0].tensors["value"]])
