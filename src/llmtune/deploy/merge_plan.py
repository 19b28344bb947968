"""What a merge will do to each weight, decided on a model without memory before a single tensor is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmtune.adapters.load import read_adapter_tensors
from llmtune.adapters.weight_updates import WeightUpdate, find_weight_updates
from llmtune.common.dtypes import torch_dtype
from llmtune.deploy.base_weights import BaseWeights, open_base_weights, tied_names
from llmtune.deploy.merge_inputs import MergeInputs
from llmtune.errors import AdapterError
from llmtune.models.quantization import quantized_layers
from llmtune.models.quiet_libraries import quiet_libraries
from llmtune.models.read_config import read_config
from llmtune.models.scan import weight_files
from llmtune.models.weights import digest_tensors

__all__ = ["MergePlan", "plan_merge"]


@dataclass(frozen=True)
class MergePlan:
    """Every weight of the result, where it comes from and what happens to it."""

    base: BaseWeights
    config: Any
    """Config of the result."""
    class_name: str
    sources: Mapping[str, str]
    """Name in the result -> name in the base; they differ for a head that was tied and no longer is."""
    updates: Mapping[str, tuple[WeightUpdate, ...]]
    """Name in the result -> what the adapter does to it, in order."""
    tensors: Mapping[str, Tensor]
    """The adapter's own tensors; small."""
    adapter_digest: str
    dtype: torch.dtype | None
    """Type of every floating-point weight of the result; as stored when None."""
    rows: int
    """Rows of the embedding: one for every token id."""
    embeddings: frozenset[str]
    """Weights that get a row for each token that training added."""
    quantization: Literal["4bit", "8bit"] | None
    """What the base goes through before the adapter is added."""
    held_dtype: torch.dtype
    quantized: frozenset[str]
    """Layers that were held quantized in training."""
    transposed: frozenset[str]
    """Layers whose weight is stored as [in, out]."""
    notes: tuple[str, ...]

    @property
    def all_updates(self) -> list[WeightUpdate]:
        """Every update, of whatever weight."""
        return [update for updates in self.updates.values() for update in updates]

    def is_quantized(self, weight: str) -> bool:
        """Whether this weight was held quantized in training."""
        return weight.removesuffix(".weight") in self.quantized and weight.endswith(".weight")

    def is_transposed(self, weight: str) -> bool:
        """Whether this weight is stored as [in, out]."""
        return weight.removesuffix(".weight") in self.transposed


def plan_merge(origin: MergeInputs, *, dtype: torch.dtype | None, dequantize: bool) -> MergePlan:
    """Plan the merge of an adapter into its base.

    dequantize: an adapter trained on a quantized base goes into that base, dequantized. Raises AdapterError when the
    adapter does not fit.
    """
    config = read_config(origin.base_folder)
    text = config.get_text_config()
    stored_rows = int(text.vocab_size)
    text.vocab_size = rows = max(stored_rows, max(origin.tokenizer.get_vocab().values()) + 1)
    meta = _meta_model(config)
    base = open_base_weights(weight_files(origin.base_folder), meta)
    embeddings = _embedding_names(meta)
    _check_base(base, meta, embeddings, stored_rows)
    tensors = read_adapter_tensors(origin.adapter)
    updates = find_weight_updates(
        _meta_model(config), origin.adapter, {name: tuple(one.shape) for name, one in tensors.items()}
    )
    sources, by_weight, notes = _untangle(meta, base, updates, tensors)
    if any(name not in base.names for name in sources):
        config.tie_word_embeddings = text.tie_word_embeddings = False
    if rows > stored_rows:
        notes.append(f"{rows - stored_rows} embedding rows are added for the tokens that training added")
    return MergePlan(
        base=base,
        config=config,
        class_name=type(meta).__name__,
        sources=sources,
        updates=by_weight,
        tensors=tensors,
        adapter_digest=digest_tensors(sorted(tensors.items())),
        dtype=dtype,
        rows=rows,
        embeddings=frozenset(embeddings),
        quantization=origin.quantization if dequantize else None,
        held_dtype=torch_dtype(origin.held_dtype or "float32"),
        quantized=frozenset(quantized_layers(_meta_model(config), origin.quantization) if origin.quantization else ()),
        transposed=frozenset(_transposed_layers(meta)),
        notes=tuple(notes),
    )


def _meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_libraries():
        return AutoModelForCausalLM.from_config(config)


def _embedding_names(meta: Any) -> set[str]:
    layers = {id(layer) for layer in (meta.get_input_embeddings(), meta.get_output_embeddings()) if layer is not None}
    return {f"{name}.weight" for name, module in meta.named_modules() if id(module) in layers}


def _transposed_layers(meta: Any) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in meta.named_modules() if isinstance(module, Conv1D)}


def _check_base(base: BaseWeights, meta: Any, embeddings: set[str], stored_rows: int) -> None:
    wanted = meta.state_dict()
    for name in base.names:
        shape = tuple(wanted[name].shape)
        shape = (stored_rows, *shape[1:]) if name in embeddings else shape
        if base.shape(name) != shape:
            raise AdapterError(
                f"the base's `{name}` has shape {base.shape(name)} and its config says {shape}",
                where="--base",
                fix="name another base",
            )


def _untangle(
    meta: Any, base: BaseWeights, updates: list[WeightUpdate], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, tuple[WeightUpdate, ...]], list[str]]:
    """Return (sources, updates by weight, notes).

    A tied head gets a weight of its own only where the adapter treats it differently.
    """
    by_weight: dict[str, list[WeightUpdate]] = defaultdict(list)
    for update in updates:
        by_weight[update.weight].append(update)
    tied = _tied_pairs(meta)
    sources = {name: name for name in base.names if name not in tied}
    notes = []
    for head, embedding in tied.items():
        # Rows trained by peft in a tied embedding are trained in the head as well; every other update touches the one
        # it names.
        following = [update for update in by_weight[embedding] if update.kind == "rows"]
        own = [update for update in by_weight[head] if update.kind != "rows"]
        if _same(by_weight[embedding], own + following, tensors):
            by_weight.pop(head, None)
            continue
        by_weight[head] = own + following
        sources[head] = embedding
        notes.append(
            f"`{head}` was tied to `{embedding}` and is now a weight of its own: the adapter treats the two differently"
        )
    return sources, {name: tuple(one) for name, one in by_weight.items() if one}, notes


def _tied_pairs(meta: Any) -> dict[str, str]:
    """Return head -> embedding for weights that are one weight under two names."""
    layer = meta.get_input_embeddings()
    embedding = next(f"{name}.weight" for name, module in meta.named_modules() if module is layer)
    return dict.fromkeys(tied_names(meta), embedding)


def _same(embedding: list[WeightUpdate], head: list[WeightUpdate], tensors: Mapping[str, Tensor]) -> bool:
    """Whether both weights end up equal: nothing, the same rows, or the same values."""
    if (
        [update for update in embedding if update.kind != "rows"]
        == [update for update in head if update.kind != "rows"]
        == []
    ):
        return True
    if [update.kind for update in embedding] != ["replace"] or [update.kind for update in head] != ["replace"]:
        return False
    return torch.equal(tensors[embedding[-1].tensors["value"]], tensors[head[-1].tensors["value"]])
