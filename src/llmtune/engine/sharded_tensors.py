"""Tensors of which each process holds a part (DTensors), whole and in parts; any other tensor is its own whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["GatheredInTurn", "full_tensor", "gather", "is_in_parts", "local_part", "shard_like"]

GATHERED_BYTES = 1 << 26
"""Bytes of files that are gathered together: one tensor at least, and not a message for each small one."""

Order: TypeAlias = Callable[[Mapping[str, Tensor]], Sequence[str]]


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


def is_in_parts(tensor: Tensor) -> bool:
    """Whether each process holds a part of this tensor, of any shape."""
    return isinstance(tensor, DTensor)


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


class GatheredInTurn:
    """Tensors of files, each process holding a part of them, gathered while the main process writes them.

    So nobody holds more than the parts and what is written next. Every process makes one over the same sharded tensors.
    """

    def __init__(self, files: Mapping[str, Mapping[str, Tensor]], order: Order, *, keep: bool) -> None:
        """Take the tensors, of any shape, of each file. order: of a file's names. keep: whether this process writes."""
        self._files, self._keep = files, keep
        self._turns: list[list[tuple[str, str]]] = []
        self._turn_of: dict[tuple[str, str], int] = {}
        self._here: dict[tuple[str, str], Tensor] = {}
        room = 0
        for file, tensors in files.items():
            for name in order(tensors):
                if isinstance(tensors[name], DTensor):
                    room -= tensors[name].nbytes
                    if room < 0 or not self._turns:
                        self._turns.append([])
                        room = GATHERED_BYTES - tensors[name].nbytes
                    self._turns[-1].append((file, name))
                    self._turn_of[file, name] = len(self._turns) - 1

    def gather(self, turn: int) -> None:
        """Gather the tensors of this turn; each process must call it."""
        self._here.clear()  # what a write that failed has left
        for file, name in self._turns[turn]:
            full = full_tensor(self._files[file][name].detach())
            if self._keep:
                self._here[file, name] = full.cpu()

    def read(self, file: str, name: str, ask: Callable[[int], None]) -> Tensor:
        """Give a tensor in its full shape; where it is sharded and not here, `ask` lets all gather its turn."""
        place = (file, name)
        if place not in self._turn_of:
            return self._files[file][name]
        if place not in self._here:
            ask(self._turn_of[place])
        return self._here.pop(place)
