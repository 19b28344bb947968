"""The cost of saving and of trackers in a run, beside its steps.

    python benchmarks/overhead.py [KEY=VALUE ...]

Trains the test preset, with its three trackers, in a temporary folder of the current disk, and prints one JSON object.
Saving includes syncs, digests, re-reading and retention. Shares are of the seconds spent in steps. Of trackers two
things are counted: the time of their calls in the training thread, and the processor time of their own threads, which
can only slow the training where no core is free.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

from llmtune.config.layers import load_config
from llmtune.tracking import queue
from llmtune.tracking.jsonl import RunRecord
from llmtune.training import train as training
from llmtune.training.checkpointer import Checkpointer

TIMED = (
    (Checkpointer, "save", "save"),
    (Checkpointer, "keep_best", "best"),
    (Checkpointer, "write_final", "final"),
    (RunRecord, "log", "record"),
    (RunRecord, "samples", "record"),
    (queue.TrackerQueue, "start", "trackers"),
    (queue.TrackerQueue, "log", "trackers"),
    (queue.TrackerQueue, "samples", "trackers"),
    (queue.TrackerQueue, "histograms", "trackers"),
)


class Stopwatch:
    """Adds up the seconds and calls of functions, by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        """Add one call."""
        with self._lock:
            self.seconds[name] += seconds
            self.calls[name] += 1

    def time_calls(self, owner: type, function: str, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        """Time every call of `owner.function` under `name`."""
        original = getattr(owner, function)

        def timed(*args: object, **kwargs: object) -> object:
            begin = clock()
            try:
                return original(*args, **kwargs)
            finally:
                self.add(name, clock() - begin)

        setattr(owner, function, timed)


def main() -> None:
    """Train once and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    watch = Stopwatch()
    for owner, function, name in TIMED:
        watch.time_calls(owner, function, name)
    watch.time_calls(queue._Lane, "_work", "tracker threads", clock=time.thread_time)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd()))
        output = stack.enter_context((Path(folder) / "output").open("w"))
        stack.enter_context(redirect_stderr(output))
        stack.enter_context(redirect_stdout(output))
        resolved = load_config("test", overrides=[*options.settings, f"run.output_dir={folder}/runs"])
        result = training.train(resolved)
    steps = result.seconds
    figures = {
        "model": resolved.config.model.name,
        "steps": result.step,
        "seconds_in_steps": round(steps, 3),
        "saves": watch.calls["save"],
        "save_share": round(watch.seconds["save"] / steps, 4),
        "save_and_best_share": round((watch.seconds["save"] + watch.seconds["best"]) / steps, 4),
        "final_seconds": round(watch.seconds["final"], 3),
        "record_share": round(watch.seconds["record"] / steps, 5),
        "tracker_calls": watch.calls["trackers"],
        "trackers_in_the_training_thread_share": round(watch.seconds["trackers"] / steps, 5),
        "tracker_threads_processor_share": round(watch.seconds["tracker threads"] / steps, 4),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
