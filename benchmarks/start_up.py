"""Seconds of a training from its command to its first step, when rows and weights are in the cache.

    python benchmarks/start_up.py [--rounds 3] [--config quickstart] [KEY=VALUE ...]

The real command is started in a process of its own, once to fill the cache and then `--rounds` times. Counted are the
seconds from the start of the process until step 1 begins (its record in `metrics.jsonl`, less the seconds of the step):
imports, configuration, rows, model, adapter, the proof of the engine, the forecast. The held-out loss before training
is training's own work and is switched off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OFF = [
    "evaluation.before_training=false",
    "evaluation.every_steps=1000",
    "evaluation.exact_match=false",
    "evaluation.prompts=[]",
]


def seconds_to_first_step(folder: Path, name: str, words: list[str]) -> float:
    """Start one training, read when its first step began, and let it end."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    train = ["-m", "llmtune", "--offline", "train", "--name", name, "--no-cuda", *words, *OFF, "training.max_steps=1"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *train], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().endswith(b"\n")):
        time.sleep(0.005)
    waited = time.perf_counter() - began
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the training ended with {process.returncode}: {errors.strip().splitlines()[-1]}")
    return waited - float(json.loads(metrics.read_bytes().splitlines()[0])["step_seconds"])


def main() -> None:
    """Fill the cache, measure, print one line for each start and their median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    words = ["--config", options.config, *options.settings]
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"first start, cache as it is: {seconds_to_first_step(folder, 'first', words):.1f} s", flush=True)
        seconds = []
        for number in range(options.rounds):
            seconds.append(seconds_to_first_step(folder, f"again-{number}", words))
            print(f"start {number + 1}, from the cache: {seconds[-1]:.1f} s", flush=True)
    print(f"median {statistics.median(seconds):.1f} s from the command to step 1")


if __name__ == "__main__":
    main()
