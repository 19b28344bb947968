"""The global random generators of a process as tensors, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

__all__ = ["capture_rng", "restore_rng"]


def capture_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """Copy the state of Python's, NumPy's and torch's generators, of the CPU and (key `cuda`) of a GPU `device`.

    Shapes: `python` int64 [626] (version, then words), `numpy` int64 [626] (words, position, whether a normal draw is kept),
    `normals` float64 [3] (whether Python keeps one, Python's, NumPy's), `torch` and `cuda` uint8.
    """
    version, words, kept = random.getstate()
    kind, keys, position, has_normal, normal = np.random.get_state(legacy=True)
    assert kind == "MT19937", "NumPy's global generator is the Mersenne twister"
    tensors = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_normal], dtype=torch.int64),
        "normals": torch.tensor([kept is not None, kept or 0.0, normal], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_rng(tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to what `capture_rng` gave; a GPU's only where one was captured."""
    version, *words = tensors["python"].tolist()
    keeps, kept, normal = tensors["normals"].tolist()
    random.setstate((version, tuple(words), kept if keeps else None))
    *keys, position, has_normal = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_normal, normal))
    torch.set_rng_state(tensors["torch"].cpu().clone())  # torch 2.13 crashes on a tensor that begins inside its storage
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].cpu().clone(), device)
