"""The device of this process: a GPU that torch can use, or the CPU; and what either has held at most."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from llmtune.common.decisions import Decision
from llmtune.common.environment import launcher_number
from llmtune.errors import MachineError, in_one_line

__all__ = ["CUDA_CONTEXT_BYTES", "choose_device", "has_nvidia_gpu", "peak_memory_bytes", "why_not_usable"]

CUDA_CONTEXT_BYTES = 600 << 20
"""What the driver and its libraries take of a GPU before the first tensor; published: between 450 and 700 MiB."""

LEAST_DRIVERS = {"11": "450", "12": "525", "13": "580"}
"""The oldest NVIDIA driver that runs programs built for a version of CUDA (CUDA's release notes, table 2)."""

WITHOUT_IT = "or train without it: --no-cuda, or CUDA_VISIBLE_DEVICES= where a command has no such option"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
WSL_LIBRARY = Path("/usr/lib/wsl/lib/libcuda.so.1")


def choose_device(*, no_cuda: bool = False, environ: Mapping[str, str] = os.environ) -> tuple[torch.device, Decision]:
    """Choose this process's GPU, or the CPU where there is none or `no_cuda` is set, with the reason.

    Of several GPUs that one whose number is LOCAL_RANK, which a launcher gives to each process of a machine; else the
    first. Raises MachineError where there are GPUs, and fewer than processes; or one that this torch cannot use: an 8B
    model would train on the CPU for weeks before anyone asked why.
    """
    if no_cuda:
        return torch.device("cpu"), Decision("device", "cpu", "--no-cuda was given")
    if not torch.cuda.is_available():
        if not has_nvidia_gpu():
            return torch.device("cpu"), Decision("device", "cpu", "no CUDA device was found")
        raise MachineError(*why_not_available())
    count = torch.cuda.device_count()
    # Read here, because a caller that did not would put every process of the machine on the first GPU.
    local_rank = launcher_number("LOCAL_RANK", 0, environ) or 0
    # A scheduler may show each process its own GPU alone (Slurm's `--gpus-per-task`). Where several have the same one,
    # they are refused when they meet.
    index = local_rank if count > 1 else 0
    if index >= count:
        raise MachineError(
            f"process {local_rank} of this machine has no GPU: there are {count}",
            where="distributed",
            fix="start as many processes as there are GPUs, or say --no-cuda",
        )
    device = torch.device("cuda", index)
    if (reason := why_not_usable(device)) is not None:
        raise MachineError(*reason)
    torch.cuda.set_device(device)  # some libraries' kernels run on the current one, wherever their tensors are
    return device, Decision("device", str(device), torch.cuda.get_device_name(device))


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA GPU is there for this process, whatever torch says of it."""
    if "CUDA_VISIBLE_DEVICES" in os.environ and os.environ["CUDA_VISIBLE_DEVICES"].strip() in ("", "-1"):
        return False  # hidden on purpose
    # The nodes, and not the driver's file, which also shows in a container that was given no GPU.
    return any(Path("/dev").glob("nvidia[0-9]*")) or WSL_LIBRARY.exists()


def why_not_available() -> tuple[str, str, str]:
    """Say why torch sees no CUDA device where there is one: problem, place and fix."""
    version, built_for = torch.__version__, torch.version.cuda
    if built_for is None:
        problem = f"this machine has an NVIDIA GPU, and torch {version} was built without CUDA"
        return problem, "torch", f"pip install --force-reinstall torch (PyPI's wheel has CUDA); {WITHOUT_IT}"
    try:
        torch.cuda.init()
        detail = "no device"
    except (RuntimeError, AssertionError) as error:
        detail = in_one_line(error)
    problem = f"this machine has an NVIDIA GPU that torch {version} for CUDA {built_for} cannot use: {detail}"
    least = LEAST_DRIVERS.get(built_for.split(".")[0])
    if (driver := _driver_version()) is not None and least is not None and int(driver.split(".")[0]) < int(least):
        problem = f"the NVIDIA driver {driver} is too old for torch {version}, built for CUDA {built_for}"
    fix = f"update the driver to {least} or newer, or install a torch built for an older CUDA; {WITHOUT_IT}"
    return problem, "NVIDIA driver", fix


def why_not_usable(device: torch.device) -> tuple[str, str, str] | None:
    """Say why a CUDA device that torch sees has no code in this build of torch; None where it has."""
    built_for = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(device)
    if not built_for or torch.version.cuda is None or any(_runs(name, capability) for name in built_for):
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    problem = (
        f"{name} has the architecture sm_{major}{minor}, and torch {torch.__version__} holds {' '.join(built_for)}"
    )
    fix = f"install a torch built for it (wheels for CUDA 12.6 hold sm_50 to sm_90); {WITHOUT_IT}"
    return problem, "torch", fix


def _runs(built_for: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture (`sm_86`, `compute_90`) runs on a device of that capability."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", built_for)
    if match is None:
        return False
    kind, built, exact = match[1], (int(match[2]), int(match[3])), match[4] == "a"
    if exact:
        return built == capability
    # Machine code runs on later minor versions of its own major one; intermediate code on everything later.
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _driver_version() -> str | None:
    try:
        match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None


def peak_memory_bytes(device: torch.device) -> int:
    """Give the most memory held so far: bytes of this process on a GPU, its resident bytes on a CPU.

    On a GPU: what torch's allocator had reserved, gaps included, and CUDA_CONTEXT_BYTES, which is what a plan counts.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CUDA_CONTEXT_BYTES
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
