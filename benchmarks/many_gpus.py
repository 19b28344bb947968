#!/usr/bin/env python3
"""Half an hour on a machine with several GPUs, one table to paste.

    python benchmarks/many_gpus.py [--devices N] [--minutes 30] [--out FILE.md] [STAGE ...]

Every training is the real `llmtune train --devices N`, on a random model that is written here: nothing is downloaded.
Each stage runs in a process of its own, for at most its share of the time. Most of it is starts: there are 28
trainings of a few steps each, and 36 with the package deepspeed. `--pretend` trains a tiny model in CPU processes
(gloo): it shows that the stages work, and measures nothing.

25 GB must be free in the folder for temporary files; TMPDIR=FOLDER takes another. 3 GB are written. The rest is what
full tuning of 1B asks for before it begins, for a checkpoint that is not written: trainings of the stage `speed` are
ended after their last step.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from gpu_stages import finding, say
from staged_report import run_stages
from trainings import TINY, Bench
from workloads import SHAPES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("llmtune", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "triton")
GB = 10**9

STAGES: dict[str, tuple[float, str]] = {
    "machine": (0.02, "devices, how they are connected, versions"),
    "rates": (0.05, "bytes a second of each collective operation"),
    "alike": (0.25, "the losses of one device and of all, by strategy"),
    "speed": (0.45, "tokens a second and memory of one device and of all, by strategy"),
    "ends": (0.23, "a signal, a killed process, and the resume after them"),
}
"""Stages in order: the share of the time that each may take, and what it says. Of half an hour a training has 32
seconds in `alike`, 58 in `speed` and 52 in `ends`, and more without the package deepspeed: then there are fewer."""

FREE_BYTES = 25 * GB

FSDP, DEEPSPEED = ("distributed.strategy=fsdp",), ("distributed.strategy=deepspeed",)
STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": ("distributed.strategy=ddp",),
    "fsdp": FSDP,
    "deepspeed 1": (*DEEPSPEED, "distributed.zero_stage=1"),
    "deepspeed 3": (*DEEPSPEED, "distributed.zero_stage=3"),
    "rows shared": ("distributed.strategy=ddp", "distributed.sequence_parallel={devices}"),
    "rows shared, fsdp": (*FSDP, "distributed.sequence_parallel={devices}"),
}
METHODS = {"lora": ("adapter.method=lora",), "full": ("adapter.method=none",)}


def strategies(bench: Bench) -> dict[str, tuple[str, ...]]:
    """Those that this machine has the packages for."""
    has_deepspeed = find_spec("deepspeed") is not None
    if not has_deepspeed:
        say("deepspeed", "not installed: left out")
    shape = TINY if bench.pretend else SHAPES["llama-3.2-1b"]
    divides = int(shape["num_attention_heads"]) % bench.devices == 0
    return {
        name: words
        for name, words in STRATEGIES.items()
        if (has_deepspeed or "deepspeed" not in name) and (divides or "shared" not in name)
    }


# ---- stages ----


def machine(bench: Bench) -> None:
    """Versions, devices and their connections."""
    finding("versions", lambda: ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    finding("processes", lambda: f"{bench.devices}, {os.cpu_count()} cores")
    if bench.pretend:
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,power.limit,pcie.link.gen.max", "--format=csv,noheader"]
    for words in (query, ["nvidia-smi", "topo", "-m"]):
        finding(" ".join(words[:3]), partial(_said, words))


def _said(words: Sequence[str]) -> str:
    said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    return "; ".join(" ".join(line.split()) for line in said.splitlines() if line.strip())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def rates(bench: Bench) -> None:
    """Bytes that each process sends a second in sums, gathers and scatters, by the size of the message."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(bench.devices), __file__, "--rank", "rates"]
    pretend = ["--pretend"] if bench.pretend else []
    subprocess.run([sys.executable, "-W", "ignore", *launcher, *pretend], check=True)


