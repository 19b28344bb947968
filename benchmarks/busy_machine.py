"""Seconds of a training step beside processes that keep cores busy, with and without the limit on spinning threads.

    python benchmarks/busy_machine.py [--busy 0 1 4] [--rounds 3] [--steps 5]

A step is forward and backward of feed-forward layers of SmolLM2-135M's width: products and element-wise operations,
each with a barrier at which the threads wait for each other. Each measurement is a process of its own. The two settings
take turns, `rounds` times for each number of busy processes; medians are printed as rows of a table. The load average
at the start is printed too: other work on the machine counts as more busy processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from llmtune.common.environment import LIMITS, OWN_SETTINGS

BUSY = "while True: pass"


def train_steps(count: int) -> float:
    """Median seconds of `count` steps, after one to warm up."""
    import torch

    torch.manual_seed(0)
    width, hidden, tokens = 576, 1536, 256
    blocks = [
        torch.nn.Sequential(
            torch.nn.RMSNorm(width), torch.nn.Linear(width, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, width)
        )
        for _ in range(6)
    ]
    x = torch.randn(tokens, width)
    seconds = []
    for _ in range(count + 1):
        started = time.perf_counter()
        y = x
        for block in blocks:
            y = y + block(y)
        y.square().mean().backward()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(limits: dict[str, str], steps: int) -> float:
    """Seconds of a step in a new process with these variables."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS} | limits
    command = [sys.executable, __file__, "--train", "--steps", str(steps)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure each number of busy processes, both settings in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(train_steps(options.steps))
        return
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print("| busy processes | as found, s a step | limited, s a step | times as fast |\n| --- | --- | --- | --- |")
    for count in options.busy:
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        try:
            pairs = [(measure({}, options.steps), measure(LIMITS, options.steps)) for _ in range(options.rounds)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        found, limited = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {count} | {found:.2f} | {limited:.2f} | {found / limited:.2f} |", flush=True)


if __name__ == "__main__":
    main()
