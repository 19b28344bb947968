"""What a dashboard and the page beside a run cost its steps.

    python benchmarks/watching.py [--seconds 420]

One run trains `custom-tiny` on all processors. One `llmtune dashboard` of it is open in a pseudo-terminal, and one
`llmtune ui` is asked every four seconds for what its page asks for. Both are left alone, as a user leaves them.

They work seldom: a picture of the dashboard, an answer of the page. The steps that overlap with such a moment are
compared with the mean of those within `NEIGHBOURS_S` before and after that overlap with none, so that a machine that
becomes slower or faster in between counts on both sides. What all moments cost together, as a share of the whole time,
is printed with its 95 % interval from a bootstrap over moments; a step beside two of them counts twice. What the two do
at other times is in their processor time alone, which is printed too. So is the load average: other work widens the
interval. What a browser takes to show the page is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pty
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from llmtune.common.environment import available_cores
from llmtune.runs.folder import list_runs

PROGRAM = (sys.executable, "-m", "llmtune")

TRAIN = """
import sys, time
from llmtune.cli.process import prepare_process

prepare_process(trains=True)
from llmtune import Trainer, load_config

overrides = ["training.max_steps=100000", "tracking.trackers=[jsonl]", "evaluation.prompts=[]"]
overrides += ["checkpoint.every_steps=100000", f"run.output_dir={sys.argv[1]}"]
Trainer(load_config("test", overrides=overrides), metrics=[lambda step: {"ended_s": time.monotonic()}]).train()
"""
"""`llmtune train` whose steps write down when they ended, by the clock that all processes of a machine share."""

NEIGHBOURS_S = 3.0
BEFORE_PICTURE_S = 1.5
"""A picture appears when it is drawn: the work was done before, at a low priority."""
SAME_PICTURE_S = 0.3


class Moment(NamedTuple):
    """When a watcher was at work, in seconds of the shared clock."""

    watcher: str
    start_s: float
    end_s: float


class Step(NamedTuple):
    """From the end of the step before to the end of this one."""

    start_s: float
    end_s: float


def steps_of(path: Path) -> list[Step]:
    """The steps so far, but the first."""
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    ends = [line["ended_s"] for line in lines if "ended_s" in line]
    return [Step(*pair) for pair in itertools.pairwise(ends)]


def open_dashboard(folder: Path, is_drawn: Callable[[], None]) -> subprocess.Popen[bytes]:
    """Start a dashboard of 120 x 40 whose screen is thrown away; `is_drawn` is called for each piece of it."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        [*PROGRAM, "dashboard", str(folder)], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    )
    os.close(theirs)

    def drain() -> None:
        try:
            while os.read(ours, 65536):
                is_drawn()
        except OSError:
            return

    threading.Thread(target=drain, daemon=True).start()
    return process


