"""Write a merged model, each weight computed in the moment it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from llmtune.adapters.weight_updates import WeightUpdate
from llmtune.deploy.merge_inputs import MergeInputs
from llmtune.deploy.merge_math import MergedWeight, count_changes, merge_bias, merge_low_rank, round_once
from llmtune.deploy.merge_plan import MergePlan
from llmtune.deploy.model_files import refuse_overflow, write_model_files, write_shards
from llmtune.deploy.usage import folder_result, usage
from llmtune.models.model_card import THIS_FOLDER, merged_model_card

__all__ = ["MergeStatistics", "write_merged"]


@dataclass
class MergeStatistics:
    """Counts and digest of a merge, filled while it is written."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    """Types of the floating-point weights."""
    weights_changed: int = 0
    entries_changed: int = 0
    entries_unchanged_by_rounding: int = 0
    peak_memory_bytes: int = 0
    """Largest growth of the process while the files were written."""
    digest: str = ""
    """sha256 over the weight files in order."""


def write_merged(plan: MergePlan, inputs: MergeInputs, folder: Path) -> MergeStatistics:
    """Write weights, config, generation config, tokenizer and card into `folder`.

    Raises ModelError when a weight does not fit the requested type, MachineError when the system refuses to write.
    """
    statistics = MergeStatistics()
    process = psutil.Process()
    before = process.memory_info().rss

    def merged(name: str) -> Tensor:
        weight = _merged_weight(plan, name, statistics)
        statistics.peak_memory_bytes = max(statistics.peak_memory_bytes, process.memory_info().rss - before)
        return weight

    described = {name: _description(plan, name) for name in plan.sources}
    statistics.digest = write_shards(folder, described, merged)
    statistics.dtypes = {tensor.dtype for tensor in described.values() if tensor.is_floating_point()}
    write_model_files(
        folder,
        config=plan.config,
        class_name=plan.class_name,
        dtypes=statistics.dtypes,
        generation_config_from=() if inputs.labels else (inputs.adapter, inputs.base_folder),
        tokenizer=inputs.tokenizer,
        card=merged_model_card(
            adapter=inputs.adapter.name,
            base=inputs.base_name,
            prompts=inputs.defaults.described(),
            usage=usage(folder_result(THIS_FOLDER, plan.config, inputs.tokenizer, inputs.defaults)),
            labels=inputs.labels,
        ),
        defaults=inputs.defaults,
    )
    return statistics


def _description(plan: MergePlan, name: str) -> Tensor:
    """Return a tensor on the meta device with the merged weight's shape and type."""
    source = plan.sources[name]
    stored = plan.base.dtype(source)
    shape = plan.base.shape(source)
    if source in plan.embeddings:
        shape = (plan.rows, *shape[1:])
    dtype = plan.dtype if plan.dtype is not None and stored.is_floating_point else stored
    return torch.empty(shape, dtype=dtype, device="meta")


def _merged_weight(plan: MergePlan, name: str, statistics: MergeStatistics) -> Tensor:
    source = plan.sources[name]
    weight = _base_weight(plan, source)
    dtype = plan.dtype if plan.dtype is not None and weight.is_floating_point() else plan.base.dtype(source)
    updates = plan.updates.get(name, ())
    if updates:
        statistics.weights_changed += 1
        for update in updates:
            merged = _APPLY[update.kind](weight, update, plan.tensors, dtype)
            weight = merged.weight
            statistics.entries_changed += merged.changed
            statistics.entries_unchanged_by_rounding += merged.unchanged_by_rounding
    else:
        weight = round_once(weight, dtype)
    refuse_overflow(name, weight, command="merge")
    return weight


def _base_weight(plan: MergePlan, name: str) -> Tensor:
    """Return a base weight as training computed with it: with the added rows, and through 4 or 8 bits."""
    weight = plan.with_added_rows(name, plan.base.read(name))
    if plan.quantization is None or not weight.is_floating_point():
        return weight
    return plan.as_held_in_training(name, weight)


def _apply_low_rank(
    weight: Tensor, update: WeightUpdate, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> MergedWeight:
    magnitude = update.tensors.get("magnitude")
    return merge_low_rank(
        weight,
        tensors[update.tensors["A"]],
        tensors[update.tensors["B"]],
        scaling=update.scaling,
        dtype=dtype,
        is_transposed=update.is_transposed,
        magnitude_O=tensors[magnitude] if magnitude is not None else None,
    )


def _apply_bias(
    weight: Tensor, update: WeightUpdate, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> MergedWeight:
    return merge_bias(weight, tensors[update.tensors["value"]], scaling=update.scaling, dtype=dtype)


def _apply_rows(
    weight: Tensor, update: WeightUpdate, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> MergedWeight:
    rows = torch.tensor(update.rows)
    replaced = _replaced(weight[rows], tensors[update.tensors["value"]], dtype)
    merged = round_once(weight, dtype)
    merged = merged.clone() if merged is weight else merged  # the tensor of the caller stays as it was
    merged[rows] = replaced.weight
    return MergedWeight(merged, replaced.changed, replaced.unchanged_by_rounding)


def _apply_replace(
    weight: Tensor, update: WeightUpdate, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> MergedWeight:
    return _replaced(weight, tensors[update.tensors["value"]], dtype)


def _replaced(base: Tensor, value: Tensor, dtype: torch.dtype) -> MergedWeight:
    rounded = round_once(value, dtype)
    return MergedWeight(rounded, *count_changes(base, value, rounded))


_APPLY: dict[str, Callable[[Tensor, WeightUpdate, Mapping[str, Tensor], torch.dtype], MergedWeight]] = {
    "low_rank": _apply_low_rank,
    "bias": _apply_bias,
    "rows": _apply_rows,
    "replace": _apply_replace,
}