def rates_of_a_rank(*, pretend: bool) -> None:
    """What one process of `rates` does; the first one prints."""
    import torch
    import torch.distributed as dist

    # Both have other names from torch 2.13 on, which 2.11 does not know.
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device("cpu" if pretend else f"cuda:{os.environ['LOCAL_RANK']}")
    if not pretend:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if pretend else "nccl")
    count = dist.get_world_size()
    for megabytes in (1, 4) if pretend else (1, 64, 512):
        whole = torch.ones(megabytes << 18, device=device)
        whole = whole[: whole.numel() // count * count]
        part = whole[: whole.numel() // count].clone()
        operations: dict[str, tuple[int, Callable[[], object]]] = {
            "sum": (2, partial(dist.all_reduce, whole)),
            "gather": (1, partial(dist.all_gather_into_tensor, whole, part)),
            "scatter": (1, partial(dist.reduce_scatter_tensor, part, whole)),
        }
        for name, (times, operation) in operations.items():
            seconds = _fastest(operation, device)
            sent = times * (count - 1) / count * whole.nbytes
            if dist.get_rank() == 0:
                say(f"{name} of {megabytes} MB", f"{sent / seconds / GB:.2f} GB/s sent by each, {seconds * 1e3:.2f} ms")
    dist.destroy_process_group()


def _fastest(operation: Callable[[], object], device: object) -> float:
    import torch

    found = []
    for _ in range(6):
        began = time.perf_counter()
        operation()
        if str(device).startswith("cuda"):
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def alike(bench: Bench) -> None:
    """The largest difference of a loss between one device and all, relative, in float32 over ten steps."""
    for method, own in METHODS.items():
        words = ["training.precision=fp32", *own]
        one = bench.trained(1, bench.words(f"alike-{method}", "tiny", 64, 10, words))
        for name, more in strategies(bench).items():
            given = bench.words(f"alike-{method}-{name}", "tiny", 64, 10, [*words, *more])
            finding(f"{method}, {name}", partial(_difference, bench, one, given))


def _difference(bench: Bench, one: Sequence[dict[str, float]], words: Sequence[str]) -> str:
    many = bench.trained(bench.devices, words)
    assert [line["rows_digest"] for line in many] == [line["rows_digest"] for line in one], "other rows"
    pairs = [(here["train_mean_nll"], there["train_mean_nll"]) for here, there in zip(many, one, strict=True)]
    apart = max(abs(here - there) / there for here, there in pairs)
    # A GPU sums in another order and with TF32 off; 1e-6 is what CPUs keep.
    assert apart < (1e-6 if bench.pretend else 1e-4), f"{apart:.1e} apart"
    return f"losses at most {apart:.1e} apart"


def speed(bench: Bench) -> None:
    """Tokens a second and memory of the main device: one device alone, then all by each strategy."""
    shape, tokens, steps = ("tiny", 64, 6) if bench.pretend else ("llama-3.2-1b", 2048, 10)
    # Longer than it is let run, with one checkpoint at an end that never comes.
    more_of_all = ["model.gradient_checkpointing=true", "checkpoint.every_steps=1000"]
    for method, own in METHODS.items():
        cases = {"one device": (1, ()), **{name: (bench.devices, more) for name, more in strategies(bench).items()}}
        for name, (devices, more) in cases.items():
            words = bench.words(f"speed-{method}-{name}", shape, tokens, 1000, [*own, *more_of_all, *more])
            finding(f"{method}, {name}", partial(_speed, bench, devices, words, steps))


def _speed(bench: Bench, devices: int, words: Sequence[str], steps: int) -> str:
    lines = bench.unsaved(devices, words, steps)
    rate = statistics.median(line["tokens_per_second"] for line in lines[2:])
    return f"{rate:,.0f} tokens/s, {max(line['memory_bytes'] for line in lines) / GB:.2f} GB on the main device"


def ends(bench: Bench) -> None:
    """SIGTERM to the command, then a killed process, by strategy; the run goes on after each."""
    for name in ("ddp", "fsdp"):
        more = [*METHODS["lora"], *STRATEGIES[name], "checkpoint.every_steps=20"]
        words = bench.words(f"ends-{name}", "tiny", 64, 100000, more)
        finding(f"{name}, SIGTERM to the command", partial(_stopped, bench, words))
        words = bench.words(f"killed-{name}", "tiny", 64, 100000, more)
        finding(f"{name}, a process killed", partial(_killed, bench, words))


def _stopped(bench: Bench, words: Sequence[str]) -> str:
    with _started(bench, words) as process:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 128 + signal.SIGTERM, f"exit code {code}"
    return f"saved after step {_goes_on(bench, words)}, and goes on"


def _killed(bench: Bench, words: Sequence[str]) -> str:
    with _started(bench, words) as process:
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(ranks.split()[-1]), signal.SIGKILL)
        began = time.monotonic()
        code = process.wait(timeout=90)
        took = time.monotonic() - began
    assert code == 8, f"exit code {code}"
    assert took < 15, f"noticed after {took:.0f} s"
    return f"ended after {took:.1f} s with 8; goes on from step {_goes_on(bench, words)}"


def _started(bench: Bench, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a training and wait for 25 steps of it."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(bench.command("train", bench.devices, words), stdout=null, stderr=null)
    while len(bench.steps(words)) < 25:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} before 25 steps")
        time.sleep(0.1)
    return process


def _goes_on(bench: Bench, words: Sequence[str]) -> int:
    """Resume the run for a few steps; returns the step from which it went on."""
    run = bench.run_folder(words)
    step = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(bench.devices), "-m", "llmtune", "resume"]
    no_cuda = ["--no-cuda"] if bench.pretend else []
    given = [*launcher, str(run), f"training.max_steps={step + 3}", "--allow-changes", *no_cuda]
    subprocess.run([sys.executable, *given], check=True, capture_output=True)
    return step