def open_page(folder: str, is_answered: Callable[[float], None]) -> subprocess.Popen[str]:
    """Start `llmtune ui` of a folder and ask it as its page asks; `is_answered` gets when each question was asked."""
    process = subprocess.Popen([*PROGRAM, "ui", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    address, _, token = process.stdout.readline().strip().partition("?token=")

    def ask(path: str) -> dict[str, object] | list[dict[str, object]]:
        request = urllib.request.Request(address.rstrip("/") + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: dict[str, object] | list[dict[str, object]] = json.loads(answer.read())
        return content

    def ask_for_ever() -> None:
        stamp = ""
        while process.poll() is None:
            asked_s = time.monotonic()
            runs = ask("/api/runs")
            assert isinstance(runs, list)
            view = ask(f"/api/view?{urllib.parse.urlencode({'run': runs[0]['name'], 'since': stamp})}")
            assert isinstance(view, dict)
            stamp = str(view["stamp"])
            is_answered(asked_s)
            time.sleep(4)

    threading.Thread(target=ask_for_ever, daemon=True).start()
    return process


def busy_of(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> float:
    """Processor seconds that a process took so far."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def moments_of(pieces_s: list[float], answers_s: list[tuple[float, float]]) -> list[Moment]:
    """The pictures of the dashboard, each of pieces that follow each other, and the answers of the page, in order."""
    pictures: list[Moment] = []
    for piece_s in pieces_s:
        if pictures and piece_s - pictures[-1].end_s < SAME_PICTURE_S:
            pictures[-1] = pictures[-1]._replace(end_s=piece_s)
        else:
            pictures.append(Moment("dashboard", piece_s - BEFORE_PICTURE_S, piece_s))
    return sorted([*pictures, *(Moment("page", *answer) for answer in answers_s)], key=lambda moment: moment.start_s)


def costs_of(moments: list[Moment], steps: list[Step]) -> list[tuple[Moment, float]]:
    """Seconds that the steps beside each moment took longer than their neighbours; of moments with neighbours alone."""
    costs = []
    for moment in moments:
        near = [
            step
            for step in steps
            if step.start_s > moment.start_s - NEIGHBOURS_S and step.end_s < moment.end_s + NEIGHBOURS_S
        ]
        own = [step for step in near if overlaps(step, moment)]
        others = [step for step in near if not any(overlaps(step, other) for other in moments)]
        if own and others:
            usual_s = statistics.fmean(step.end_s - step.start_s for step in others)
            costs.append((moment, sum(step.end_s - step.start_s - usual_s for step in own)))
    return costs


def overlaps(step: Step, moment: Moment) -> bool:
    """Whether a part of the step lies in the moment."""
    return step.start_s < moment.end_s and step.end_s > moment.start_s


def print_costs(costs: list[float], share: float, what: str) -> None:
    """Print what moments cost on average and, as a share of the time, together. share: the moments per second."""
    if not costs:
        print(f"{what}: no moment in this time")
        return
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(costs, k=len(costs))) for _ in range(2000))
    mean = statistics.fmean(costs)
    print(
        f"{what}: {len(costs)} moments, each costs the steps {1000 * mean:.1f} ms "
        f"(95 %: {1000 * means[49]:.1f} to {1000 * means[1949]:.1f}): "
        f"{mean * share:.2%} of the time (95 %: {means[49] * share:.2%} to {means[1949] * share:.2%})"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420.0)
    seconds = parser.parse_args().seconds
    pieces_s: list[float] = []
    answers_s: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as place:
        watchers: dict[str, subprocess.Popen[bytes] | subprocess.Popen[str]] = {}
        training = subprocess.Popen(
            [sys.executable, "-c", TRAIN, place], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not (runs := list_runs(place)) or not (runs[0].step or 0) > 20:
                assert training.poll() is None
                time.sleep(0.5)
            watchers["dashboard"] = open_dashboard(runs[0].path, lambda: pieces_s.append(time.monotonic()))
            watchers["page"] = open_page(place, lambda asked_s: answers_s.append((asked_s, time.monotonic())))
            time.sleep(20)  # their start is not their cost
            start_s, before_s = time.monotonic(), {name: busy_of(watcher) for name, watcher in watchers.items()}
            time.sleep(seconds)
            end_s, after_s = time.monotonic(), {name: busy_of(watcher) for name, watcher in watchers.items()}
        finally:
            for watcher in watchers.values():
                watcher.kill()
            training.terminate()
            training.wait()
        steps = [step for step in steps_of(runs[0].path / "metrics.jsonl") if start_s < step.start_s < end_s]
    moments = [moment for moment in moments_of(pieces_s, answers_s) if start_s < moment.start_s < end_s]
    costs = costs_of(moments, steps)
    print(f"load average {os.getloadavg()[0]:.1f}; {len(steps):,} steps of {seconds / len(steps):.4f} s")
    for name in watchers:
        own = [cost for moment, cost in costs if moment.watcher == name]
        print_costs(own, sum(moment.watcher == name for moment in moments) / seconds, name)
        busy = (after_s[name] - before_s[name]) / seconds
        print(f"the {name} takes {busy:.2%} of one processor, {busy / available_cores():.2%} of the machine")
    print_costs([cost for _, cost in costs], len(moments) / seconds, "together")


if __name__ == "__main__":
    main()
