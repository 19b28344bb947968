"""What `llmtune doctor` tries on a GPU: one small piece of work of each kind that a training does there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from llmtune.common.memory import page_locked
from llmtune.common.text import readable_bytes
from llmtune.engine.choose_device import choose_device, has_nvidia_gpu
from llmtune.engine.probe import PROBE_ERRORS
from llmtune.errors import MachineError, in_one_line
from llmtune.kernels.liger import is_installed
from llmtune.models.quantization import import_bitsandbytes

__all__ = ["GpuFinding", "gpu_findings"]

TRIAL_BYTES = 1 << 28
"""Page-locked memory that is tried: what `model.gradient_checkpointing: offload` takes for a few thousand tokens."""


class GpuFinding(NamedTuple):
    """One line of the report."""

    what: str
    state: str
    found: str
    fix: str = ""


def gpu_findings() -> list[GpuFinding]:
    """Look at every CUDA device and work on the first; `bad` where a GPU is there that torch cannot use."""
    try:
        device, _ = choose_device()
    except MachineError as error:
        problem = error.problems[0]
        return [GpuFinding("cuda", "bad", problem.problem, problem.fix or "")]
    if device.type != "cuda":
        hidden = ", or CUDA_VISIBLE_DEVICES hides it" if has_nvidia_gpu() else ""
        fix = f"training runs on the CPU; for a GPU, install its driver and a CUDA build of torch{hidden}"
        return [GpuFinding("cuda", "warn", "no CUDA device", fix)]
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{readable_bytes(free)} of {readable_bytes(total)} free"
        findings.append(GpuFinding(f"cuda:{index}", "ok", f"{torch.cuda.get_device_name(index)}, {memory}"))
    return [*findings, *(_tried(trial) for trial in TRIALS), _compiler()]


class Trial(NamedTuple):
    """A piece of work, and what to do where it fails."""

    what: str
    work: Callable[[], str]
    fix: str


def _tried(trial: Trial) -> GpuFinding:
    try:
        return GpuFinding(trial.what, "ok", trial.work())
    except PROBE_ERRORS as error:
        return GpuFinding(trial.what, "warn", f"fails: {type(error).__name__}: {in_one_line(error)}", trial.fix)


def _product() -> str:
    a = torch.full((256, 256), 0.5, device="cuda", dtype=torch.float16)
    found = float((a @ a).float().mean())
    if found != 64.0:
        raise ArithmeticError(f"256 times 0.25 gave {found}")
    return "a product of two matrices is right"


def _varlen() -> str:
    from torch.nn.attention.varlen import varlen_attn

    row = torch.randn(300, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    ends = torch.tensor([0, 7, 300], dtype=torch.int32, device="cuda")
    output = varlen_attn(row, row, row, ends, ends, 293, 293, window_size=(-1, 0))
    output.float().square().sum().backward()  # type: ignore[union-attr]
    if row.grad is None or not bool(row.grad.isfinite().all()):
        raise ArithmeticError("its gradient is not finite")
    return "variable-length flash attention works, forward and backward"


def _liger() -> str:
    if not is_installed():
        raise ImportError("it is not installed")
    gate, up = (torch.randn(4, 256, device="cuda", dtype=torch.float16) for _ in range(2))
    expected = torch.nn.functional.silu(gate) * up
    apart = float((torch.ops.llmtune.swiglu(gate, up) - expected).abs().max())
    if not apart < 0.05:
        raise ArithmeticError(f"its SwiGLU is {apart:.2g} away from torch's")
    return "Liger's kernels are built and work"


def _four_bit() -> str:
    functional = import_bitsandbytes().functional
    matrix = torch.linspace(-1, 1, 4096, device="cuda").reshape(64, 64)
    packed, state = functional.quantize_4bit(matrix, quant_type="nf4")
    apart = float((functional.dequantize_4bit(packed, state) - matrix).abs().max())
    return f"bitsandbytes' operator for NF4 works (largest error {apart:.2f} in -1..1)"


def _pinned() -> str:
    locked = page_locked(torch.empty(TRIAL_BYTES, dtype=torch.uint8))
    if not locked.is_pinned():
        raise MemoryError(f"{readable_bytes(TRIAL_BYTES)} are refused")
    return f"{readable_bytes(TRIAL_BYTES)} were locked"


def _compiler() -> GpuFinding:
    """Triton builds kernels at their first use: find a C compiler and Python's headers as it does, and try them."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]  # Debian's own
    missing = [] if compiler and shutil.which(compiler) else [f"CC={compiler}" if compiler else "a C compiler"]
    missing += [] if (Path(headers) / "Python.h").is_file() else [f"{headers}/Python.h"]
    fix = "install gcc and python3-dev (Fedora: python3-devel), or name a compiler in CC; only Liger's kernels, flex "
    fix += "attention and training.compile need them"
    if missing:
        return GpuFinding("triton", "warn", f"missing: {', '.join(missing)}", fix)
    assert compiler is not None
    done = subprocess.run(  # noqa: S603 - the compiler that Triton would call
        [compiler, "-fsyntax-only", "-xc", f"-I{headers}", "-"],
        input="#include <Python.h>\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
        return GpuFinding("triton", "warn", f"{compiler} fails on Python.h: {errors[0].strip()}", fix)
    return GpuFinding("triton", "ok", f"{compiler} compiles Python.h, for kernels that are built at their first use")


TRIALS = (
    Trial("product", _product, "the driver and torch's build do not fit: see `nvidia-smi`, and reinstall torch"),
    Trial("attention", _varlen, "cards from Ampere on have it; before, attention runs document by document"),
    Trial(
        "liger", _liger, "pip install -U 'llmtune[gpu]'; without it SwiGLU, rotary positions and the loss are slower"
    ),
    Trial("4-bit on cuda", _four_bit, "pip install -U bitsandbytes; only model.quantization needs it"),
    Trial("page-locked", _pinned, "offload takes ordinary memory then, slower; in WSL2 raise `memory` in .wslconfig"),
)
"""The work, in the order in which it is tried."""
