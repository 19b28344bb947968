"""One process or many: sums over all of them, gradients alike on each, and what each device remembers of its memory."""

from __future__ import annotations

import datetime as dt
import os
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from llmtune.common.decisions import Decision
from llmtune.config.process_options import Options
from llmtune.config.schema import Config
from llmtune.errors import ConfigError, MachineError, Problem

__all__ = ["Devices", "check_distribution", "choose_device", "open_devices", "peak_memory_bytes"]

BUCKET_BYTES = 25 * 2**20
"""Gradients are sent in buckets of about this size: fewer, larger messages."""


class Devices:
    """One process among those that train together. A single process sums nothing and waits for nobody."""

    def __init__(self, device: torch.device, *, rank: int = 0, world_size: int = 1) -> None:
        self.device = device
        self.rank = rank
        self.world_size = world_size

    @classmethod
    def from_environment(
        cls, *, no_cuda: bool = False, timeout_s: float, environ: Mapping[str, str] = os.environ
    ) -> Devices:
        """Join the processes started by `torchrun`, or by any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK,
        MASTER_ADDR and MASTER_PORT.

        Without WORLD_SIZE, or with 1, it is a single process. nccl on GPUs, gloo on CPUs.
        `timeout_s`: seconds after which a silent process counts as lost.
        Raises MachineError when the environment is incomplete.
        """
        local_rank = int(environ.get("LOCAL_RANK", "0"))
        device = choose_device(no_cuda=no_cuda, local_rank=local_rank)[0]
        world_size = int(environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(device)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise MachineError(
                f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set",
                where="environment",
                fix="start with `torchrun`",
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        rank = int(environ["RANK"])
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=dt.timedelta(seconds=timeout_s),
        )
        return cls(device, rank=rank, world_size=world_size)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, *values: float) -> tuple[float, ...]:
        """Add each value over all processes, in float64."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all processes, on the device, without waiting."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def sync_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Replace each gradient by its sum over all processes; every process then holds the same bits.

        A process without rows takes part with zeros. A parameter that has a gradient nowhere keeps none, as in a single
        process. The order of the sum is fixed by the backend for a given number of processes.
        """
        if self.world_size == 1:
            return
        present = torch.tensor(
            [parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=self.device
        )
        dist.all_reduce(present)
        somewhere = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
        for parameter in somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(somewhere):
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(
                gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
            )

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite each tensor with the main process's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def gather_rows(self, row: torch.Tensor) -> torch.Tensor:
        """Stack equally shaped tensors of all processes: [...] of each -> [world_size, ...] on each, on the CPU."""
        if self.world_size == 1:
            return row[None].cpu()
        rows = [torch.empty_like(row, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(rows, row.to(self.device).contiguous())
        return torch.stack(rows).cpu()

    def close(self) -> None:
        """Leave the other processes."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _buckets(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group parameters of one dtype, in order, into buckets of about `BUCKET_BYTES`."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for parameter in parameters:
        if not buckets or size >= BUCKET_BYTES or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets


def choose_device(*, no_cuda: bool = False, local_rank: int = 0) -> tuple[torch.device, Decision]:
    """Take this process's GPU when there is one and it is wanted, else the CPU, and say why."""
    if no_cuda:
        return torch.device("cpu"), Decision("device", "cpu", "--no-cuda was given")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        return device, Decision("device", str(device), torch.cuda.get_device_name(device))
    return torch.device("cpu"), Decision("device", "cpu", "no CUDA device was found")


def peak_memory_bytes(device: torch.device) -> int:
    """Give the most memory held so far: bytes allocated by tensors on a GPU, resident bytes of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


STRATEGIES = ("auto", "ddp")
"""Ways to share a training between processes that exist: one process alone, or the whole model in each and gradients
summed.
"""


WHAT_WORKS = (
    "use `auto` or `ddp` and start with `torchrun --nproc-per-node N -m llmtune train ...`; "
    "a model too large for one device may fit with `adapter.method: lora` and `model.quantization: 4bit`"
)


def check_distribution(config: Config) -> None:
    """Raise ConfigError for a way to share a training that this version does not have."""
    wanted = config.distributed
    problems = []
    if wanted.strategy not in STRATEGIES:
        what = f"strategy `{wanted.strategy}` does not exist in this version: every process holds the whole model"
        problems.append(Problem(what, "distributed.strategy", WHAT_WORKS))
    if wanted.deepspeed_config is not None:
        what = f"nothing in this version reads the DeepSpeed file `{wanted.deepspeed_config}`"
        problems.append(Problem(what, "distributed.deepspeed_config", "remove the key"))
    if problems:
        raise ConfigError.all(problems)


def check_processes(config: Config, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for several processes where weights move before the gradients of all could be summed."""
    count = environ.get("WORLD_SIZE", "1")
    if config.training.step_in_backward and count != "1":
        what = f"{count} processes were started, and weights that move in the backward pass cannot wait for the gradients of all"
        raise ConfigError(
            what, where="training.step_in_backward", fix="set it to false, or start one process (without `torchrun`)"
        )


def open_devices(config: Config, options: Options) -> tuple[Devices, list[Decision]]:
    """The device(s) of this process: one alone, or its place among the processes that a launcher started.

    Raises ConfigError, before any process is waited for, for a way to share a training that this version does not have.
    """
    check_distribution(config)
    check_processes(config)
    wanted = config.distributed
    devices = Devices.from_environment(no_cuda=options.no_cuda, timeout_s=wanted.timeout_s)
    _, decision = choose_device(no_cuda=options.no_cuda)
    decisions = [decision]
    if wanted.strategy == "ddp" or devices.world_size > 1:
        count = "1 process: no launcher started more" if devices.world_size == 1 else f"{devices.world_size} processes"
        decisions.append(Decision("distributed.strategy", "ddp", f"{count}; each holds the whole model"))
    return devices, decisions