RUN: dict[str, Callable[[Bench], None]] = {
    "machine": machine, "rates": rates, "alike": alike, "speed": speed, "ends": ends,
}  # fmt: skip


def main() -> int:
    """Run the stages, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all when none is named")
    parser.add_argument("--devices", type=int, default=0, help="processes; all GPUs, or 2 to pretend")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path("many-gpus.md"), help="the table; JSON lines stand beside it")
    parser.add_argument("--pretend", action="store_true", help="in CPU processes, with a tiny model")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # in a stage: the folder of all of them
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rates_of_a_rank(pretend=options.pretend)
        return 0
    if options.here is not None:
        RUN[options.stages[0]](Bench(options.here, options.devices, pretend=options.pretend))
        return 0
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"no stage is called {', '.join(unknown)}: they are {', '.join(STAGES)}")
    devices = options.devices or (2 if options.pretend else _gpus())
    if devices < 2:
        parser.error(f"{devices} GPU is here, and several are compared: try `--pretend`")
    stages, temporary = options.stages or list(STAGES), tempfile.gettempdir()
    free = shutil.disk_usage(temporary).free
    if "speed" in stages and not options.pretend and free < FREE_BYTES:
        needed = f"`speed` needs {FREE_BYTES // GB}: set TMPDIR=FOLDER"
        parser.error(f"{free / GB:.0f} GB are free in {temporary}, and {needed}")
    with tempfile.TemporaryDirectory() as folder:
        own = ["--here", folder, "--devices", str(devices), *(["--pretend"] if options.pretend else [])]
        paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        return run_stages(
            STAGES,
            stages,
            lambda stage: [sys.executable, "-W", "ignore", __file__, stage, *own],
            environment={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
            folder=ROOT,
            minutes=options.minutes,
            out=options.out,
            head="Pretended: no figure here was measured on a GPU.\n\n" if options.pretend else "",
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())
