"""Read a model's weight files in one pass: their tensors, a check for NaN and infinity, and their digest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llmtune import durable
from llmtune.errors import ModelError, Problem

__all__ = ["WeightsReport", "digest_tensors", "inspect_weights", "load_trained_part", "refuse_changed_weights"]

_MOST_NAMED = 5


@dataclass(frozen=True)
class WeightsReport:
    """The contents of weight files in short."""

    digest: str
    """sha256 over (name, type, shape, bytes) of every tensor in the order of names, whichever files they lie in."""
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: frozenset[str]
    largest: float
    """Greatest absolute value in any floating-point tensor."""


def inspect_weights(files: Sequence[Path]) -> WeightsReport:
    """Read every tensor once, memory-mapped, and return names, types, the largest value and the digest.

    Raises ModelError for a file that is not safetensors, a name in two files, or values that are not finite, with the
    first tensors named.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: set[str] = set()
    bad: list[Problem] = []
    largest = 0.0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal largest
        for name, path, tensor in _tensors_by_name(files):
            shapes[name] = tuple(tensor.shape)
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            peak = _largest_value(tensor)
            if not math.isfinite(peak):
                problem = f"the weight `{name}` has values that are not numbers (NaN or infinite)"
                bad.append(Problem(problem, str(path), _NON_FINITE_FIX))
            largest = max(largest, peak)
            yield name, tensor

    digest = digest_tensors(tensors())
    if bad:
        others = [Problem(f"and {len(bad) - _MOST_NAMED} more tensors")] if len(bad) > _MOST_NAMED else []
        raise ModelError.all(bad[:_MOST_NAMED] + others)
    return WeightsReport(digest, shapes, frozenset(dtypes), largest)


def refuse_changed_weights(folder: Path) -> None:
    """Compare each weight file with the manifest beside it, where llmtune wrote one (P5).

    Other files, a model card for example, may be edited. Links are followed: a hub's cache is made of them. Raises
    ModelError that names each changed weight file, or the manifest where that is damaged.
    """
    try:
        durable.read_manifest(folder)
    except (FileNotFoundError, IsADirectoryError):
        return
    except (durable.DamagedManifestError, OSError):
        pass  # verify_manifest below says what is wrong with it
    except ValueError:
        return  # a file of that name that another program wrote
    changed = durable.verify_manifest(folder, only="*.safetensors", links=True)
    if changed:
        raise ModelError.all(changed)


def load_trained_part(model: torch.nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint that holds the trained ones alone into the model, in the model's types.

    Raises ModelError for weights that were changed since, or that the model does not have in this shape.
    """
    refuse_changed_weights(folder)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, path, tensor in _tensors_by_name([folder / "model.safetensors"]):
            if name not in parameters or parameters[name].shape != tensor.shape:
                problem = f"the base has no weight `{name}` of shape {tuple(tensor.shape)}"
                raise ModelError(problem, where=str(path), fix="put back the base that the run was trained on")
            parameters[name].copy_(tensor)


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the sha256 over (name, type, shape, bytes) of each tensor in the given order, by convention that of names.

    tensors: of any shape and type, on any device; their values are taken in row-major order. SHA-256: FIPS 180-4,
    https://doi.org/10.6028/NIST.FIPS.180-4.
    """
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _tensors_by_name(files: Sequence[Path]) -> Iterator[tuple[str, Path, torch.Tensor]]:
    file_of: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path.name} cannot be read as safetensors: {error}", where=str(path), fix="fetch the file again"
            ) from error
        for name in names:
            if name in file_of:
                raise ModelError(
                    f"the tensor `{name}` is in two files",
                    where=f"{file_of[name]} and {path}",
                    fix="fetch the model again",
                )
            file_of[name] = path
    # Memory-mapped, so a tensor is read when its turn comes and not all shards at once.
    handles = {path: safe_open(path, framework="pt") for path in files}
    for name in sorted(file_of):
        path = file_of[name]
        yield name, path, handles[path].get_tensor(name)


def _largest_value(tensor: torch.Tensor) -> float:
    """Return the greatest absolute value, NaN when any is NaN.

    0 for whole numbers, empty tensors and 8-bit floats (which quantizers write, and torch cannot compare).
    """
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.element_size() < 2:
        return 0.0
    low, high = torch.aminmax(tensor)
    peak = max(abs(float(low)), abs(float(high)))
    return math.nan if math.isnan(float(low)) or math.isnan(float(high)) else peak


_NON_FINITE_FIX = (
    "these weights are damaged or from a run that diverged; use an earlier checkpoint or fetch the model again"
)
