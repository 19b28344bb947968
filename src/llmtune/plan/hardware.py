"""The device a plan is made for, this machine's own or one with a name; and the peak rates of GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import nn

from llmtune.common.environment import launcher_number
from llmtune.config.schema import Config
from llmtune.engine.allocator import release_free_memory
from llmtune.engine.choose_device import CUDA_CONTEXT_BYTES, choose_device
from llmtune.engine.devices import Devices
from llmtune.engine.precision import PrecisionName, choose_precision, gpu_without_bf16
from llmtune.errors import UsageError

__all__ = [
    "GPUS",
    "PEAK_TFLOPS",
    "Target",
    "attainable_bytes",
    "find_target",
    "flops_per_token",
    "peak_flops_per_second",
    "precision_on",
    "process_bytes",
    "resident_bytes",
    "utilization",
]

GIB = 1 << 30
MIB = 1 << 20
SHARE = {"cpu": 0.9, "cuda": 0.95}
"""Part of a device's memory that a plan may fill: the rest is for other programs, and for what no plan counts."""


@dataclass(frozen=True)
class Target:
    """Where a training is planned to run."""

    name: str
    kind: Literal["cpu", "cuda"]
    total_bytes: int
    """A GPU's memory; on a CPU the free memory of the machine or container, and what this process holds already."""
    has_bf16: bool = True
    is_local: bool = False
    """It is this machine's own device."""
    shared_by: int = 1
    """Processes of the training that share the machine's memory."""

    @property
    def budget_bytes(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.total_bytes * SHARE[self.kind])


def find_target(name: str | None, *, no_cuda: bool = False, shared_by: int | None = None) -> Target:
    """Find the device by name (`rtx4090`, `24GB`); None is the one that training would use on this machine.

    `shared_by`: processes of the training on this machine; None: what LOCAL_WORLD_SIZE says, which a launcher may set.
    Raises UsageError for an unknown name.
    """
    if name is None:
        shared_by = shared_by or launcher_number("LOCAL_WORLD_SIZE", 1) or 1
        return _local_target(shared_by, no_cuda=no_cuda)
    key = name.strip().lower()
    if key in GPUS:
        mebibytes, has_bf16 = GPUS[key]
        return Target(key, "cuda", mebibytes * MIB, has_bf16)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*g(i?b)?", key)
    if size and float(size[1]) > 0:
        return Target(f"a GPU with {size[1]} GB", "cuda", int(float(size[1]) * GIB))
    raise UsageError(f"`{name}` is no known device", "--device", f"a size such as 24GB, or one of {', '.join(GPUS)}")


def _local_target(shared_by: int, *, no_cuda: bool) -> Target:
    device, _ = choose_device(no_cuda=no_cuda)
    if device.type != "cuda":
        name = "this CPU" if shared_by == 1 else f"this CPU, shared by {shared_by} processes"
        return Target(name, "cpu", attainable_bytes(shared_by), is_local=True, shared_by=shared_by)
    free, total = torch.cuda.mem_get_info(device)
    # What torch has reserved is not free for the driver, but it is for the training of this process; and so is what the
    # driver took for this process when it was asked, which a plan counts.
    usable = min(total, free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES)
    name = torch.cuda.get_device_name(device)
    return Target(name, "cuda", usable, torch.cuda.is_bf16_supported(including_emulation=False), is_local=True)


def precision_on(target: Target, config: Config) -> str:
    """The arithmetic of a training on `target`: as configured, else what `choose_precision` says for it."""
    if config.training.precision != "auto":
        return config.training.precision
    has_adapter = config.adapter.method != "none"
    if target.kind == "cpu" or target.is_local:
        return str(choose_precision(torch.device(target.kind), has_adapter=has_adapter).value)
    return "bf16" if target.has_bf16 else gpu_without_bf16(has_adapter=has_adapter)


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def attainable_bytes(shared_by: int = 1) -> int:
    """Bytes this process could hold: its own now, and those free on the machine or under its control group's limit.

    `shared_by`: processes of the training on this machine, which share what is free.
    """
    # `available` and not `free`: the system gives up its file cache when a program needs the memory.
    free = int(psutil.virtual_memory().available)
    try:
        # A container's limit, which the machine's own numbers do not show.
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:
        limit = used = ""
    if limit.isdigit() and used.isdigit():  # a group without a limit reads `max`
        free = min(free, max(0, int(limit) - int(used)))
    return resident_bytes() + free // shared_by


GPUS: dict[str, tuple[int, bool]] = {
    "rtx3090": (24576, True),
    "rtx4090": (24564, True),
    "l4": (23034, True),
    "t4": (15360, False),
    "a100-40": (40960, True),
    "a100-80": (81920, True),
    "h100": (81559, True),
    "h200": (143771, True),
}
"""Memory as the driver reports it, in MiB, and whether the device multiplies bf16 natively."""


WIDTH = 256


def process_bytes(compute: torch.dtype | None) -> int:
    """Bytes resident once the code, threads and buffers of the libraries are in memory; measured by one tiny step.

    compute: autocast's type, None for float32 arithmetic. Draws no random numbers.
    """
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
    # Every kind of operation once, because each loads code and makes buffers at its first use.
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    with torch.autocast("cpu", dtype=compute or torch.bfloat16, enabled=compute is not None):
        output = layers(torch.ones(WIDTH, WIDTH))
        scores = torch.softmax(torch.bmm(output[None], output[None].transpose(1, 2)), dim=-1, dtype=torch.float32)
    scores.square().mean().backward()
    nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
    optimizer.step()
    # Memory that reading rows left free is used again by the steps, so it must not be counted with the process too.
    release_free_memory()
    return resident_bytes()


def flops_per_token(total: int, trained: int) -> float:
    """Give the floating-point operations of one token: 4 per parameter, and 2 more per trained one.

    A multiply-add counts as 2: one forward and one backward for each parameter, one more for each trained parameter.
    `total`: parameters that take part in matrix multiplications (an embedding that is only looked up does not).
    Attention between tokens is left out.

    >>> flops_per_token(1000, 1000), flops_per_token(1000, 10)
    (6000.0, 4020.0)
    """
    return 4.0 * total + 2.0 * trained


def peak_flops_per_second(device_name: str) -> float | None:
    """Give a GPU's peak rate by its name, or None where it is not known.

    >>> peak_flops_per_second("NVIDIA H200"), peak_flops_per_second("AMD EPYC")
    (989000000000000.0, None)
    """
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def utilization(
    devices: Devices, precision: PrecisionName, *, total: int, trained: int
) -> Callable[[float], float] | None:
    """Give the function from tokens per second (over all devices) to the used share of their peak rate.

    Model FLOPs utilization, MFU = tokens_per_second flops_per_token / peak (arXiv:2204.02311, appendix B).
    None where no peak is known: a CPU, an unlisted GPU, fp32.
    """
    if devices.device.type != "cuda" or precision == "fp32":
        return None
    peak = peak_flops_per_second(torch.cuda.get_device_name(devices.device))
    if peak is None:
        return None
    per_token = flops_per_token(total, trained)
    # The rate is that of all devices together, so their peaks add up.
    return lambda tokens_per_second: tokens_per_second * per_token / (peak * devices.world_size)


PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "A6000": 154.8,
    "RTX 6000 Ada": 364,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090": 71,
    "Tesla T4": 65,
}
"""Dense bf16/fp16 matrix rate with fp32 accumulation, 10^12 operations per second, by a part of the device's name; the
first match counts. From the makers' data sheets, without sparsity."""
