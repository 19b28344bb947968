"""The longest row that trains in so much memory, found by bisection: NF4 QLoRA, rank 32, of a published shape.

    python benchmarks/longest_row.py [--gb 24 80] [--shape llama-3-8b] [--recompute offload] [--device cuda]
    python benchmarks/longest_row.py --device cpu --shape tiny --gb 1.0 --least 512 --most 65536   # a minute or two

Weights are random. Each try trains two rows of that length (every token but the first carries loss), each an update, in
a process of its own. On a CUDA device torch may reserve what the limit leaves beside the driver's own memory, and the
allocator refuses more; no other program may use the device meanwhile. On a CPU the peak is `ru_maxrss`, everything that
was ever resident. Lengths double until one does not fit and are then bisected until they are within --within of each
other. Prints one row of a table for each limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from workloads import SHAPES, WORKLOADS

ROWS = 2
GB = 10**9
PUBLISHED = {24: 78_475, 80: 342_733}
"""Tokens of the longest row that Unsloth publishes for the same model, adapter and limits, by GB."""


def longest(fits: Callable[[int], bool], *, least: int, most: int, within: float) -> int | None:
    """Return the longest length between `least` and `most` that fits, within that fraction of it.

    None where not even `least` does.
    """
    if not fits(least):
        return None
    low, high = least, least
    while low == high and low < most:
        high = min(2 * high, most)
        low = high if fits(high) else low
    while high - low > within * low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def attempt(tokens: int, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train rows of that length in this process and return its figures; memory in GB (10^9 bytes)."""
    import llmtune_contestant

    workload = replace(
        WORKLOADS["gpu-8b-qlora"],
        shape=options.shape,
        rank=32,
        pack=None,
        rows_a_step=1,
        checkpointing=_setting(options.recompute),
    )
    random = np.random.default_rng(tokens)
    weights = np.ones(tokens, dtype=np.float32)
    rows = [
        (random.integers(3, SHAPES[options.shape]["vocab_size"], tokens).astype(np.int32), weights.copy())
        for _ in range(ROWS)
    ]
    training = llmtune_contestant.train(workload, rows, options.device)
    context = _limit_device(limit) if options.device == "cuda" else 0
    seconds, loss, _ = list(training.steps)[-1]
    peak = (_peak_bytes(options.device) + context) / GB
    return {"peak_gb": peak, "tokens_per_second": tokens / seconds, "loss": loss, "decisions": training.decisions}


def _setting(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


def _limit_device(limit: float) -> int:
    """Let torch reserve what the limit leaves beside the driver's memory, which is returned in bytes."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, (limit * GB - context) / total)))
    return context


def _peak_bytes(device: str) -> int:
    import torch

    return (
        torch.cuda.max_memory_reserved()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def in_its_own_process(tokens: int, limit: float, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the figures of an attempt, or None when it did not fit; any other failure ends the benchmark."""
    command = [sys.executable, __file__, "--try", str(tokens), "--gb", str(limit), "--shape", options.shape]
    command += ["--recompute", options.recompute, "--device", options.device]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    if process.returncode != 0:
        if (
            "out of memory" in process.stderr.lower()
            or "can't allocate memory" in process.stderr
            or process.returncode == -9
        ):
            return None
        raise SystemExit(f"{tokens:,} tokens: exit {process.returncode}: {process.stderr.strip().splitlines()[-3:]}")
    figures: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return figures if figures["peak_gb"] <= limit else None


def measure(limit: float, options: argparse.Namespace) -> str:
    """Find the longest row for one limit; returns its row of the table."""
    attempts: dict[int, dict[str, Any]] = {}

    def fits(tokens: int) -> bool:
        figures = in_its_own_process(tokens, limit, options)
        print(f"  {tokens:,} tokens in {limit:g} GB: {'fit' if figures else 'do not fit'}", file=sys.stderr, flush=True)
        if figures is not None:
            attempts[tokens] = figures
        return figures is not None

    tokens = longest(fits, least=options.least, most=options.most, within=options.within)
    published = PUBLISHED.get(int(limit)) if options.shape == "llama-3-8b" and options.device == "cuda" else None
    other = f"{published:,} (ours is {tokens / published:.2f} of it)" if published and tokens else "-"
    if tokens is None:
        return f"| {limit:g} GB | {options.recompute} | less than {options.least:,} | - | - | {other} |"
    figures = attempts[tokens]
    at_most = " (not tried longer)" if tokens == options.most else ""
    peak, rate = f"{figures['peak_gb']:.2f} GB", f"{figures['tokens_per_second']:,.0f}"
    return f"| {limit:g} GB | {options.recompute} | {tokens:,}{at_most} | {peak} | {rate} | {other} |"


def main() -> int:
    """Measure each limit, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[24.0, 80.0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--recompute", choices=["offload", "true", "false"], default="offload")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--least", type=int, default=4096)
    parser.add_argument("--most", type=int, default=1 << 20)
    parser.add_argument("--within", type=float, default=0.02)
    parser.add_argument("--try", type=int, dest="tokens", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens is not None:
        print(json.dumps(attempt(options.tokens, options.gb[0], options), default=str))
        return 0
    print("| memory | blocks | longest row, tokens | peak | tokens/s | Unsloth publishes |", flush=True)
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for limit in options.gb:
        print(measure(limit, options), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
