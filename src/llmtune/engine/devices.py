"""One process or several: sums over all of them, decisions made once for all, and the device of each.

This module and `sharding` alone use collective operations, by which numbers and tensors travel. Decisions and errors go
another way, see `rank_messages`; the death of a process is noticed in `rank_watch`.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from llmtune.common.decisions import Decision
from llmtune.common.environment import launched_process
from llmtune.config.distributed_checks import takes_deepspeed
from llmtune.config.process_options import Options
from llmtune.config.schema import Config
from llmtune.engine.choose_device import choose_device
from llmtune.engine.deepspeed_settings import check_deepspeed
from llmtune.engine.rank_messages import FIX_UNLIKE, RankMessages, lost_ranks_noticed
from llmtune.engine.rank_watch import watch_ranks
from llmtune.engine.rendezvous import (
    ALONE,
    Neighbours,
    allow_long_waits,
    arrive,
    count_neighbours,
    divide_cores,
    make_group,
    open_store,
    refuse_shared_gpus,
)
from llmtune.errors import ConfigError, MachineError, UsageError

__all__ = ["Devices", "open_devices"]

T = TypeVar("T")

BUCKET_BYTES = 25 * 2**20
"""Gradients are sent in buckets of about this size: fewer, larger messages."""


class Devices:
    """One process among those that train together; a single process sums nothing and waits for nobody.

    `messages`: how they tell each other decisions. Every method that involves the others must be called by all of them,
    in the same order. Raises RankLostError where another process has died or is silent for too long.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        messages: RankMessages | None = None,
        owns_group: bool = True,
        unwatched: Sequence[int] = (),
        neighbours: Neighbours = ALONE,
    ) -> None:
        """`owns_group`: the process group was made here, and ends with `close`. `unwatched`: see `watch_ranks`."""
        self.device, self._owns_group = device, owns_group
        self.neighbours = neighbours
        """Processes that share this one's machine and cores."""
        self.rank = rank
        self.is_main = rank == 0
        """Whether this is the process that writes files and prints."""
        self.world_size = world_size
        self.row_size = 1
        """Processes that share each row (see `share_rows`)."""
        self._row_group: dist.ProcessGroup | None = None
        self._messages, self._unwatched = messages, unwatched

    @classmethod
    def from_environment(
        cls, *, no_cuda: bool = False, timeout_s: float, environ: Mapping[str, str] = os.environ
    ) -> Devices:
        """Join the processes that a launcher such as `torchrun` started.

        It sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without WORLD_SIZE, or with 1, it is a single
        process. nccl on GPUs, gloo on CPUs. `timeout_s`: seconds after which a silent process counts as lost. Raises
        MachineError when the environment is incomplete or two processes have one GPU, RankLostError when the others do
        not come.
        """
        rank, world_size, local_world_size = launched_process(environ)
        device = choose_device(no_cuda=no_cuda, environ=environ)[0]
        # Asked for several processes on a CPU, accelerate names the place where they meet and starts one.
        if "WORLD_SIZE" not in environ and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environ.keys():
            raise MachineError(
                "`accelerate launch` was asked for several processes, and has started this one alone",
                "environment",
                fix="start them with `llmtune train --devices N` or `torchrun --nproc-per-node N -m llmtune train`",
            )
        if world_size == 1:
            return cls(device, neighbours=Neighbours(machine=local_world_size or 1))
        timeout = dt.timedelta(seconds=timeout_s)
        with lost_ranks_noticed(), ExitStack() as on_failure:
            owns_group = not dist.is_initialized()  # else it is that of the program around this one (Ray Train)
            store = open_store(rank, world_size, timeout, environ)
            places = arrive(store, rank, world_size, device, timeout)
            messages_store = PrefixStore("messages", store)
            watch, unwatched = watch_ranks(
                messages_store, rank, world_size, address=environ["MASTER_ADDR"], timeout_s=timeout_s
            )
            messages = RankMessages(rank, world_size, messages_store, watch)
            with messages.errors_printed_once():
                refuse_shared_gpus(places, rank)
                if owns_group:
                    make_group(PrefixStore("group", store), rank, world_size, device, timeout)
                    # Left standing, it would be taken for that of the program by the next training.
                    on_failure.callback(dist.destroy_process_group)
            on_failure.pop_all()
        neighbours = count_neighbours(places, rank)
        return cls(
            device,
            rank=rank,
            world_size=world_size,
            messages=messages,
            owns_group=owns_group,
            unwatched=unwatched,
            neighbours=neighbours._replace(machine=local_world_size or neighbours.machine),
        )

    def watch_decision(self) -> list[Decision]:
        """Say which processes could not be reached to be watched, where there are any."""
        if not self._unwatched:
            return []
        names = ", ".join(map(str, self._unwatched))
        reason = f"process {names} found no way to the main one; its death is noticed after distributed.timeout_s"
        return [Decision("distributed.watch", "not all", reason)]

    def share_rows(self, size: int, *, timeout_s: float) -> None:
        """Let each `size` processes, counted from the main one, take the same rows and compute a part of each.

        `size` divides the number of processes. `timeout_s` as in `from_environment`.
        """
        assert self.world_size % size == 0, "groups of one size"
        self.row_size = size
        if size == 1:
            return
        timeout = dt.timedelta(seconds=timeout_s)
        with lost_ranks_noticed():
            for first in range(0, self.world_size, size):  # every process takes part in making every group
                group = dist.new_group(range(first, first + size), timeout=timeout)
                if first <= self.rank < first + size:
                    self._row_group = group
                    allow_long_waits(group, timeout)

    @property
    def reader(self) -> int:
        """Number of the rows' share that this process takes, alone or with others."""
        return self.rank // self.row_size

    @property
    def readers(self) -> int:
        """Shares into which rows are dealt."""
        return self.world_size // self.row_size

    def sum(self, *values: float) -> tuple[float, ...]:
        """Add each value over all processes, in float64: sum_r value_r of each process r."""
        if self.world_size == 1:
            return values
        return self._reduce(values, dist.ReduceOp.SUM)

    def count(self, *values: float) -> tuple[float, ...]:
        """Add what each process counted of its rows, in float64; rows that several share count once."""
        return self.sum(*(values if self.rank % self.row_size == 0 else [0.0] * len(values)))

    def largest(self, *values: float) -> tuple[float, ...]:
        """Give the largest of each value over all processes, in float64: the same answer to a question on each."""
        return self._reduce(values, dist.ReduceOp.MAX) if self.world_size > 1 else values

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> tuple[float, ...]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._collective():
            dist.all_reduce(total, operation)
            return tuple(total.tolist())  # nccl raises here, where the result is waited for

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor of any shape over all processes, sum_r value_r, on the device and without waiting."""
        if self.world_size > 1:
            value = value.clone()  # the sum is written into its argument
            with self._collective():
                dist.all_reduce(value)
        return value

    def sum_of_row(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor of any shape over the processes r that share this one's rows: total = sum_r value_r."""
        if self._row_group is not None:
            value = value.clone()
            with self._collective():
                dist.all_reduce(value, group=self._row_group)
        return value

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Send parts[p] to the p-th of the processes that share rows, and give what each has sent to this one.

        [row_size, ...] -> [row_size, ...], received[p] = parts_of_p[own]; contiguous. The same map gives the gradient.
        """
        received = torch.empty_like(parts)
        with self._collective():
            dist.all_to_all_single(received, parts, group=self._row_group)
        return received

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Call `work` on the main process alone; the others wait, get None, and raise the LlmtuneError it raises."""
        return work() if self.world_size == 1 else self._told().on_main(work)

    def on_main_with_others(self, work: Callable[[Callable[[int], None]], T], share: Callable[[int], None]) -> T | None:
        """Call `work(ask)` as `on_main` does, where each `ask(number)` lets every process call `share(number)`."""
        return work(share) if self.world_size == 1 else self._told().on_main_with_others(work, share)

    def from_main(self, value: T) -> T:
        """Give the main process's `value`, which must be plain JSON; those of the others do not count."""
        return value if self.world_size == 1 else self._told().from_main(value)

    def check_alike(self, facts: Mapping[str, object], *, fix: str = FIX_UNLIKE) -> None:
        """Compare `facts` (plain JSON values) of every process with those of the main one.

        Raises ConfigError on all processes, with each key that differs, the process in which it does, and `fix`.
        """
        if self.world_size > 1:
            self._told().check_alike(facts, fix=fix)

    def busy(self) -> AbstractContextManager[None]:
        """Let the others wait for this process as long as the body takes: the user's code, or drawing answers."""
        return nullcontext() if self._messages is None else self._messages.watch.busy()

    def end_start(self) -> None:
        """Say that this process trains from here on: one that starts counts as busy."""
        if self._messages is not None:
            self._messages.watch.end_start()

    def agree_on_error(self, error: UsageError | None) -> None:
        """Raise a UsageError in all processes where one of them gives its `error`; its own in that one."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        (count,) = self.largest(0 if error is None else self.world_size - self.rank)
        first = self.world_size - int(count)
        if first < self.world_size:
            error = error or UsageError(f"process {first} has failed, and says why")
            error.is_reported = self.rank != first
            raise error

    def errors_printed_once(self) -> AbstractContextManager[None]:
        """Let the first process that fails in the body report its error, and mark those of others as reported."""
        return nullcontext() if self.world_size == 1 else self._told().errors_printed_once()

    def _told(self) -> RankMessages:
        assert self._messages is not None, "processes that train together met at a store"
        return self._messages

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Notice in the body, which waits for all, that another process has died or does not go on."""
        with lost_ranks_noticed(), self.waiting():
            yield

    def waiting(self) -> AbstractContextManager[None]:
        """Lose a process that does not go on while this one waits for it in the body."""
        return nullcontext() if self._messages is None else self._messages.watch.waiting()

    def sync_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Replace each gradient by its sum over all processes; every process then holds the same bits.

        grad = sum_r grad_r over processes r, of the parameter's shape: not a mean, because every loss is divided by the
        trained tokens of all processes already. A process without rows contributes zeros. A parameter that has a
        gradient nowhere keeps none, as in a single process. The order of the sum is fixed by the backend for a given
        number of processes.
        """
        if self.world_size == 1:
            return
        # All must send the same buckets, and an expert that no row of a process reached has no gradient there.
        present = torch.tensor(
            [parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=self.device
        )
        with self._collective():
            dist.all_reduce(present)
            counts = present.tolist()
        somewhere = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
        for parameter in somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(somewhere):
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            # One message for each bucket: hundreds of small ones would cost their latency each.
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            with self._collective():
                dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(
                gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
            )

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite each tensor with that of the main process, of the same shape."""
        if self.world_size > 1:
            with self._collective():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def gather_rows(self, row: torch.Tensor) -> torch.Tensor:
        """Stack equally shaped tensors of all processes: [...] of each -> [world_size, ...] on each, on the CPU."""
        if self.world_size == 1:
            return row[None].cpu()
        rows = [torch.empty_like(row, device=self.device) for _ in range(self.world_size)]
        with self._collective():
            dist.all_gather(rows, row.to(self.device).contiguous())
            return torch.stack(rows).cpu()

    def close(self, *, wait_for_main: bool = False) -> None:
        """Leave the other processes: from then on this one is alone, and sums nothing.

        `wait_for_main`: not before the main process does, because a launcher ends the others as soon as one has ended.
        """
        if self.world_size == 1 or not dist.is_initialized():
            return
        self._told().close(wait_for_main=wait_for_main)
        if self._owns_group:
            dist.destroy_process_group()
        elif self._row_group is not None:
            dist.destroy_process_group(self._row_group)
        # What it holds whole can still be evaluated, all of it here.
        self.rank, self.world_size, self.row_size, self._row_group = 0, 1, 1, None


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


