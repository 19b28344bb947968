"""Planned beside measured peak memory, for nine shapes of training, each by the real command in a process of its own.

    python benchmarks/plan_memory.py [--steps 8] [--only NAME ...]

LoRA, QLoRA, full and from scratch; short and long rows; with and without recomputed blocks; on the model that is always
available. The plan is the one that `train` makes before step 1, the measured peak the one it prints at its end
(`ru_maxrss`: everything that was ever resident, from the imports on). Rows are text of Python's own documentation cut
to lengths drawn from a fixed seed. Exit code 1 where a plan is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scratch_vs_trainer import documents_of_python

TOLERANCE = 0.15


@dataclass(frozen=True)
class Shape:
    """One training: settings, and the range of its rows in words (a word of this text is about 2.2 tokens)."""

    name: str
    rows_a_step: int
    words: tuple[int, int]
    settings: tuple[str, ...]


LORA, QLORA, FULL = (
    ("adapter.method=lora",),
    ("adapter.method=lora", "model.quantization=4bit"),
    ("adapter.method=none",),
)
RECOMPUTED = ("model.gradient_checkpointing=true",)
STEP_IN_BACKWARD = ("training.step_in_backward=true", "training.max_grad_norm=null")
SHAPES = (
    Shape("LoRA, short rows", 32, (10, 40), LORA),
    Shape("LoRA, conversations", 8, (30, 450), LORA),
    Shape("LoRA, long rows, recomputed", 1, (1400, 1800), (*LORA, *RECOMPUTED)),
    Shape("QLoRA, conversations", 8, (30, 450), QLORA),
    Shape("QLoRA, long rows", 1, (1400, 1800), QLORA),
    Shape("full, short rows", 32, (10, 40), FULL),
    Shape("full, conversations, recomputed", 8, (30, 450), (*FULL, *RECOMPUTED)),
    Shape("full, conversations, recomputed, step in backward", 8, (30, 450), (*FULL, *RECOMPUTED, *STEP_IN_BACKWARD)),
    Shape(
        "custom-small from scratch, packed 1,024",
        8,
        (100, 900),
        ("model.name=custom-small", *FULL, "data.packing=best_fit"),
    ),
)


def write_rows(shape: Shape, path: Path, rows: int) -> None:
    """Write rows of text, their lengths drawn evenly from the shape's range."""
    generator = random.Random(0)
    words = " ".join(documents_of_python()).split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            start = generator.randrange(len(words) - shape.words[1])
            file.write(json.dumps({"text": " ".join(words[start : start + generator.randint(*shape.words)])}) + "\n")


def measure(shape: Shape, folder: Path, steps: int) -> tuple[float, float]:
    """Train; returns the planned and the measured peak in GB."""
    is_packed = "data.packing=best_fit" in shape.settings
    write_rows(shape, folder / "rows.jsonl", shape.rows_a_step * steps * (4 if is_packed else 1))
    settings = [
        "model.name=smollm2-135m-instruct",
        "data.train=rows.jsonl",
        "data.eval=[]",
        "data.test_size=0",
        "data.format=text",
        "data.overlong=truncate_right",
        f"data.max_length={1024 if shape.words[1] < 1000 else 8192}",
        "evaluation.every_steps=null",
        "evaluation.prompts=[]",
        f"training.batch_size={shape.rows_a_step}",
        f"training.max_steps={steps}",
        *shape.settings,
    ]
    train = ["-m", "llmtune", "--offline", "train", "--config", "test", "--name", "run", "--no-cuda"]
    process = subprocess.run(
        [sys.executable, *train, *settings], cwd=folder, check=False, capture_output=True, text=True
    )
    match = re.search(r"memory +([\d.]+) (MB|GB) planned, ([\d.]+) (MB|GB) measured", process.stdout + process.stderr)
    if process.returncode != 0 or match is None:
        last_lines = (process.stderr or process.stdout).strip().splitlines()[-3:]
        raise SystemExit(f"{shape.name}: exit {process.returncode}: {last_lines}")
    unit = {"MB": 1e-3, "GB": 1.0}
    return float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]]


def main() -> int:
    """Measure each shape, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="parts of names of shapes")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| shape | planned GB | measured GB | off |\n| --- | ---: | ---: | ---: |", flush=True)
    worst = 0.0
    for shape in SHAPES:
        if options.only and not any(part in shape.name for part in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            planned, measured = measure(shape, Path(folder), options.steps)
        worst = max(worst, abs(planned / measured - 1))
        print(f"| {shape.name} | {planned:.2f} | {measured:.2f} | {planned / measured - 1:+.0%} |", flush=True)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
