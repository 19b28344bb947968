"""Peak memory of each process of a training of the real model on a CPU, alone and shared by several.

    python benchmarks/memory_per_process.py [--steps 1] [--only NAME ...]

Each line is the real command `llmtune train --devices N` on the model that is always available. Counted is memory of
the process's own (`RssAnon` of its status, twenty times a second), less what it held before it read the model: the
mapped file of the weights, which all processes of a machine share, is left out. Rows are text of Python's own
documentation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from plan_memory import FULL, LORA, Shape, write_rows

GB = 10**9


@dataclass(frozen=True)
class Case:
    """One training, and the numbers of processes that share it."""

    shape: Shape
    strategy: tuple[str, ...]
    processes: tuple[int, ...]


SHORT, LONG = (40, 60), (250, 270)
FSDP, SHARED = ("distributed.strategy=fsdp",), ("distributed.sequence_parallel={processes}",)
CASES = (
    Case(Shape("full, ddp", 3, SHORT, FULL), ("distributed.strategy=ddp",), (1, 3)),
    Case(Shape("full, fsdp", 3, SHORT, FULL), FSDP, (3,)),
    Case(Shape("LoRA, a long row, shared", 1, LONG, LORA), SHARED, (1, 3)),
    Case(Shape("full, a long row, shared, fsdp", 1, LONG, FULL), (*FSDP, *SHARED), (1, 3)),
)
"""Three processes divide the model's nine attention heads."""


def own_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def children_of(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def measure(case: Case, processes: int, folder: Path, steps: int) -> list[int]:
    """Train; returns the peak of each process in bytes."""
    write_rows(case.shape, folder / "rows.jsonl", case.shape.rows_a_step * steps)
    several = ["--devices", str(processes)] if processes > 1 else []
    words = [
        "model.name=smollm2-135m-instruct", "data.train=rows.jsonl", "data.test_size=0", "data.format=text",
        "data.overlong=truncate_right", "data.max_length=3072", "training.precision=fp32", "training.batch_size=1",
        f"training.gradient_accumulation_steps={case.shape.rows_a_step}", f"training.max_steps={steps}",
        "run.output_dir=runs", "run.name=run", *case.shape.settings,
        *(word.format(processes=processes) for word in (case.strategy if processes > 1 else ())),
    ]  # fmt: skip
    command = [sys.executable, "-m", "llmtune", "--offline", "train", *several, "--no-cuda", *words]
    peaks: dict[int, int] = {}
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
        while process.poll() is None:
            for pid in children_of(process.pid) if processes > 1 else [process.pid]:
                peaks[pid] = max(peaks.get(pid, 0), own_bytes(pid))
            time.sleep(0.05)
        said.seek(0)
        if process.returncode != 0:
            raise SystemExit(f"{case.shape.name}: exit {process.returncode}: {said.read()[-500:]}")
    return sorted(peaks.values())[-processes:]


def bare_bytes() -> int:
    """What a process holds once its libraries are imported."""
    code = (
        "from llmtune.cli.process import prepare_process as p; p(trains=True); print(open('/proc/self/status').read())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return sum(1024 * int(line.split()[1]) for line in said.splitlines() if line.startswith("RssAnon:"))


def main() -> None:
    """Measure each case, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="parts of names of cases")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    bare = bare_bytes()
    print(f"libraries: {bare / GB:.2f} GB of each process, not counted below\n")
    print("| training | processes | most of one, GB | of all, GB |\n| --- | ---: | ---: | ---: |", flush=True)
    for case in CASES:
        if options.only and not any(part in case.shape.name for part in options.only):
            continue
        for processes in case.processes:
            with tempfile.TemporaryDirectory() as folder:
                peaks = [peak - bare for peak in measure(case, processes, Path(folder), options.steps)]
            name = case.shape.name if processes > 1 else case.shape.name.partition(", ddp")[0].partition(", shared")[0]
            print(f"| {name} | {processes} | {max(peaks) / GB:.2f} | {sum(peaks) / GB:.2f} |", flush=True)


if __name__ == "__main__":
    main()