def check_processes(config: Config, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for a number of processes that the config cannot be trained with.

    Several, where weights move before the gradients of all could be summed; one that those of a row do not divide.
    Raises MachineError where the environment does not say it (see `launched_process`).
    """
    count, shared = launched_process(environ).world_size, config.distributed.sequence_parallel
    if count % shared:
        started = "1 process was" if count == 1 else f"{count} processes were"
        raise ConfigError(
            f"{started} started, and {shared} share each row",
            where="distributed.sequence_parallel",
            fix=f"start {shared} of them or a multiple, as `llmtune train --devices {shared}`, or set it to 1",
        )
    if config.training.step_in_backward and count > 1:
        raise ConfigError(
            f"{count} processes were started, and weights that move in the backward pass cannot wait for all gradients",
            where="training.step_in_backward",
            fix="set it to false, or start one process (without `torchrun`)",
        )


def open_devices(config: Config, options: Options) -> tuple[Devices, list[Decision]]:
    """The device(s) of this process: one alone, or its place among the processes that a launcher started.

    Raises ConfigError, before any process is waited for, for a way to share a training that does not work here.
    """
    if takes_deepspeed(config):
        check_deepspeed(config)
    check_processes(config)
    distributed = config.distributed
    devices = Devices.from_environment(no_cuda=options.no_cuda, timeout_s=distributed.timeout_s)
    devices.share_rows(distributed.sequence_parallel, timeout_s=distributed.timeout_s)
    _, decision = choose_device(no_cuda=options.no_cuda)
    decisions = [decision, *devices.watch_decision()]
    if devices.neighbours.cores > 1:
        decisions += divide_cores(devices.neighbours.cores)
    if devices.world_size == 1 and distributed.strategy in ("fsdp", "deepspeed"):
        reason = "1 process: no launcher started more, and it holds the whole model"
        decisions.append(Decision("distributed.strategy", "one process", reason))
    if distributed.strategy == "ddp":
        count = "1 process: no launcher started more" if devices.world_size == 1 else f"{devices.world_size} processes"
        reason = f"{count}; each holds the whole model and takes its share of the sequences of a step"
        decisions.append(Decision("distributed.strategy", "ddp", reason))
    return devices, decisions
