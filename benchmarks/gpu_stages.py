"""The stages of `scripts/gpu` that need the package: `python benchmarks/gpu_stages.py STAGE`; one JSON line a finding.

With LLMTUNE_GPU_SMALL set everything is so small that a pretend GPU computes it in seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
from workloads import SHAPES, Workload

SMALL = bool(os.environ.get("LLMTUNE_GPU_SMALL"))
GB = 10**9
PACKAGES = ("llmtune", "torch", "transformers", "peft", "bitsandbytes", "triton", "liger-kernel")
QUERY = "name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm,pcie.link.gen.max,pcie.link.width.max"


def say(what: str, value: object, *, ok: bool = True) -> None:
    """Print one finding."""
    print(json.dumps({"what": what, "value": value, "ok": ok}, default=str), flush=True)


def finding(what: str, measure: Callable[[], object]) -> None:
    """Print what `measure` returns; what goes wrong is a finding too, and the next one is measured all the same."""
    try:
        say(what, measure())
    except Exception as error:  # noqa: BLE001 - a table with one failed row is better than none
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [""])[0][:160]
        say(what, f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})", ok=False)
    gc.collect()


def fastest(function: Callable[[], object], times: int = 3 if SMALL else 12) -> float:
    """Seconds of the fastest call, the device waited for."""
    import torch

    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


# ---- machine ----


def machine() -> None:
    """Versions, the card, and the rates of products, memory and link."""
    finding("versions", lambda: ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    finding("system", lambda: f"{platform.platform()}, {os.cpu_count()} cores")
    if shutil.which("nvidia-smi"):
        finding("nvidia-smi", _nvidia_smi)
    finding("device", _device)
    finding("product of bf16 matrices", _product_rate)
    finding("memory bandwidth", _bandwidth)
    finding("link to the host, page-locked", _link)
    finding("llmtune doctor", _doctor)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _device() -> str:
    import torch

    from llmtune.engine.choose_device import choose_device

    device, decision = choose_device()
    assert device.type == "cuda", decision.reason
    free, total = torch.cuda.mem_get_info()
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    return f"{decision.reason}, sm_{capability}, {free / GB:.1f} of {total / GB:.1f} GB free, CUDA {torch.version.cuda}"


def _doctor() -> str:
    """Say what each kind of work did that a training does there, Triton's compiler included."""
    from llmtune.cli.doctor_gpu import gpu_findings

    tried = [one for one in gpu_findings() if not one.what.startswith("cuda:")]
    for one in tried:
        fix = f"; {one.fix}" if one.state != "ok" else ""
        say(f"llmtune doctor, {one.what}", f"{one.found}{fix}", ok=one.state != "bad")
    return f"{sum(one.state == 'ok' for one in tried)} of {len(tried)} kinds of work are right"


def _product_rate() -> str:
    import torch

    size = 256 if SMALL else 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return f"{2 * size**3 / fastest(lambda: a @ b) / 1e12:.0f} TFLOP/s"


