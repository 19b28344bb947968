"""Tensors of which each process holds a part (DTensors), whole and in parts; any other tensor is its own whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["full_tensor", "gather", "local_part", "shard_like"]


def full_tensor(tensor: Tensor) -> Tensor:
    """Give the tensor in its unsharded shape; each process must call it where it is sharded.

    full = [part of process 0; part of process 1; ...], joined on the first dimension (fully sharded data parallel,
    Zhao et al. 2023, arXiv:2304.11277).
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Give this process's part of a sharded tensor [n, ...] -> [about n / processes, ...], without a copy.

    part = full[rank c : (rank + 1) c] with c = ceil(n / processes), as `torch.chunk` cuts.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Give a full tensor as `like`, of the same shape, is: this process's part of it where that is sharded.

    Every process has the full tensor; nothing is sent.
    """
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    # A part that waits on the host is not on the device of its processes.
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Give tensors of any shape in full, sharded ones gathered to the CPU one at a time; each process must call it.

    keep: whether this process gets them; without it, it takes part and the sharded ones are left out. Two names of one
    tensor stay one tensor.
    """
    gathered: dict[str, Tensor] = {}
    made: dict[int, Tensor | None] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            gathered[name] = tensor.detach()
            continue
        if id(tensor) not in made:
            whole = full_tensor(tensor.detach())
            made[id(tensor)] = whole.cpu() if keep else None
        full = made[id(tensor)]
        if full is not None:
            gathered[name] = full
    return gathered
