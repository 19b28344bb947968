"""Read the weights of a base model one tensor at a time, by the names of its model class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from llmtune.common.dtypes import torch_dtype
from llmtune.errors import ModelError
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.parameters import SCORE_HEADS
from llmtune.models.read_config import auto_class, quiet_libraries
from llmtune.models.scan import read_json_file, refuse_unsafe_folder, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["BaseWeights", "meta_model", "open_base_weights", "tied_names", "unquantized_folder"]


@dataclass(frozen=True)
class _StoredTensor:
    path: Path | None
    """None of a weight that is in no file: all of it is 0."""
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class BaseWeights:
    """The weights of a model in its files; each is read when it is asked for and none is kept in memory."""

    def __init__(self, weights: Mapping[str, _StoredTensor], all_tensors: Sequence[_StoredTensor]) -> None:
        self._weights = dict(weights)
        self._all_tensors = list(all_tensors)

    @property
    def names(self) -> list[str]:
        """Names of the weights, as in the model's state dict; tied ones once."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight as it is stored."""
        return self._weights[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type a weight is stored in."""
        return self._weights[name].dtype

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the files, tensor of any shape) for every tensor, in the order of names, as digests do."""
        for tensor in sorted(self._all_tensors, key=lambda tensor: tensor.name):
            yield tensor.name, _read(tensor)

    def read(self, name: str) -> Tensor:
        """Read one weight, of the shape and type it is stored in."""
        return _read(self._weights[name])


def open_base_weights(files: Sequence[Path], model: PreTrainedModel) -> BaseWeights:
    """Find every weight of `model` (on the meta device, see `meta_model`) in `files`.

    A file may name weights without the model's own prefix (GPT-2's hub files do). Raises ModelError where a weight is
    not in the files under a name of its own: files that transformers converts while it loads them must be saved anew.
    """
    expected = list(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    weights: dict[str, _StoredTensor] = {}
    all_tensors = list(_stored_tensors(files))
    for tensor in all_tensors:
        for name in (tensor.name, prefix + tensor.name, tensor.name.removeprefix(prefix)):
            if name in expected:
                weights[name] = tensor
                break
    tied = set(tied_names(model))
    # A head of scores is the adapter's own, unless the base had one.
    dtype = next(iter(weights.values())).dtype if weights else torch.float32
    for name, tensor in model.state_dict().items():
        if name not in weights and name.split(".")[0] in SCORE_HEADS:
            weights[name] = _StoredTensor(None, name, tuple(tensor.shape), dtype)
    missing = [name for name in expected if name not in weights and name not in tied]
    if missing:
        fix = "load the base with transformers and save it with `save_pretrained`, then name that folder with --base"
        raise ModelError(
            f"the base's files have no tensor `{missing[0]}` under this name", where=str(files[0].parent), fix=fix
        )
    return BaseWeights({name: weights[name] for name in expected if name in weights}, all_tensors)


def tied_names(model: PreTrainedModel) -> list[str]:
    """Return the second names of tied weights, which may therefore be missing in files."""
    tied = getattr(model, "_tied_weights_keys", None) or {}
    return [name for name in tied if model.config.get_text_config().tie_word_embeddings]


def _read(tensor: _StoredTensor) -> Tensor:
    if tensor.path is None:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    # Opened for each tensor, so that no mapped page outlives its use.
    with safe_open(tensor.path, framework="pt") as file:
        return file.get_tensor(tensor.name)


def _stored_tensors(files: Sequence[Path]) -> Iterable[_StoredTensor]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                header = file.get_slice(name)
                yield _StoredTensor(path, name, tuple(header.get_shape()), torch_dtype(header.get_dtype()))


def meta_model(config: PreTrainedConfig, labels: Sequence[str] = ()) -> PreTrainedModel:
    """Return the model of this config on the meta device: classes, names and shapes without any numbers.

    labels: of a model that gives scores.
    """
    # Without numbers a model of 8B parameters takes a few megabytes, and its names and shapes are all that is needed.
    with torch.device("meta"), quiet_libraries():
        model: PreTrainedModel = auto_class(labels).from_config(config)
        return model


def unquantized_folder(source: ModelSource, *, noun: str, fix: str) -> Path:
    """Return the checked folder of a model whose weights can be written back exactly.

    noun, fix: words of the error. Raises ModelError for an unsafe folder and for weights that are missing, pickled or
    published quantized; MachineError when the model cannot be fetched.
    """
    folder = local_folder(source)
    refuse_unsafe_folder(folder, ignore_auto_map=may_ignore_auto_map(source))
    if (read_json_file(folder / "config.json") or {}).get("quantization_config"):
        problem = f"the {noun} is published quantized, and its weights cannot be written back exactly"
        raise ModelError(problem, where=str(folder), fix=fix)
    weight_files(folder)
    return folder