def _bandwidth() -> str:
    import torch

    source = torch.empty(1 << (16 if SMALL else 29), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return f"{2 * source.nbytes / fastest(lambda: target.copy_(source)) / 1e9:.0f} GB/s"


def _link() -> str:
    import torch

    host = torch.empty(1 << (16 if SMALL else 28), dtype=torch.uint8, pin_memory=True)
    device = torch.empty(host.shape, device="cuda", dtype=torch.uint8)
    there = host.nbytes / fastest(lambda: device.copy_(host, non_blocking=True)) / 1e9
    return (
        f"{there:.1f} GB/s there, {host.nbytes / fastest(lambda: host.copy_(device, non_blocking=True)) / 1e9:.1f} back"
    )


# ---- attention ----

WIDTHS = ((64, 9, 3, None), (128, 32, 8, None), (128, 32, 8, 512), (256, 8, 4, None))
"""Head width, query heads, key heads, window."""


def attention() -> None:
    """Each backend of attention beside all scores written out, forward and backward."""
    if SMALL:
        say("flex", "not tried: it must be compiled for a real device")
    for name in ("varlen", "sdpa", "tiles") if SMALL else ("varlen", "flex", "sdpa", "tiles"):
        for width, heads, groups, window in WIDTHS[:1] if SMALL else WIDTHS:
            label = f"{name}, head {width}" + (f", window {window}" if window else "")
            finding(label, lambda case=(name, width, heads, groups, window): _attention_case(*case))


def _attention_case(name: str, width: int, heads: int, groups: int, window: int | None) -> str:
    import torch

    from llmtune.kernels.attention import BACKENDS, AttentionParams, Segments

    ends = (0, 70, 110, 204) if SMALL else (0, 700, 1100, 2048)
    torch.manual_seed(0)
    rows = [torch.randn(1, n, ends[-1], width, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups)]
    marks = torch.tensor(ends, dtype=torch.int32, device="cuda")

    def run(backend: str) -> list[torch.Tensor]:
        leaves = [row.clone().requires_grad_() for row in rows]
        segments = Segments(marks, max(stop - start for start, stop in pairwise(ends)))
        output = BACKENDS[backend](*leaves, segments, AttentionParams(width**-0.5, window))
        output.float().square().sum().backward()
        return [output.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    pairs = zip(run(name), run("eager"), strict=True)
    apart = max(float((found - expected).norm() / expected.norm()) for found, expected in pairs)
    assert apart < 2e-2, f"{apart:.1e} of its norm away"
    return f"{apart:.0e} of its norm away, {fastest(lambda: run(name)) * 1e3:.2f} ms"


# ---- engine ----


def engine() -> None:
    """Loss and gradients of the fast engine beside the plain one's, on a small model."""
    for recompute in (False, True, "offload"):
        finding(f"blocks recomputed: {recompute}", lambda mode=recompute: _engine_case(mode))


def _engine_case(recompute: bool | str, libraries: Sequence[str] | None = None) -> str:
    import torch
    from starting_point import adapter_of, example_list, load_model

    from llmtune.config.schema import Config, ModelConfig
    from llmtune.data.dataset.micro_batch import make_micro_batch
    from llmtune.engine.forward import build_engine
    from llmtune.engine.objective import plain_nll_sum
    from llmtune.engine.precision import Precision

    workload, device = workload_of("tiny", 300), torch.device("cuda", 0)
    precision = Precision("bf16", device)
    model = load_model(workload, "cuda")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    config = Config(model=ModelConfig(gradient_checkpointing=recompute), adapter=adapter_of(workload))  # type: ignore[arg-type]
    model.train()
    examples = list(example_list(drawn_rows(workload, 4)))

    def gradient(loss: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        with precision.autocast():
            value = loss()
        value.backward()
        parts = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        return float(value.detach()), torch.cat(parts)

    # First, because the engine patches the model that it is built for.
    plain = gradient(lambda: plain_nll_sum(model, make_micro_batch(examples, "padded", 0)))
    with kernels_of(libraries):
        built = build_engine(model, config=config, device=device, precision=precision)
    model.train()
    fast = gradient(lambda: built.nll_sum(make_micro_batch(examples, built.layout, 0)))
    losses, grads = abs(fast[0] - plain[0]) / plain[0], float((fast[1] - plain[1]).norm() / plain[1].norm())
    chosen = {decision.key: str(decision.value) for decision in built.decisions}
    label = f"{chosen['training.engine']}, {chosen.get('model.attention', 'the library')}"
    label += f", kernels: {chosen.get('training.kernels', 'none')}"
    assert losses < 2e-2 and grads < 0.1, f"{label}: loss {losses:.1e}, gradient {grads:.1e} away"  # noqa: PT018
    return f"{label}: loss {losses:.0e}, gradient {grads:.0e} away"


# ---- kernels ----


def kernels_of(libraries: Sequence[str] | None) -> AbstractContextManager[object]:
    """Have engines built inside try the kernels of these libraries only; all that are installed when None."""
    from llmtune.engine import forward

    if libraries is None:
        return nullcontext()
    return mock.patch.object(forward, "kernel_libraries", return_value=frozenset(libraries))


def kernels() -> None:
    """Loss, gradients and speed by the kernels that an engine may use: none, torch's, Liger's as well."""
    from llmtune.kernels.liger import is_installed

    for name, libraries in {"none": (), "torch": ("torch",), "torch, Liger": ("torch", "liger-kernel")}.items():
        if "Liger" in name and not is_installed():
            say(f"kernels: {name}", "not installed: pip install 'llmtune[gpu]'")
            continue
        finding(f"kernels: {name}", lambda chosen=libraries: _engine_case(False, chosen))
        shape, tokens = ("tiny", 64) if SMALL else ("llama-3.2-1b", 4096)
        case = (workload_of(shape, tokens), "auto", libraries)
        finding(f"kernels: {name}, {shape} lora, rows of {tokens:,}", lambda case=case: _speed_case(*case))


# ---- speed ----


def workload_of(shape: str, tokens: int, method: str = "lora") -> Workload:
    """Rows of one length, one a step; 4-bit models recompute their blocks."""
    return Workload("gpu", method, tokens, tokens, 1, 1e-4, median=tokens, shape=shape, checkpointing=method == "qlora")


def drawn_rows(workload: Workload, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of random tokens, all of them trained."""
    random = np.random.default_rng(0)
    size = SHAPES[str(workload.shape)]["vocab_size"]
    tokens = [random.integers(10, size, workload.longest).astype(np.int32) for _ in range(count)]
    return [(ids, np.ones(len(ids), np.float32)) for ids in tokens]


def speed() -> None:
    """The published shapes that fit this card: rate, memory and waits of the fast engine, and the plain one's rate."""
    import torch

    total = torch.cuda.mem_get_info()[1]
    cases = [("llama-3.2-1b", "lora", 4096, 0), ("llama-3-8b", "qlora", 4096, 20), ("llama-3-8b", "lora", 4096, 60)]
    for shape, method, tokens, least_gb in [("tiny", "lora", 64, 0)] if SMALL else cases:
        if total < least_gb * GB:
            continue
        for way in ("auto", "plain"):
            case = (workload_of(shape, tokens, method), way)
            finding(f"{shape} {method}, rows of {tokens:,}, {way}", lambda case=case: _speed_case(*case))


def _speed_case(workload: Workload, way: str, libraries: Sequence[str] | None = None) -> str:
    import llmtune_contestant
    import torch

    with kernels_of(libraries):
        training = llmtune_contestant.train(workload, drawn_rows(workload, 3 if SMALL else 8), "cuda:0", engine=way)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # the steps' own: the probe of the engine came before
    first = [next(training.steps) for _ in range(2)]  # they make kernels and the optimizer's state
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if not SMALL:
            torch.cuda.set_sync_debug_mode("warn")
        rest = list(training.steps)
        if not SMALL:
            torch.cuda.set_sync_debug_mode("default")
    seconds = statistics.median(step.seconds for step in rest)
    count = sum("synchroniz" in str(warning.message) for warning in waits) / len(rest)
    reserved = torch.cuda.max_memory_reserved() / GB
    waited = "waits not counted" if SMALL else f"{count:.1f} waits a step"  # only CUDA itself warns of them
    planned = "" if way == "plain" else f", {planned_bytes(workload) / GB:.2f} GB planned beside the driver's"
    return (
        f"{workload.longest / seconds:,.0f} tokens/s, {reserved:.2f} GB reserved{planned}, {waited}, "
        f"loss {first[0].loss:.3f} -> {rest[-1].loss:.3f}; {_attention_of(training.decisions)}"
    )


def _attention_of(decisions: Sequence[str]) -> str:
    """The attention that was chosen, and what was tried before it and failed; of the plain engine why it runs."""
    if not (chosen := [text for text in decisions if text.startswith("model.attention")]):
        return next(text for text in decisions if text.startswith("training.engine"))
    name, _, reason = chosen[0].partition(": ")
    failed = reason.partition("; what is faster failed: ")[2]
    return f"{name}, after {failed}" if failed else name


def planned_bytes(workload: Workload) -> int:
    """Bytes that the plan expects torch to hold for one row a step: weights, adapter, its optimizer, a micro-batch."""
    import roofline

    from llmtune.kernels.patch_model import kernel_libraries

    options = {"method": workload.method, "recompute": workload.checkpointing, "trained": 1.0}
    return roofline.planned_bytes(str(workload.shape), [workload.longest], kernel_libraries("cuda"), **options)


# ---- longest row ----


def longest() -> None:
    """The longest row of a LoRA of 1B, blocks recomputed: the plan's answer, then tries around it."""
    import torch

    from llmtune.common.memory import is_out_of_memory

    free = torch.cuda.mem_get_info()[0]
    base = replace(workload_of("tiny" if SMALL else "llama-3.2-1b", 1), checkpointing=True)
    few, many = (64, 128) if SMALL else (4096, 16384)
    small, large = (planned_bytes(replace(base, longest=tokens)) for tokens in (few, many))
    planned = few + int((free - small) * (many - few) / (large - small))
    say("planned", f"{planned:,} tokens in {free / GB:.1f} GB")
    low, high = 0, 0
    tokens = 256 if SMALL else planned
    for _ in range(2 if SMALL else 6):
        try:
            finding_text = _speed_case(replace(base, longest=tokens), "auto")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            high, finding_text = tokens, "out of memory"
        else:
            low = tokens
        say(f"a row of {tokens:,}", finding_text)
        gc.collect()
        tokens = (low + high) // 2 if high else low * 5 // 4
        if high and high - low < 0.03 * high:
            break
    say("longest", f"{low:,} tokens fit", ok=low > 0)


STAGES: dict[str, Callable[[], None]] = {
    "machine": machine,
    "attention": attention,
    "engine": engine,
    "kernels": kernels,
    "speed": speed,
    "longest": longest,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    STAGES[parser.parse_args().stage]()
