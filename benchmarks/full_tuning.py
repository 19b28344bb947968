"""Full tuning by optimizer: tokens a second and peak memory of each, in turn, in a process of its own.

    python benchmarks/full_tuning.py --device cuda [--shape llama-3.2-1b] [--tokens 4096] [--steps 8]
    python benchmarks/full_tuning.py --device cpu --shape tiny --tokens 256

Random weights of a published shape, one micro-batch a step, blocks recomputed, bf16 arithmetic, float32 weights. Paged
optimizers keep their state where the driver can move it to the CPU's memory, so they take part on CUDA only.
`+ in backward` is `training.step_in_backward`. Peaks are bytes allocated by tensors on CUDA and resident bytes of the
process on a CPU. The losses of a row are those of the row without `+ in backward`, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import numpy as np
from workloads import SHAPES, Workload

IN_BACKWARD = " + in backward"
VARIANTS = tuple(
    name + ending for name in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit") for ending in ("", IN_BACKWARD)
)
LOSS_TOLERANCE = 1e-2


def train(variant: str, shape: str, tokens: int, steps: int, device: str) -> dict[str, Any]:
    """Train one variant; returns its rate without the first step, its peak and its losses."""
    import llmtune_contestant

    workload = Workload("full-tuning", "full", tokens, tokens, 1, 1e-5, shape=shape, checkpointing=True)
    random = np.random.default_rng(0)
    rows = [
        (random.integers(10, SHAPES[shape]["vocab_size"], tokens).astype(np.int32), np.ones(tokens, np.float32))
        for _ in range(steps)
    ]
    name = variant.removesuffix(IN_BACKWARD)
    training = llmtune_contestant.train(
        workload, rows, device, optimizer=name, max_grad_norm=None, step_in_backward=variant != name
    )
    results = list(training.steps)

    import torch

    from llmtune.engine.choose_device import peak_memory_bytes

    return {
        "tokens_per_second": tokens * (steps - 1) / sum(step.seconds for step in results[1:]),
        "peak_bytes": peak_memory_bytes(torch.device(device)),
        "losses": [step.loss for step in results],
    }


def main() -> int:
    """Run each variant in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=4096, help="of the one row of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=VARIANTS, help="run this one in this process and print its figures as JSON")
    options = parser.parse_args()
    given = (options.shape, options.tokens, options.steps, options.device)
    if options.only:
        print(json.dumps(train(options.only, *given)))
        return 0
    print(f"full tuning of {options.shape}, {options.steps} steps of {options.tokens} tokens on {options.device}\n")
    print("| optimizer | tokens/s | peak GB | last loss |\n| --- | ---: | ---: | ---: |", flush=True)
    figures_of: dict[str, dict[str, Any]] = {}
    failed = False
    for variant in VARIANTS:
        if options.device == "cpu" and variant.startswith("paged"):
            continue
        process = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", variant], check=False, capture_output=True, text=True
        )
        if process.returncode != 0:
            reason = (process.stderr.strip().splitlines() or [f"exit {process.returncode}"])[-1]
            print(f"| {variant} | not run: {reason} |", flush=True)
            failed = True
            continue
        figures_of[variant] = figures = json.loads(process.stdout.strip().splitlines()[-1])
        twin = figures_of.get(variant.removesuffix(IN_BACKWARD), figures)
        apart = max(abs(loss - expected) for loss, expected in zip(figures["losses"], twin["losses"], strict=True))
        failed |= apart > LOSS_TOLERANCE
        last = f"{figures['losses'][-1]:.4f}" + (f" APART BY {apart:.1e}" if apart > LOSS_TOLERANCE else "")
        print(
            f"| {variant} | {figures['tokens_per_second']:.0f} | {figures['peak_bytes'] / 1e9:.2f} | {last} |",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
