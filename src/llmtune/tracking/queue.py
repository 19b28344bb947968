"""Trackers behind a queue, so that they may be slow, dead, full or lying and the run never notices (promise P11).

Each tracker has a lane of its own: one bounded queue and one daemon thread. One thread for all of them would let a
tracker that hangs take the others with it. The training thread only ever puts a small copy into a queue, and never
waits for room.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.common.printing import PrintLine
from llmtune.errors import in_one_line
from llmtune.tracking.tracker import Histogram, RunInfo, Tracker

__all__ = ["LaneReport", "TrackerQueue", "say_on_stderr"]

Call = Callable[[Tracker], None]


@dataclass(frozen=True)
class LaneReport:
    """How a tracker did: entries it never saw, and why it was switched off (None when it never was)."""

    tracker: str
    dropped: int
    failure: str | None


def say_on_stderr(line: str) -> None:
    """Print one line of talk; a closed stderr is no reason to stop training."""
    try:
        print(f"llmtune: {line}", file=sys.stderr, flush=True)  # noqa: T201
    except (OSError, ValueError):
        return


class TrackerQueue:
    """Tells trackers what happens, without ever waiting for one.

    capacity: entries a tracker may be behind; what comes after is dropped, counted and said once. hang_after_s: a
    tracker that spends longer in one call is switched off. Its thread is left behind: a thread cannot be stopped.
    print_line: receives one line for each thing worth saying; called from the tracker's thread or from the caller's.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        capacity: int = 1000,
        hang_after_s: float = 120.0,
        print_line: PrintLine = say_on_stderr,
    ) -> None:
        self._lanes = [_Lane(tracker, capacity, hang_after_s, print_line) for tracker in trackers]

    def start(self, info: RunInfo) -> None:
        """Start every tracker on its own thread and return at once."""
        for lane in self._lanes:
            lane.begin(lambda tracker: tracker.start(info))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Queue the metrics of a step. Copies `metrics`; values must be plain numbers or strings."""
        copy = dict(metrics)
        self._offer(lambda tracker: tracker.log(step, dict(copy)))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Queue answers of the model."""
        copy = [dict(row) for row in rows]
        self._offer(lambda tracker: tracker.samples(step, [dict(row) for row in copy]))

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Queue histograms of gradients or weights."""
        copy = dict(histograms)
        self._offer(lambda tracker: tracker.histograms(step, dict(copy)))

    def finish(self, state: str, timeout_s: float = 30.0) -> list[LaneReport]:
        """Let every tracker write what it has and end; wait at most `timeout_s` seconds for all of them together."""
        deadline = time.monotonic() + timeout_s

        def last_call(tracker: Tracker) -> None:
            tracker.finish(state)

        for lane in self._lanes:  # all of them are asked before any is waited for
            lane.ask_to_finish(last_call, wait_s=0)
        return [lane.wait(last_call, deadline, timeout_s) for lane in self._lanes]

    def _offer(self, call: Call) -> None:
        for lane in self._lanes:
            lane.offer(call)


class _Lane:
    """One tracker, its queue and its thread."""

    def __init__(self, tracker: Tracker, capacity: int, hang_after_s: float, print_line: PrintLine) -> None:
        self._tracker = tracker
        self._hang_after_s = hang_after_s
        self._print_line = print_line
        self._calls: queue.Queue[tuple[Call, bool]] = queue.Queue(maxsize=capacity)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._busy_since: float | None = None
        self._failure: str | None = None
        self._dropped = 0
        self._finish_is_queued = False

    def begin(self, call: Call) -> None:
        """Start the thread with its first call."""
        self._calls.put_nowait((call, False))
        self._thread.start()

    def offer(self, call: Call) -> None:
        """Queue a call without waiting.

        It is counted as dropped where the queue is full or the tracker is switched off.
        """
        if self._failure is None and self._is_hanging():
            self._switch_off(f"did not come back within {self._hang_after_s:g} s")
        if self._failure is not None:
            self._dropped += 1
            return
        try:
            self._calls.put_nowait((call, False))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._print_line(f"tracker {self._tracker.name} is too slow: entries it has no room for are dropped")

    def ask_to_finish(self, call: Call, wait_s: float) -> None:
        """Queue the last call, once; waits at most `wait_s` seconds for room and goes on without."""
        if self._finish_is_queued or self._failure is not None:
            return
        try:
            self._calls.put((call, True), timeout=wait_s) if wait_s else self._calls.put_nowait((call, True))
        except queue.Full:
            return
        self._finish_is_queued = True

    def wait(self, call: Call, deadline: float, timeout_s: float) -> LaneReport:
        """Wait for the thread until `deadline` (of the monotonic clock, in seconds) and say what this tracker never
        saw.
        """
        if self._failure is None and self._thread.ident is not None:
            self.ask_to_finish(call, wait_s=max(deadline - time.monotonic(), 0.01))
            self._thread.join(timeout=max(deadline - time.monotonic(), 0.01))
            if self._thread.is_alive() and self._failure is None:
                self._switch_off(f"did not finish within {timeout_s:g} s")
        if self._dropped:
            self._print_line(f"tracker {self._tracker.name} never saw {self._dropped} entries")
        return LaneReport(self._tracker.name, self._dropped, self._failure)

    def _is_hanging(self) -> bool:
        since = self._busy_since
        return since is not None and time.monotonic() - since > self._hang_after_s

    def _switch_off(self, reason: str) -> None:
        self._failure = reason
        self._print_line(f"tracker {self._tracker.name} is switched off: it {reason}; the run goes on without it")

    def _work(self) -> None:
        last = False
        while not last and self._failure is None:
            call, last = self._calls.get()
            self._busy_since = time.monotonic()
            try:
                call(self._tracker)
            except BaseException as error:  # noqa: BLE001 - whatever a tracker does, even SystemExit, stays on its own thread
                if self._failure is None:
                    self._switch_off(f"failed with {type(error).__name__}: {in_one_line(error)}")
            self._busy_since = None
