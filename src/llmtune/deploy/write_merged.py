"""Write a merged model, each weight computed in the moment it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from llmtune import durable
from llmtune.adapters.weight_updates import WeightUpdate
from llmtune.deploy.merge_inputs import MergeInputs
from llmtune.deploy.merge_math import MergedWeight, merge_bias, merge_low_rank, round_once
from llmtune.deploy.merge_plan import MergePlan
from llmtune.errors import ModelError
from llmtune.models.quantization import quantize_dequantize
from llmtune.models.save import write_tokenizer

__all__ = ["Written", "copy_generation_config", "write_merged", "write_shards"]

MAX_SHARD_BYTES = 5_000_000_000


@dataclass
class Written:
    """What was written, counted while it was."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    """Types of the floating-point weights."""
    weights_changed: int = 0
    entries_changed: int = 0
    entries_unchanged_by_rounding: int = 0
    peak_memory_bytes: int = 0
    digest: str = ""
    """sha256 over the weight files in order."""


def write_merged(
    plan: MergePlan, origin: MergeInputs, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Written:
    """Write weights, config, generation config, tokenizer and chat template into `folder`.

    Raises ModelError when a weight does not fit the type asked for, MachineError when the disk refuses.
    """
    written = Written()
    process = psutil.Process()
    before = process.memory_info().rss

    def merged(name: str) -> Tensor:
        tensor = _merged_weight(plan, name, written)
        written.peak_memory_bytes = max(written.peak_memory_bytes, process.memory_info().rss - before)
        return tensor

    described = {name: _description(plan, name) for name in plan.sources}
    written.digest = write_shards(folder, described, merged, max_shard_bytes)
    written.dtypes = {one.dtype for one in described.values() if one.is_floating_point()}
    _write_rest(plan, origin, folder, written)
    return written


def write_shards(
    folder: Path,
    described: Mapping[str, Tensor],
    compute: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Write weights as safetensors, in several files with an index where one would be too large.

    Returns sha256 over the files in order.

    described: name -> shape and type, without memory. compute(name): the tensor, asked for in the moment it is written.
    Raises MachineError.
    """
    shards = _shards(described, max_shard_bytes)
    digest = hashlib.sha256()
    places = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        durable.write_tensors(
            folder / file, _Lazy({name: described[name] for name in names}, compute), {"format": "pt"}
        )
        places.update(dict.fromkeys(names, file))
        with (folder / file).open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    if len(shards) > 1:
        total = sum(one.numel() * one.itemsize for one in described.values())
        durable.write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
        )
    return digest.hexdigest()


class _Lazy(Mapping[str, Tensor]):
    """Tensors that are described at once and computed when they are asked for by name."""

    def __init__(self, described: Mapping[str, Tensor], compute: Any) -> None:
        self._described, self._compute = described, compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def items(self) -> Any:
        """Return names with tensors that have a shape and a type and no memory."""
        return self._described.items()


def _description(plan: MergePlan, name: str) -> Tensor:
    """Return the merged weight's shape and type as a tensor without memory."""
    source = plan.sources[name]
    stored = plan.base.dtype(source)
    shape = plan.base.shape(source)
    if source in plan.embeddings:
        shape = (plan.rows, *shape[1:])
    dtype = plan.dtype if plan.dtype is not None and stored.is_floating_point else stored
    return torch.empty(shape, dtype=dtype, device="meta")


def _shards(described: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Return the names of each file, in the model's order, none above `max_bytes` unless one weight alone is."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in described.items():
        count = tensor.numel() * tensor.itemsize
        if shards[-1] and size + count > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def _merged_weight(plan: MergePlan, name: str, written: Written) -> Tensor:
    base = _held_weight(plan, plan.sources[name])
    dtype = plan.dtype if plan.dtype is not None and base.is_floating_point() else plan.base.dtype(plan.sources[name])
    updates = plan.updates.get(name, ())
    if not updates:
        result = round_once(base, dtype)
    else:
        written.weights_changed += 1
        result = base
        for update in updates:
            folded = APPLY[update.kind](result, update, plan.tensors, dtype)
            result = folded.weight
            written.entries_changed += folded.changed
            written.entries_unchanged_by_rounding += folded.unchanged_by_rounding
    if not bool(torch.isfinite(result).all()):
        fix = "merge with --dtype bfloat16 or float32"
        raise ModelError(f"`{name}` has values that do not fit {dtype}".replace("torch.", ""), where="--dtype", fix=fix)
    return result


def _held_weight(plan: MergePlan, name: str) -> Tensor:
    """Return a base weight as training saw it: with its new rows, and through 4 or 8 bit where it was held so."""
    weight = plan.base.read(name)
    missing = plan.rows - weight.shape[0] if name in plan.embeddings else 0
    if missing > 0:
        held = weight.to(plan.held_dtype)
        new = held.to(torch.float32).mean(dim=0).to(held.dtype).to(weight.dtype)
        weight = torch.cat([weight, new.expand(missing, -1)])
    if plan.quantization is None or not weight.is_floating_point():
        return weight
    if not plan.is_quantized(name):
        return weight.to(plan.held_dtype).to(torch.float32)
    seen = quantize_dequantize(weight.T if plan.is_transposed(name) else weight, plan.quantization, plan.held_dtype)
    return seen.T if plan.is_transposed(name) else seen


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
    result = round_once(weight, dtype)
    result = result.clone() if result is weight else result
    result[rows] = replaced.weight
    return MergedWeight(result, replaced.changed, replaced.unchanged_by_rounding)


def _apply_replace(
    weight: Tensor, update: WeightUpdate, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> MergedWeight:
    return _replaced(weight, tensors[update.tensors["value"]], dtype)


def _replaced(base: Tensor, value: Tensor, dtype: torch.dtype) -> MergedWeight:
    rounded, changed = round_once(value, dtype), value != base
    return MergedWeight(rounded, int(changed.sum()), int((changed & (rounded == round_once(base, dtype))).sum()))


APPLY = {"low_rank": _apply_low_rank, "bias": _apply_bias, "rows": _apply_rows, "replace": _apply_replace}


def _write_rest(plan: MergePlan, origin: MergeInputs, folder: Path, written: Written) -> None:
    config = plan.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [plan.class_name]
    if len(written.dtypes) == 1:
        config["dtype"] = str(next(iter(written.dtypes))).removeprefix("torch.")
    durable.write_json(folder / "config.json", config)
    copy_generation_config((origin.adapter, origin.base_folder), folder)
    write_tokenizer(origin.tokenizer, folder)
    durable.write_text(folder / "README.md", _card(origin))


def copy_generation_config(sources: Sequence[Path], folder: Path) -> None:
    """Copy generation_config.json, which says where an answer ends, from the first of `sources` that has one."""
    found = next((one for one in sources if (one / "generation_config.json").is_file()), None)
    if found is not None:
        durable.write_bytes(folder / "generation_config.json", (found / "generation_config.json").read_bytes())


def _card(origin: MergeInputs) -> str:
    return (
        f"---\nbase_model: {origin.base_name}\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [llmtune, merged]\n---\n\n"
        f"# {origin.base_name}, tuned\n\nThe adapter `{origin.adapter.name}` merged into `{origin.base_name}` with llmtune. "
        "`merge_report.json` says how close the result is to base and adapter.\n\n"
        '```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```\n'
    )
