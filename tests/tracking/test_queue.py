"""P11: trackers may be slow, dead, full or lying; they never stop, slow or change the run."""

import threading
import time
from pathlib import Path

import pytest

from llmtune.tracking import RunInfo, TrackerQueue

INFO = RunInfo(name="a-run", folder=Path("nowhere"), total_steps=100)


class Listener:
    """A tracker that writes down what it hears."""

    name = "listener"

    def __init__(self):
        self.heard = []

    def start(self, info):
        self.heard.append(("start", info.name))

    def log(self, step, metrics):
        self.heard.append(("log", step, metrics))

    def samples(self, step, rows):
        self.heard.append(("samples", step, rows))

    def histograms(self, step, histograms):
        self.heard.append(("histograms", step))

    def finish(self, state):
        self.heard.append(("finish", state))


class Raiser(Listener):
    name = "raiser"

    def __init__(self, method, error):
        super().__init__()
        self.method, self.error = method, error

    def start(self, info):
        super().start(info)
        self._maybe("start")

    def log(self, step, metrics):
        super().log(step, metrics)
        self._maybe("log")

    def finish(self, state):
        super().finish(state)
        self._maybe("finish")

    def _maybe(self, method):
        if method == self.method:
            raise self.error


class Hanger(Listener):
    name = "hanger"

    def __init__(self, method):
        super().__init__()
        self.method, self.let_go = method, threading.Event()

    def start(self, info):
        if self.method == "start":
            self.let_go.wait(30)

    def log(self, step, metrics):
        super().log(step, metrics)
        if self.method == "log":
            self.let_go.wait(30)

    def finish(self, state):
        if self.method == "finish":
            self.let_go.wait(30)


class Sleeper(Listener):
    name = "sleeper"

    def log(self, step, metrics):
        time.sleep(0.02)
        super().log(step, metrics)


def drive(trackers, steps=20, **options):
    """Run a training of nothing but tracker calls; return what was said, the reports, and the longest single call in
    seconds.
    """
    said = []
    tracked = TrackerQueue(trackers, print_line=said.append, **options)
    tracked.start(INFO)
    longest = 0.0
    for step in range(1, steps + 1):
        before = time.perf_counter()
        tracked.log(step, {"train_mean_nll": 1.0 / step})
        longest = max(longest, time.perf_counter() - before)
    reports = tracked.finish("finished", timeout_s=1.0)
    return said, reports, longest


def test_a_tracker_hears_everything_in_order():
    listener = Listener()
    said, reports, _ = drive([listener])
    assert [entry[0] for entry in listener.heard] == ["start"] + ["log"] * 20 + ["finish"]
    assert [entry[1] for entry in listener.heard[1:-1]] == list(range(1, 21))
    assert said == []
    assert reports[0].dropped == 0


@pytest.mark.parametrize("method", ["start", "log", "finish"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("server\nsaid no"), SystemExit(3), KeyboardInterrupt(), OSError(28, "No space left on device")],
)
def test_a_tracker_that_raises_is_switched_off_with_one_line_and_the_others_go_on(method, error):
    listener = Listener()
    said, reports, _ = drive([Raiser(method, error), listener])
    assert len(listener.heard) == 22
    off = [line for line in said if "switched off" in line]
    assert len(off) == 1
    assert "raiser" in off[0]
    assert type(error).__name__ in off[0]
    assert "\n" not in off[0]
    assert reports[0].failure is not None
    assert reports[1].failure is None


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_hangs_neither_blocks_a_step_nor_the_end_nor_the_others(method):
    hanger, listener = Hanger(method), Listener()
    before = time.perf_counter()
    said, reports, longest = drive([hanger, listener], capacity=5000)
    took = time.perf_counter() - before
    hanger.let_go.set()
    assert len(listener.heard) == 22
    assert longest < 0.5
    assert took < 5
    assert [line for line in said if "switched off" in line and "hanger" in line]
    assert reports[0].failure is not None


def test_a_hanging_tracker_is_found_out_during_the_run():
    hanger, said = Hanger("log"), []
    tracked = TrackerQueue([hanger], print_line=said.append, hang_after_s=0.05)
    tracked.start(INFO)
    tracked.log(1, {})
    time.sleep(0.2)
    tracked.log(2, {})
    assert said == ["tracker hanger is switched off: it did not come back within 0.05 s; the run goes on without it"]
    hanger.let_go.set()
    assert tracked.finish("finished", timeout_s=1)[0].dropped == 1


def test_what_a_slow_tracker_has_no_room_for_is_dropped_counted_and_said_once():
    sleeper = Sleeper()
    said, reports, longest = drive([sleeper], steps=50, capacity=5)
    assert longest < 0.5
    assert reports[0].dropped > 0
    assert len([entry for entry in sleeper.heard if entry[0] == "log"]) == 50 - reports[0].dropped
    assert len([line for line in said if "too slow" in line]) == 1
    assert said[-1] == f"tracker sleeper never saw {reports[0].dropped} entries"


def test_a_tracker_cannot_change_the_metrics_of_the_run():
    class Vandal(Listener):
        def log(self, step, metrics):
            metrics.clear()

    metrics, listener = {"train_mean_nll": 1.0}, Listener()
    tracked = TrackerQueue([Vandal(), listener])
    tracked.start(INFO)
    tracked.log(1, metrics)
    tracked.finish("finished")
    assert metrics == {"train_mean_nll": 1.0}
    assert listener.heard[1] == ("log", 1, {"train_mean_nll": 1.0})


def test_three_trackers_cost_a_step_less_than_one_percent_of_fifty_milliseconds():
    tracked = TrackerQueue([Listener(), Listener(), Listener()], capacity=20_000)
    tracked.start(INFO)
    metrics = {f"metric_{number}": float(number) for number in range(13)}
    before = time.perf_counter()
    for step in range(5000):
        tracked.log(step, metrics)
    per_step = (time.perf_counter() - before) / 5000
    tracked.finish("finished")
    assert per_step < 500e-6  # 1 % of 50 ms, a step of the smallest model
