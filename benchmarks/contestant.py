"""One contestant's training in a process of its own: `python benchmarks/contestant.py NAME FOLDER DEVICE`.

Every contestant trains the same rows in the same order, with AdamW, a constant rate, clipping at 1 and no decay.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import litgpt_contestant
import llmtune_contestant
import numpy as np
import psutil
import trainer_contestant
from starting_point import Rows, Step, Training, zero_first
from workloads import Workload, matrix_rate, needed_operations, read


def step_tokens(workload: Workload, lengths: np.ndarray, steps: list[Step]) -> list[int]:
    """Real tokens of each step: as the contestant counted them, else those of `rows_a_step` rows after one another."""
    counted = [step.tokens for step in steps if step.tokens is not None]
    if len(counted) == len(steps):
        return counted
    assert workload.pack is None, "who packs rows must count the tokens of its steps"
    return [
        int(part.sum()) for part in np.split(lengths, range(workload.rows_a_step, len(lengths), workload.rows_a_step))
    ]


def main() -> None:
    """Run one contestant and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CONTESTANTS))
    parser.add_argument("folder", type=Path, help="with the rows and the workload, as `compare.py` writes them")
    parser.add_argument("device", choices=("cpu", "cuda"))
    options = parser.parse_args()
    workload, rows = read(options.folder)
    training = CONTESTANTS[options.name](workload, rows, options.device)
    steps, first_step_s = [], 0.0
    for step in training.steps:
        first_step_s = first_step_s or time.time() - psutil.Process().create_time()
        steps.append(step)
    import torch

    lengths = np.array([len(ids) for ids, _ in rows])
    trained = float(sum((zero_first(weights) > 0).sum() for _, weights in rows))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "name": options.name,
        "seconds": [step.seconds for step in steps],
        "losses": [step.loss for step in steps],
        "step_tokens": step_tokens(workload, lengths, steps),
        "tokens": int(lengths.sum()),
        "trained_tokens": trained,
        "needed_operations": needed_operations(workload, training.config, lengths, trained).total,
        "matrix_rate": matrix_rate(options.device),
        "first_step_s": first_step_s,
        "data_seconds": llmtune_contestant.TimedMicroBatches.seconds,
        "peak_bytes": resident if options.device == "cpu" else torch.cuda.max_memory_allocated(),
        "decisions": training.decisions,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


llmtune, trainer, litgpt = llmtune_contestant.train, trainer_contestant.train, litgpt_contestant.train
CONTESTANTS: dict[str, Callable[[Workload, Rows, str], Training]] = {
    "llmtune": llmtune,
    "llmtune-plain": partial(llmtune, engine="plain"),
    "llmtune-4096": partial(llmtune, group_tokens=4096),
    "trainer": lambda workload, rows, device: trainer(workload, rows, device, workload.rows_a_step),
    "trainer-best": partial(trainer, micro_batch=1),
    "trainer-best-bf16": partial(trainer, micro_batch=1, base_dtype="bfloat16"),
    "trl": lambda workload, rows, device: trainer(workload, rows, device, workload.rows_a_step, sft=True),
    "trl-best": partial(trainer, micro_batch=1, sft=True),
    "litgpt": lambda workload, rows, device: litgpt(workload, rows, device, workload.rows_a_step),
    "litgpt-best": partial(litgpt, micro_batch=1),
}
"""`-best` is a micro-batch of one row, accumulated: it wastes nothing on padding, and few users find it."""

if __name__ == "__main__":
    main()
