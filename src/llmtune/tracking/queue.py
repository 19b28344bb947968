"""The trackers that a run gets, behind a queue: broken ones never stop, slow or change the run (P11).

Each tracker has its own lane: one bounded queue and one daemon thread. With one thread for all of them a tracker that
hangs would block the others. The training thread puts a small copy into each queue and never waits for room.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmtune.common.decisions import Decision
from llmtune.common.text import PrintLine, print_to_stderr
from llmtune.config.schema import TrackingConfig
from llmtune.errors import ConfigError, MachineError, Problem, in_one_line
from llmtune.tracking.console import ConsoleTracker
from llmtune.tracking.mlflow import MlflowTracker
from llmtune.tracking.system import SystemTracker
from llmtune.tracking.tensorboard import TensorBoardTracker
from llmtune.tracking.tracker import Histogram, Metrics, RunInfo, Sample, Tracker
from llmtune.tracking.trackio import TrackioTracker
from llmtune.tracking.wandb import WandbTracker

__all__ = ["TRACKERS", "LaneReport", "TrackerKind", "TrackerQueue", "choose_trackers", "keeps_record"]


Call = Callable[[Tracker], None]


@dataclass(frozen=True)
class LaneReport:
    """The outcome of a tracker."""

    tracker: str
    dropped: int
    """Entries that never reached it."""
    failure: str | None
    """Why it was switched off; None when it never was."""


class TrackerQueue:
    """Sends the events of a run to trackers without waiting for any of them.

    capacity: entries a tracker may be behind; later ones are dropped, counted and reported once.
    hang_after_s: a tracker that spends longer in one call is switched off. Its thread is left behind, because a thread
    cannot be stopped.
    print_line: receives warnings; called from the thread of a tracker or of the caller.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        capacity: int = 1000,
        hang_after_s: float = 120.0,
        print_line: PrintLine = print_to_stderr,
    ) -> None:
        self._lanes = [_Lane(tracker, capacity, hang_after_s, print_line) for tracker in trackers]

    def start(self, info: RunInfo) -> None:
        """Start every tracker on its own thread and return at once."""
        for lane in self._lanes:
            lane.begin(lambda tracker: tracker.start(info))

    # Each call below copies twice: once here, because the caller goes on to change its mapping, and once for each
    # tracker, because one may change what another has yet to receive.

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue the metrics of a step."""
        copy = dict(metrics)
        self._offer(lambda tracker: tracker.log(step, dict(copy)))

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Queue answers of the model."""
        copy = [dict(row) for row in rows]
        self._offer(lambda tracker: tracker.samples(step, [dict(row) for row in copy]))

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Queue histograms of gradients or weights."""
        copy = dict(histograms)
        self._offer(lambda tracker: tracker.histograms(step, dict(copy)))

    def finish(self, state: str, timeout_s: float = 30.0) -> list[LaneReport]:
        """Let every tracker write its pending entries and end; wait at most `timeout_s` seconds for all together."""
        deadline = time.monotonic() + timeout_s

        def last_call(tracker: Tracker) -> None:
            tracker.finish(state)

        for lane in self._lanes:  # all of them first, so that they finish side by side
            lane.queue_last(last_call, wait_s=0)
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
        # A daemon, because a tracker that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._busy_since: float | None = None
        self._failure: str | None = None
        self._dropped = 0
        self._last_is_queued = False

    def begin(self, call: Call) -> None:
        """Start the thread with its first call."""
        self._calls.put_nowait((call, False))
        self._thread.start()

    def offer(self, call: Call) -> None:
        """Queue a call without waiting; count it as dropped where the queue is full or the tracker switched off."""
        if self._failure is None and self._is_hanging():
            self._switch_off(f"did not come back within {self._hang_after_s:g} s")
        if self._failure is not None:
            self._dropped += 1
            return
        try:
            self._calls.put_nowait((call, False))
        except queue.Full:
            self._dropped += 1
            # Once: a line for each dropped entry would fill the screen.
            if self._dropped == 1:
                self._print_line(f"tracker {self._tracker.name} is too slow: entries it has no room for are dropped")

    def queue_last(self, call: Call, wait_s: float) -> None:
        """Queue the last call, once; wait at most `wait_s` seconds for room."""
        if self._last_is_queued or self._failure is not None:
            return
        try:
            self._calls.put((call, True), timeout=wait_s) if wait_s else self._calls.put_nowait((call, True))
        except queue.Full:
            return
        self._last_is_queued = True

    def wait(self, call: Call, deadline: float, timeout_s: float) -> LaneReport:
        """Wait for the thread until `deadline` (seconds of the monotonic clock) and return the outcome."""
        if self._failure is None and self._thread.ident is not None:
            # A full queue had no room for the last call before; the thread may have made some by now.
            self.queue_last(call, wait_s=max(deadline - time.monotonic(), 0.01))
            self._thread.join(timeout=max(deadline - time.monotonic(), 0.01))
            if self._thread.is_alive() and self._failure is None:
                self._switch_off(f"did not finish within {timeout_s:g} s")
        if self._dropped:
            self._print_line(f"tracker {self._tracker.name} never saw {self._dropped} entries")
        return LaneReport(self._tracker.name, self._dropped, self._failure)

    def _is_hanging(self) -> bool:
        since = self._busy_since  # read once: the thread may set it to None in between
        return since is not None and time.monotonic() - since > self._hang_after_s

    def _switch_off(self, reason: str) -> None:
        self._failure = reason
        self._print_line(f"tracker {self._tracker.name} is switched off: it {reason}; the run goes on without it")

    def _work(self) -> None:
        is_last = False
        while not is_last and self._failure is None:
            call, is_last = self._calls.get()
            self._busy_since = time.monotonic()
            try:
                call(self._tracker)
            except BaseException as error:  # noqa: BLE001 - no exception of a tracker, not even SystemExit, ends the run
                if self._failure is None:
                    self._switch_off(f"failed with {type(error).__name__}: {in_one_line(error)}")
            self._busy_since = None


@dataclasses.dataclass(frozen=True)
class TrackerKind:
    """One row of `TRACKERS`."""

    make: Callable[[TrackingConfig], Tracker | None]
    """Returns the tracker; None for the run's record, which is not behind the queue (see `jsonl`)."""
    package: str | None = None
    """The package that must be installed."""
    requirement: str | None = None
    """What pip is given to install it."""


