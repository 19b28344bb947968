"""Write a model folder one weight at a time: weight files, config, generation config, tokenizer and card."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtune import durable
from llmtune.errors import ModelError
from llmtune.models.save import MAX_SHARD_BYTES, PromptDefaults, write_prompt_defaults, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

__all__ = ["refuse_overflow", "write_model_files", "write_shards"]


def write_shards(
    folder: Path,
    described: Mapping[str, Tensor],
    compute: Callable[[str], Tensor],
) -> str:
    """Write weights as safetensors, in several files with an index where one would be too large.

    https://huggingface.co/docs/safetensors

    Returns the sha256 over the files' digests in order.

    described: name -> tensor of the weight's shape and type on the meta device. compute(name): the tensor, called when
    it is written. Raises MachineError when the system refuses to write.
    """
    shards = _shards(described, MAX_SHARD_BYTES)
    digest = hashlib.sha256()
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = _LazyTensors({name: described[name] for name in names}, compute)
        durable.write_tensors(folder / file, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        with (folder / file).open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.itemsize for tensor in described.values())
        durable.write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    return digest.hexdigest()


def write_model_files(
    folder: Path,
    *,
    config: PreTrainedConfig,
    class_name: str,
    dtypes: set[torch.dtype],
    generation_config_from: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    card: str,
    defaults: PromptDefaults,
) -> None:
    """Write everything beside the weights: config, generation config, tokenizer and README.md.

    dtypes: types of the floating-point weights; the config names the type when there is one. generation_config_from:
    folders, the first of which with a generation_config.json gives it; it says where an answer ends. defaults: what
    stands around each prompt.

    Raises MachineError when the system refuses to write.
    """
    content = {**config.to_dict(), "architectures": [class_name]}
    content.pop("quantization_config", None)  # of the base in training; what is written is not quantized
    # With several types no one name would be true.
    if len(dtypes) == 1:
        content["dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    durable.write_json(folder / "config.json", content)
    paths = [source / "generation_config.json" for source in generation_config_from]
    generation_config = next((path for path in paths if path.is_file()), None)
    if generation_config is not None:
        durable.write_bytes(folder / "generation_config.json", generation_config.read_bytes())
    write_tokenizer(tokenizer, folder)
    write_prompt_defaults(folder, defaults)
    durable.write_text(folder / "README.md", card)


def refuse_overflow(name: str, weight: Tensor, *, command: str) -> None:
    """Raise ModelError for a weight, of any shape, with values too large for its type; command: `merge` or `export`."""
    if not bool(torch.isfinite(weight).all()):
        problem = f"`{name}` has values that do not fit {weight.dtype}".replace("torch.", "")
        raise ModelError(problem, where="--dtype", fix=f"{command} with --dtype bfloat16 or float32")


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors whose shapes and types are known and whose values are computed when they are read by name."""

    def __init__(self, described: Mapping[str, Tensor], compute: Callable[[str], Tensor]) -> None:
        self._described, self._compute = described, compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def items(self) -> ItemsView[str, Tensor]:
        """Return names with tensors on the meta device: the header of a file is written before the values."""
        return self._described.items()


def _shards(described: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Return the names of each file, in the model's order, none above `max_bytes` unless one weight alone is."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in described.items():
        num_bytes = tensor.numel() * tensor.itemsize
        # A weight that is too large alone still needs a file.
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards
