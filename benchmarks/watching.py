"""What a dashboard and the page beside a run cost its steps.

    python benchmarks/watching.py [--blocks 12] [--seconds 10]

One run trains `custom-tiny` on all processors. One `llmtune dashboard` of it is open in a pseudo-terminal, and one
`llmtune ui` is asked every two seconds for what its page asks for. Both are stopped (SIGSTOP) and continued in turn, in
blocks of `seconds`. Each pair of neighbouring blocks gives a ratio of mean step times: the cost of a picture falls on
few steps, which a median would not show. Printed are the median of these ratios with its 95 % interval from a bootstrap
over pairs, the same for the processor time of a step, and the processor time that the two themselves took while they
ran. The load average is printed too: other work widens the interval of the times, less that of the processor
times. What a browser takes to show the page is not measured.
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
import urllib.parse
import urllib.request
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
        [*PROGRAM, "dashboard", str(folder)], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
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


def busy_of(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> float:
    """Processor seconds that a process took so far."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def median_ratio(watched: list[float], alone: list[float]) -> tuple[float, float, float]:
    """The median ratio of pairs, and its 95 % interval from a bootstrap over pairs."""
    ratios = [one / other for one, other in zip(watched, alone, strict=True)]
    draw = random.Random(0)
    resampled = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), resampled[49], resampled[1949]


class Page:
    """`llmtune ui` of a folder, asked as its page asks; between `pause` and `go_on` it is not."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, "ui", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self._url = self.process.stdout.readline().strip()
        self.is_asked = True
        threading.Thread(target=self._ask_for_ever, daemon=True).start()

    def _ask(self, path: str) -> dict[str, object] | list[dict[str, object]]:
        address, _, token = self._url.partition("?token=")
        request = urllib.request.Request(address.rstrip("/") + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: dict[str, object] | list[dict[str, object]] = json.loads(answer.read())
        return content

    def _ask_for_ever(self) -> None:
        stamp = ""
        while self.process.poll() is None:
            if self.is_asked:
                runs = self._ask("/api/runs")
                assert isinstance(runs, list)
                query = urllib.parse.urlencode({"run": runs[0]["name"], "since": stamp})
                view = self._ask(f"/api/view?{query}")
                assert isinstance(view, dict)
                stamp = str(view["stamp"])
            time.sleep(2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        command = [*PROGRAM, *TRAIN, f"run.output_dir={place}", "checkpoint.every_steps=100000"]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (runs := list_runs(place)) or not (runs[0].step or 0) > 20:
            time.sleep(0.5)
        metrics = runs[0].path / "metrics.jsonl"
        page = Page(place)
        watchers = {"dashboard": open_dashboard(runs[0].path), "page": page.process}
        time.sleep(10)  # their start is not their cost
        means: dict[bool, list[float]] = {True: [], False: []}
        processor: dict[bool, list[float]] = {True: [], False: []}
        busy_s = dict.fromkeys(watchers, 0.0)
        try:
            for block in range(2 * arguments.blocks):
                page.is_asked = is_watched = block % 2 == 0
                time.sleep(0 if is_watched else 0.5)  # no question is left open
                for watcher in watchers.values():
                    watcher.send_signal(signal.SIGCONT if is_watched else signal.SIGSTOP)
                before, busy_before_s = len(steps_of(metrics)), busy_of(training)
                watchers_before_s = {name: busy_of(watcher) for name, watcher in watchers.items()}
                time.sleep(arguments.seconds)
                made = steps_of(metrics)[before:]
                processor[is_watched].append((busy_of(training) - busy_before_s) / len(made))
                means[is_watched].append(statistics.fmean(made))
                for name, watcher in watchers.items():
                    busy_s[name] += busy_of(watcher) - watchers_before_s[name]
        finally:
            for watcher in watchers.values():
                watcher.kill()
            training.terminate()
            training.wait()
        steps = len(steps_of(metrics))
    print(f"load average {os.getloadavg()[0]:.1f}; {steps:,} steps of {statistics.fmean(means[False]):.4f} s alone")
    for what, values in (("step", means), ("processor time of a step", processor)):
        ratio, low, high = median_ratio(values[True], values[False])
        print(f"{what} beside a dashboard and a page / alone: {ratio:.4f} (95 %: {low:.4f} to {high:.4f})")
    for name, seconds in busy_s.items():
        share = seconds / (arguments.blocks * arguments.seconds)
        print(f"the {name} takes {share:.2%} of one processor, {share / (os.cpu_count() or 1):.2%} of the machine")


if __name__ == "__main__":
    main()