def choose_trackers(
    config: TrackingConfig, *, explicit: bool, environ: Mapping[str, str] = os.environ
) -> tuple[list[Tracker], list[Decision]]:
    """Return the trackers behind the queue, and the decisions made for the user.

    explicit: whether the user set `tracking.trackers`. A tracker that is not installed is then refused; otherwise it is
    left out, with a decision. Raises ConfigError for every name that is no tracker, MachineError for every tracker that
    is requested and not installed.
    """
    unknown = [name for name in config.trackers if name not in TRACKERS]
    if unknown:
        known = ", ".join(TRACKERS)
        raise ConfigError.all(
            Problem(f"unknown tracker `{name}`", "tracking.trackers", f"use one of {known}") for name in unknown
        )
    missing = [name for name in dict.fromkeys(config.trackers) if not _is_installed(TRACKERS[name])]
    if missing and explicit:
        raise MachineError.all(
            Problem(f"tracker `{name}` is not installed", "tracking.trackers", _how_to_install(name))
            for name in missing
        )
    decisions = [
        Decision("tracking.trackers", f"without {name}", f"it is not installed; {_how_to_install(name)}")
        for name in missing
    ]
    config, project = _with_project(config, environ)
    names = [name for name in dict.fromkeys(config.trackers) if name not in missing]
    trackers = [TRACKERS[name].make(config) for name in names]
    return [tracker for tracker in trackers if tracker is not None], decisions + (project if "wandb" in names else [])


def keeps_record(config: TrackingConfig) -> bool:
    """Return whether the run writes metrics.jsonl."""
    return "jsonl" in config.trackers


def _is_installed(kind: TrackerKind) -> bool:
    return kind.package is None or importlib.util.find_spec(kind.package) is not None


def _how_to_install(name: str) -> str:
    return f"pip install {TRACKERS[name].requirement}"


def _with_project(config: TrackingConfig, environ: Mapping[str, str]) -> tuple[TrackingConfig, list[Decision]]:
    project = environ.get("WANDB_PROJECT")
    if not project or config.project != TrackingConfig().project or project == config.project:
        return config, []
    reason = "WANDB_PROJECT is set and the config names no project"
    return dataclasses.replace(config, project=project), [Decision("tracking.project", project, reason)]


TRACKERS: dict[str, TrackerKind] = {
    "console": TrackerKind(lambda _: ConsoleTracker()),
    "jsonl": TrackerKind(lambda _: None),
    "system": TrackerKind(lambda _: SystemTracker()),
    "tensorboard": TrackerKind(
        lambda _: TensorBoardTracker(), package="tensorboard", requirement="'llmtune[tensorboard]'"
    ),
    "wandb": TrackerKind(
        lambda config: WandbTracker(
            config.project,
            tags=config.tags,
            mode=config.wandb_mode,
            entity=config.wandb_entity,
            group=config.wandb_group,
        ),
        package="wandb",
        requirement="wandb",
    ),
    "mlflow": TrackerKind(
        lambda config: MlflowTracker(config.project, tags=config.tags),
        package="mlflow",
        requirement="mlflow",
    ),
    "trackio": TrackerKind(lambda config: TrackioTracker(config.project), package="trackio", requirement="trackio"),
}
"""By name in `tracking.trackers`. A new tracker is one row here."""
