"""The weights of a base model, read one tensor at a time, under the names its model class knows them by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtune.common.dtypes import torch_dtype
from llmtune.errors import ModelError

__all__ = ["BaseWeights", "open_base_weights"]


@dataclass(frozen=True)
class _Place:
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class BaseWeights:
    """Name in the model -> where the tensor lies; nothing is held in memory between reads."""

    def __init__(self, places: Mapping[str, _Place], everything: Sequence[_Place]) -> None:
        self._places = dict(places)
        self._all = list(everything)

    @property
    def names(self) -> list[str]:
        """Names of the weights, as in the model's state dict; tied ones once."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight as it is stored."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type a weight is stored in."""
        return self._places[name].dtype

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor in the files under its own name there, in the order of those names: what a digest is taken
        over.
        """
        for place in sorted(self._all, key=lambda place: place.name):
            yield place.name, _read(place)

    def read(self, name: str) -> Tensor:
        """Read one weight."""
        return _read(self._places[name])


def open_base_weights(files: Sequence[Path], meta_model: Any) -> BaseWeights:
    """Find every weight of `meta_model` (the model's class on the meta device) in `files`.

    A file may name weights without the model's own prefix (GPT-2's hub files do). Raises ModelError where a weight is
    not in the files under a name of its own; such files are converted while they are loaded, and must be saved once in
    the model's own names.
    """
    wanted = list(meta_model.state_dict())
    prefix = f"{meta_model.base_model_prefix}."
    found: dict[str, _Place] = {}
    everything = list(_places(files))
    for place in everything:
        for name in (place.name, prefix + place.name, place.name.removeprefix(prefix)):
            if name in wanted:
                found[name] = place
                break
    tied = set(tied_names(meta_model))
    missing = [name for name in wanted if name not in found and name not in tied]
    if missing:
        fix = "load the base with transformers and save it with `save_pretrained`, then name that folder with --base"
        raise ModelError(
            f"the base's files have no tensor `{missing[0]}` under this name", where=str(files[0].parent), fix=fix
        )
    return BaseWeights({name: found[name] for name in wanted if name in found}, everything)


def tied_names(model: Any) -> list[str]:
    """Return the names of weights that are another one under a second name, and may therefore be missing in files."""
    tied = getattr(model, "_tied_weights_keys", None) or {}
    return [name for name in tied if model.config.get_text_config().tie_word_embeddings]


def _read(place: _Place) -> Tensor:
    from safetensors import safe_open

    with safe_open(
        place.path, framework="pt"
    ) as file:  # opened for each tensor, so that no mapped page outlives its use
        return file.get_tensor(place.name)


def _places(files: Sequence[Path]) -> Iterable[_Place]:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                yield _Place(path, name, tuple(piece.get_shape()), torch_dtype(piece.get_dtype()))
