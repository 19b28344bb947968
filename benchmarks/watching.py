"""What a dashboard beside a run costs its steps.

    python benchmarks/watching.py [--blocks 20] [--seconds 6]

One run trains `custom-tiny` on all processors; one `llmtune dashboard` of it is open in a pseudo-terminal. The
dashboard is stopped (SIGSTOP) and continued in turn, for blocks of `seconds`. Each pair of neighbouring blocks gives a
ratio of median step times; printed are the median ratio with its 95 % interval from a bootstrap over pairs, and the
processor time that the dashboard itself took while it ran. The load average is printed too: other work widens the
interval.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from llmtune.runs.folder import list_runs

PROGRAM = (sys.executable, "-m", "llmtune")
TRAIN = ("train", "--config", "test", "training.max_steps=100000", "tracking.trackers=[jsonl]", "evaluation.prompts=[]")


def steps_of(path: Path) -> list[float]:
    """Seconds of each step so far."""
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line["step_seconds"] for line in lines if "step_seconds" in line]


def open_dashboard(folder: Path) -> subprocess.Popen[bytes]:
    """Start a dashboard of 120 x 40 whose screen is read and thrown away."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        [*PROGRAM, "dashboard", str(folder)], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environ
    )
    os.close(theirs)

    def drain() -> None:
        try:
            while os.read(ours, 65536):
                pass
        except OSError:
            return

    threading.Thread(target=drain, daemon=True).start()
    return process


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        command = [*PROGRAM, *TRAIN, f"run.output_dir={place}", "checkpoint.every_steps=100000"]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (runs := list_runs(place)) or not (runs[0].step or 0) > 20:
            time.sleep(0.5)
        metrics = runs[0].path / "metrics.jsonl"
        watcher = open_dashboard(runs[0].path)
        time.sleep(5)  # its start is not its cost
        medians: dict[bool, list[float]] = {True: [], False: []}
        busy_s = 0.0
        try:
            for block in range(2 * arguments.blocks):
                is_watched = block % 2 == 0
                watcher.send_signal(signal.SIGCONT if is_watched else signal.SIGSTOP)
                before, times = len(steps_of(metrics)), psutil.Process(watcher.pid).cpu_times()
                time.sleep(arguments.seconds)
                medians[is_watched].append(statistics.median(steps_of(metrics)[before:]))
                after = psutil.Process(watcher.pid).cpu_times()
                busy_s += after.user + after.system - times.user - times.system
        finally:
            watcher.kill()
            training.terminate()
            training.wait()
        steps = len(steps_of(metrics))
    ratios = [watched / alone for watched, alone in zip(medians[True], medians[False], strict=True)]
    draw = random.Random(0)
    resampled = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    low, high = resampled[49], resampled[1949]
    share = busy_s / (arguments.blocks * arguments.seconds)
    print(f"load average {os.getloadavg()[0]:.1f}; {steps:,} steps of {statistics.median(medians[False]):.4f} s alone")
    print(f"step beside a dashboard / alone: {statistics.median(ratios):.4f} (95 %: {low:.4f} to {high:.4f})")
    print(f"the dashboard takes {share:.2%} of one processor, {share / (os.cpu_count() or 1):.2%} of the machine")


if __name__ == "__main__":
    main()
