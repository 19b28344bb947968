"""Seconds of a step by part, beside the least seconds that the needed operations take.

    python benchmarks/profile_step.py --workload lora [--steps 3] [--allocator tcmalloc.so]

Every operation's own time is given to one part: by the fused function it runs in, by its shape (products with the
adapter's rank), or by its name. The parts and the time between operations add up to the step; the last line says how
nearly.

The profiler's own records are many and small. In glibc's heap they come to lie between a step's large blocks, which
then are made of fresh pages again and again, and the loss seems to take twice its time; tcmalloc keeps small blocks
apart and shows a step as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import llmtune_contestant
import numpy as np
from starting_point import zero_first
from workloads import WORKLOADS, find_conversations, matrix_rate, needed_operations, prepare, read, scaled

PARTS = ("linear", "adapter", "attention", "norm", "loss", "optimizer", "data", "other")
OWNERS = (
    ("_TiledAttention", "attention"),
    ("scaled_dot_product", "attention"),
    ("_RmsNorm", "norm"),
    ("layer_norm", "norm"),
    ("rms_norm", "norm"),
    ("_LinearCrossEntropy", "loss"),
    ("cross_entropy", "loss"),
    ("log_softmax", "loss"),
    ("Optimizer.step", "optimizer"),
    ("clip", "optimizer"),
    ("part: ", ""),
)
"""Parts of names of operations that own all operations inside them, first match wins; `part: x` contains its part."""

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::linear",
    "aten::matmul",
    "MmBackward",
    "AddmmBackward",
)


def part_of(event: Any, rank: int) -> str:
    """Return the part to which an operation's own time belongs. rank: the adapter's."""
    inside, operation = False, event
    while operation is not None:
        for name, part in OWNERS:
            if name in operation.name:
                return part or operation.name.removeprefix("part: ")
        inside = inside or "_LoraGroup" in operation.name
        operation = operation.cpu_parent
    if any(name in event.name for name in PRODUCTS):
        sizes = {
            size
            for shape in event.input_shapes or ()
            if isinstance(shape, (list, tuple))
            for size in shape
            if isinstance(size, int)
        }
        return "adapter" if inside and sizes & {rank, 2 * rank, 3 * rank} else "linear"
    return "adapter" if inside else "other"


def profiled(folder: Path, device: str, skipped: int) -> tuple[Counter[str], float, Any]:
    """Train the rows of `folder` under the profiler; seconds by part, seconds of all steps, and the model's config."""
    workload, rows = read(folder)
    import torch

    training = llmtune_contestant.train(workload, rows, device)
    for _ in range(skipped):
        next(training.steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        began = time.perf_counter()
        for _ in training.steps:
            pass
        seconds = time.perf_counter() - began
    seconds_by_part: Counter[str] = Counter()
    for event in profiler.events():
        seconds_by_part[part_of(event, workload.rank)] += event.self_cpu_time_total / 1e6
    return seconds_by_part, seconds, training.config


def main() -> None:
    """Parse, train, print the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="lora")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows-a-step", type=int)
    parser.add_argument("--conversations", type=Path, default=find_conversations())
    parser.add_argument(
        "--device",
        choices=("cpu",),
        default="cpu",
        help="operations are timed on the host: a GPU needs its own profiler",
    )
    parser.add_argument("--allocator", help="library to preload, for example libtcmalloc.so")
    options = parser.parse_args()
    if options.allocator and os.environ.get("LD_PRELOAD") != options.allocator:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": options.allocator})
    workload = scaled(WORKLOADS[options.workload], options.rows_a_step)
    with tempfile.TemporaryDirectory() as temporary:
        prepare(workload, Path(temporary), options.steps + 1, options.conversations)
        _, rows = read(Path(temporary))
        by_part, seconds, config = profiled(Path(temporary), options.device, skipped=1)
    rows = rows[workload.rows_a_step :]
    lengths = np.array([len(ids) for ids, _ in rows])
    trained = float(sum((zero_first(weights) > 0).sum() for _, weights in rows))
    needs = needed_operations(workload, config, lengths, trained)
    rate = matrix_rate(options.device)
    floors = {"linear": needs.linear, "adapter": needs.adapter, "attention": needs.attention, "loss": needs.head}
    trained_in = f"{lengths.sum()} tokens in {options.steps} steps, {seconds:.2f} s"
    print(f"{workload.name}: {trained_in}; matrix rate {rate / 1e9:.0f} GFLOP/s")
    print(f"{'part':12} {'seconds':>8} {'share':>6} {'floor s':>8}")
    for part in PARTS:
        floor = f"{floors[part] / rate:8.2f}" if part in floors else " " * 8
        print(f"{part:12} {by_part[part]:8.2f} {by_part[part] / seconds:6.1%} {floor}")
    print(f"{'sum':12} {sum(by_part.values()):8.2f} {sum(by_part.values()) / seconds:6.1%} {needs.total / rate:8.2f}")


if __name__ == "__main__":
    main()
