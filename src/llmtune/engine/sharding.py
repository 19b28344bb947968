"""How the processes of a run hold its weights: each of them all (`ddp`), or each a part of every weight (`fsdp`).

With `fsdp` (FSDP2; the scheme: arXiv:2304.11277) a weight exists whole only while its block is computed. The unit
around all blocks is a module whose forward is any function over the model, so the fast forward, evaluation and
generation run as they are on weights that are gathered for them. Gradients are summed, never averaged: a window's loss
is divided once, by the trained tokens of all processes.

A collective operation waits for every process. So every process runs the same number of forward passes, in training, in
evaluation and for answers, and whatever reads a whole tensor is called by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llmtune.common.decisions import Decision
from llmtune.engine.devices import Devices
from llmtune.errors import MachineError
from llmtune.kernels.recompute import checkpointable_blocks
from llmtune.models.parameters import trained_parameters

__all__ = ["Sharded", "Strategy", "Whole", "full_tensor", "gather", "local_part", "make_strategy", "shard_like"]

P = ParamSpec("P")
T = TypeVar("T")

OLDEST_TORCH = (2, 13)
"""The first torch in which a weight that no micro-batch of one process used has a gradient of 0 in the sum."""


class Strategy(Protocol):
    """What the way of holding weights decides."""

    @property
    def is_sharded(self) -> bool:
        """Whether weights are in parts, so that all processes run the same number of forward passes."""
        ...

    def shard(self, model: nn.Module, /) -> tuple[Decision, ...]:
        """Give every process its weights, alike in all; parameters may be other objects from then on."""
        ...

    def run(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Call a function that computes with the model; each process must call it."""
        ...

    def whole(self, block: nn.Module, /) -> AbstractContextManager[object]:
        """Give the context in which a block of the model has all of its weights; each process must enter it."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter], /) -> None:
        """Complete the gradients of a window: their sum over all processes."""
        ...


class Whole:
    """Every process, or the only one, holds the whole model."""

    is_sharded = False

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def shard(self, model: nn.Module, /) -> tuple[Decision, ...]:
        """Give every process the trained weights of the main one."""
        # One seed made them alike; now they are, on any mix of devices.
        self._devices.broadcast(trained_parameters(model).values())
        return ()

    def run(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Call the function."""
        return function(*args, **named)

    def whole(self, _block: nn.Module, /) -> AbstractContextManager[object]:
        """Do nothing: it always has."""
        return nullcontext()

    def sum_gradients(self, parameters: Sequence[nn.Parameter], /) -> None:
        """Sum the gradients over all processes, after the last backward pass of the window."""
        self._devices.sync_gradients(parameters)


class Sharded:
    """Every process holds an equal part of every weight, of its gradient and of its optimizer state.

    Raises MachineError with an older torch.
    """

    is_sharded = True

    def __init__(self, devices: Devices) -> None:
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < OLDEST_TORCH:
            fix = "install torch 2.13 or newer, or set `distributed.strategy: ddp`"
            raise MachineError(f"torch {torch.__version__} is too old to shard weights", "distributed.strategy", fix)
        self._devices = devices
        self._root: _Root | None = None

    def shard(self, model: nn.Module) -> tuple[Decision, ...]:
        """Shard each block as a unit, and what is outside of them (embedding, last norm, head) as one."""
        mesh = init_device_mesh(self._devices.device.type, (self._devices.world_size,))
        blocks = checkpointable_blocks(model)
        # Blocks before the root: a unit takes what no unit inside it has.
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # Around the model and not the model itself: its forward is then whatever `run` is given.
        self._root = _Root(model)
        fully_shard(self._root, mesh=mesh)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                # The default is a mean over processes; and of the sums only the plain one exists for gloo.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                # A micro-batch without trained tokens gives the head no gradient, and the others wait for its part.
                module.set_reduce_scatter_unused_params(True, recurse=False)
        parameters = list(model.parameters())
        own, everything = (sum(part.numel() for part in parts) for parts in (map(local_part, parameters), parameters))
        held = f"{self._devices.world_size} processes; this one holds {own:,} of {everything:,} stored numbers"
        reason = f"{held}, and {len(blocks)} blocks are whole one after the other"
        return (Decision("distributed.strategy", "fsdp", reason),)

    def run(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Call the function while the weights outside of the blocks are whole."""
        assert self._root is not None, "sharded before it is run"
        result: T = self._root(function, *args, **named)
        if not (isinstance(result, Tensor) and result.requires_grad):
            # No backward pass will: and whole weights would not follow the next update.
            self._root.reshard()  # type: ignore[operator]
        return result

    @contextmanager
    def whole(self, block: nn.Module, /) -> Iterator[None]:
        """Gather the block's weights, and keep this process's part of them again at the end."""
        assert isinstance(block, FSDPModule), "each block is a unit"
        block.unshard()
        try:
            yield
        finally:
            block.reshard()

    def sum_gradients(self, _parameters: Sequence[nn.Parameter], /) -> None:
        """Do nothing: each backward pass has summed them, and kept this process's part."""


class _Root(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: object, **named: object) -> T:
        return function(*args, **named)


def make_strategy(name: str, devices: Devices) -> Strategy:
    """The strategy of that name; a process alone holds the whole model in any."""
    return Sharded(devices) if name == "fsdp" and devices.world_size > 1 else Whole(devices)


def full_tensor(tensor: Tensor) -> Tensor:
    """Give the tensor in its unsharded shape; each process must call it where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Give this process's part of a sharded tensor [n, ...] -> [about n / processes, ...], without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Give a full tensor as `like`, of the same shape, is: this process's part of it where that is sharded.

    Every process has the full tensor; nothing is sent.
    """
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Give tensors of any shape in full, sharded ones gathered to the CPU one at a time; each process must call it.

    keep: whether this process wants them; without it, it takes part and the sharded ones are left out. Two names of one
    tensor stay one tensor.
    """
    gathered: dict[str, Tensor] = {}
    made: dict[int, Tensor | None] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            gathered[name] = tensor.detach()
            continue
        if id(tensor) not in made:
            # Every process takes part, also one that keeps nothing: the others would wait for it.
            whole = full_tensor(tensor.detach())
            made[id(tensor)] = whole.cpu() if keep else None
        full = made[id(tensor)]
        if full is not None:
            gathered[name] = full
    return gathered
