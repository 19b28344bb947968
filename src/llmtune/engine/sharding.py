"""How the processes of a run hold its weights: each of them all (`ddp`), or each a part of every weight (`fsdp`).

DeepSpeed is in `zero`, the table of all of them in `strategies`.

With `fsdp` (FSDP2; the scheme: arXiv:2304.11277) a weight exists whole only while its block is computed. The unit
around all blocks is a module whose forward is any function over the model, so the fast forward, evaluation and
generation run as they are on weights that are gathered for them. Gradients are summed, never averaged: a window's loss
is divided once, by the trained tokens of all processes.

A collective operation waits for every process. So every process runs the same number of forward passes, in training, in
evaluation and for answers, and whatever reads a whole tensor is called by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from llmtune.common.decisions import Decision
from llmtune.engine.devices import Devices
from llmtune.engine.optim import AnyOptimizer, Optimizer
from llmtune.engine.precision import Precision
from llmtune.engine.sharded_tensors import gather, local_part
from llmtune.engine.update import StepAfterBackward, Update
from llmtune.errors import MachineError
from llmtune.models.parameters import checkpointable_blocks, trained_parameters

__all__ = ["ComputeRoot", "MakeOptimizer", "Sharded", "Strategy", "Whole"]

P = ParamSpec("P")
T = TypeVar("T")
MakeOptimizer: TypeAlias = Callable[[torch.device], tuple[Optimizer, list[Decision]]]
"""Builds the optimizer of the trained weights as they are when it is called, which lie on that device."""

OLDEST_TORCH = (2, 13)
"""The first torch in which a weight that no micro-batch of one process used has a gradient of 0 in the sum."""


class Strategy(Protocol):
    """What the way of holding weights decides."""

    @property
    def is_sharded(self) -> bool:
        """Whether weights are in parts, so that all processes run the same number of forward passes."""
        ...

    @property
    def takes_blocks_as_stored(self) -> bool:
        """Whether `shard` converts a block's frozen or trained weights when its turn comes."""
        ...

    def shard(
        self, model: nn.Module, make_optimizer: MakeOptimizer, /, *, convert_block: Callable[[nn.Module], object]
    ) -> tuple[AnyOptimizer, tuple[Decision, ...], list[Decision]]:
        """Give every process its weights, alike in all, and the optimizer of what it holds.

        convert_block: gives the weights of a block their type, where they have that of their files until then.
        Parameters may be other objects from then on. Returns the optimizer, the choices made here, and its own.
        """
        ...

    def run(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Call a function that computes with the model; each process must call it."""
        ...

    def whole(self, block: nn.Module, /) -> AbstractContextManager[object]:
        """Give the context in which a block of the model has all of its weights; each process must enter it."""
        ...

    def opened(self, parameters: Iterable[Tensor], /, *, write: bool = False) -> AbstractContextManager[object]:
        """Give the context in which parameters, of any shape, can be read in full, or, with `write`, be overwritten.

        Each process must enter it, and write the same. A DTensor is its own way to both.
        """
        ...

    def shape(self, parameter: Tensor, /) -> torch.Size:
        """Give the shape of the whole parameter."""
        ...

    def part(self, parameter: Tensor, /) -> Tensor:
        """Give what this process holds of a parameter [n, ...], without a copy: all, or about n / processes of it."""
        ...

    def gather(self, tensors: Mapping[str, Tensor], /, *, keep: bool) -> dict[str, Tensor]:
        """Give tensors in their full shapes, those in parts gathered to the CPU one at a time, on each process at once.

        keep: whether this process gets them; without it, it takes part only.
        """
        ...

    def make_update(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: AnyOptimizer,
        precision: Precision,
        /,
        *,
        max_grad_norm: float | None,
    ) -> Update:
        """Make what turns the gradients of a window into one step of the optimizer that `shard` returned."""
        ...


class Whole:
    """Every process, or the only one, holds the whole model."""

    is_sharded = False
    takes_blocks_as_stored = False

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def shard(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        /,
        *,
        convert_block: Callable[[nn.Module], object],  # noqa: ARG002 - of the protocol
    ) -> tuple[Optimizer, tuple[Decision, ...], list[Decision]]:
        """Give every process the trained weights of the main one."""
        # One seed made them alike; now they are, on any mix of devices.
        self._devices.broadcast(trained_parameters(model).values())
        optimizer, decisions = make_optimizer(self._devices.device)
        return optimizer, (), decisions

    def run(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Call the function."""
        return function(*args, **named)

    def whole(self, _block: nn.Module, /) -> AbstractContextManager[object]:
        """Do nothing: it always has."""
        return nullcontext()

    def opened(self, _parameters: Iterable[Tensor], /, *, write: bool = False) -> AbstractContextManager[object]:  # noqa: ARG002 - of the protocol
        """Do nothing: parameters, of any shape, always are."""
        return nullcontext()

    def shape(self, parameter: Tensor, /) -> torch.Size:
        """Give its shape."""
        return parameter.shape

    def part(self, parameter: Tensor, /) -> Tensor:
        """Give all of it, in its shape."""
        return parameter

    def gather(self, tensors: Mapping[str, Tensor], /, *, keep: bool) -> dict[str, Tensor]:
        """Give them as they are, of any shape."""
        return gather(tensors, keep=keep)

    def make_update(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: AnyOptimizer,
        precision: Precision,
        /,
        *,
        max_grad_norm: float | None,
    ) -> StepAfterBackward:
        """Sum the gradients over all processes after the last backward pass of the window."""
        return StepAfterBackward(
            parameters, optimizer, precision, self._devices.sync_gradients, max_grad_norm=max_grad_norm
        )


class Sharded:
    """Every process holds an equal part of every weight, of its gradient and of its optimizer state.

    `on_host`: these parts wait in the memory of the host, and a block's weights come to the device with its turn; the
    optimizer moves them there. Raises MachineError with an older torch.
    """

    is_sharded = True
    takes_blocks_as_stored = True

    def __init__(self, devices: Devices, *, on_host: bool = False) -> None:
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < OLDEST_TORCH:
            fix = "install torch 2.13 or newer, or set `distributed.strategy: ddp`"
            raise MachineError(f"torch {torch.__version__} is too old to shard weights", "distributed.strategy", fix)
        self._devices, self._on_host = devices, on_host
        self._root: ComputeRoot | None = None

    def shard(
        self, model: nn.Module, make_optimizer: MakeOptimizer, /, *, convert_block: Callable[[nn.Module], object]
    ) -> tuple[Optimizer, tuple[Decision, ...], list[Decision]]:
        """Shard each block as a unit, and what is outside of them (embedding, last norm, head) as one."""
        device = self._devices.device
        mesh = init_device_mesh(device.type, (self._devices.world_size,))
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self._on_host else OffloadPolicy()
        blocks = checkpointable_blocks(model)
        # Blocks before the root: a unit takes what no unit inside it has.
        for block in blocks:
            # Until now its weights lie in mapped files; only one block at a time is whole in memory.
            convert_block(block)
            fully_shard(block, mesh=mesh, offload_policy=policy)
        # Around the model and not the model itself: its forward is then whatever `run` is given.
        self._root = ComputeRoot(model)
        fully_shard(self._root, mesh=mesh, offload_policy=policy)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                # The default is a mean over processes; and of the sums only the plain one exists for gloo.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                # A micro-batch without trained tokens gives the head no gradient, and the others wait for its part.
                module.set_reduce_scatter_unused_params(True, recurse=False)
        parameters = list(model.parameters())
        held, everything = (sum(part.numel() for part in parts) for parts in (map(local_part, parameters), parameters))
        text = f"{self._devices.world_size} processes; this one holds {held:,} of {everything:,} stored numbers"
        reason = f"{text}, and {len(blocks)} blocks are whole one after the other"
        decisions = [Decision("distributed.strategy", "fsdp", reason)]
        if self._on_host:
            reason = "asked for: parts of weights, gradients and optimizer state wait in the host's memory"
            decisions.append(Decision("distributed.offload", "all", reason))
        optimizer, own = make_optimizer(torch.device("cpu") if self._on_host else device)
        return optimizer, tuple(decisions), own

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

    def opened(self, _parameters: Iterable[Tensor], /, *, write: bool = False) -> AbstractContextManager[object]:  # noqa: ARG002 - of the protocol
        """Do nothing: a DTensor, of any shape, is read and overwritten as it is."""
        return nullcontext()

    def shape(self, parameter: Tensor, /) -> torch.Size:
        """Give its shape, which a DTensor has whole."""
        return parameter.shape

    def part(self, parameter: Tensor, /) -> Tensor:
        """Give this process's part, [n, ...] -> [about n / processes, ...]."""
        return local_part(parameter)

    def gather(self, tensors: Mapping[str, Tensor], /, *, keep: bool) -> dict[str, Tensor]:
        """Gather them one at a time, each in its full shape."""
        return gather(tensors, keep=keep)

    def make_update(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: AnyOptimizer,
        precision: Precision,
        /,
        *,
        max_grad_norm: float | None,
    ) -> StepAfterBackward:
        """Sum nothing more: each backward pass has summed its gradients, and kept this process's part."""
        return StepAfterBackward(parameters, optimizer, precision, lambda _: None, max_grad_norm=max_grad_norm)


class ComputeRoot(nn.Module):
    """The unit around a whole model, whose forward is any function over it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: object, **named: object) -> T:
        """Call the function."""
        return function(*args, **named)
