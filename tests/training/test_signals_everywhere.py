"""P8: a signal in every phase of a run, a terminal or a pipe that closes, two signals, ten signals; then `resume` ends
as if nothing was.

Each run is a forked child that sends itself the signal when it enters a phase.
"""

import contextlib
import errno
import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from types import ModuleType

import peft  # noqa: F401 - once here, not in every child
import pytest
import transformers.models.llama.modeling_llama  # noqa: F401

from disk_faults import Unsynced
from fault_helpers import in_memory, litter_in, undisturbed
from llmtune import durable
from llmtune.cli.launch import launch
from llmtune.config.layers import load_config
from llmtune.errors import StoppedBySignal
from llmtune.runs.run_file import read_run_file
from llmtune.runs.signals import SIGNALS, deferred_signals, signals_as_errors
from llmtune.training import train as training
from llmtune.verify.subprocesses import run_forked
from phase_signals import sending
from training_helpers import difference, line_count, small_run

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

BEFORE_THE_RUN = ("data", "loading", "creating")
SAVED = ("training", "evaluation", "generation", "saving", "retention")


class Place:
    def __init__(self, folder, model, rows):
        self.folder = folder
        self.given = small_run(
            model,
            rows,
            folder,
            "training.max_steps=5",
            "training.gradient_accumulation_steps=2",
            "checkpoint.every_steps=2",
            "checkpoint.keep_last=1",
            "evaluation.prompts=[the user asks]",
            "evaluation.max_new_tokens=2",
        )
        undisturbed(lambda: self.train("whole"))

    def train(self, name):
        training.train(load_config(None, overrides=[*self.given, f"run.name={name}"], environ={}))

    def stopped(self, name, phase, signals, *, story=None, **when):
        """Run the story (a training) in a child that sends itself signals in a phase; returns how it ended."""

        def run():
            with durable.use_backend(Unsynced()):
                (story or (lambda: self.train(name)))()

        return run_forked(sending(run, phase, signals, **when))

    def assert_resumes(self, name):
        run = self.folder / name
        undisturbed(lambda: training.resume(str(run)))
        self.assert_whole(name)

    def assert_whole(self, name):
        run = self.folder / name
        assert difference(self.folder / "whole", run) == ""
        assert litter_in(self.folder) == []
        assert read_run_file(run)["state"] == "finished"
        shutil.rmtree(run)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_folder, rows_file):
    with in_memory(tmp_path_factory.mktemp("place")) as folder:
        yield Place(folder, tiny_model_folder, rows_file)


@pytest.mark.parametrize("phase", BEFORE_THE_RUN)
def test_p8_a_signal_before_the_run_exists_leaves_nothing(place, phase):
    end = place.stopped("early", phase, [signal.SIGTERM])
    assert end.code == 128 + signal.SIGTERM, end
    assert "stopped by SIGTERM: there was nothing to save yet" in end.error
    assert sorted(one.name for one in place.folder.iterdir()) == ["whole"]


@pytest.mark.parametrize("phase", SAVED)
def test_p8_a_signal_in_a_phase_is_answered_after_the_step_and_saved(place, phase):
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)[SAVED.index(phase) % 4]
    end = place.stopped("stopped", phase, [number])
    assert end.code == 128 + number, end
    assert f"stopped by {number.name}: saved after step" in end.error
    info = read_run_file(place.folder / "stopped")
    assert info["state"] == "stopped"
    assert (place.folder / "stopped" / "checkpoints" / f"step-{info['step']:06d}").is_dir()
    place.assert_resumes("stopped")


def test_p8_a_signal_in_the_middle_of_an_accumulation_is_answered_after_its_step(place):
    """After the first of the two micro-batches of the second step: gradients are half there, and nothing of them is
    saved.
    """

    def train():
        import torch

        backward, calls = torch.Tensor.backward, []

        def counted(loss):
            backward(loss)
            if sys._getframe(1).f_code.co_name != "train_steps":  # the plan computes gradients too
                return
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        torch.Tensor.backward = counted
        place.train("middle")

    end = place.stopped("middle", None, [], story=train)
    assert end.code == 128 + signal.SIGTERM, end
    assert "saved after step 2" in end.error
    place.assert_resumes("middle")


class NoCheckpoints(Unsynced):
    """A disk that takes everything but checkpoints."""

    def call(self, operation, *arguments):
        if operation == "open" and "checkpoints/" in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().call(operation, *arguments)


def test_p7_p8_a_signal_before_a_save_that_fails_does_not_claim_that_it_is_saved(place):
    def train():
        with durable.use_backend(NoCheckpoints()):
            place.train("full-disk")

    end = place.stopped("full-disk", "training", [signal.SIGTERM], story=train)
    assert end.code == 128 + signal.SIGTERM, end
    assert "stopped by SIGTERM: nothing could be saved after step" in end.error
    assert list((place.folder / "full-disk" / "checkpoints").glob("step-*")) == []
    shutil.rmtree(place.folder / "full-disk")


def test_p8_a_signal_while_the_finished_run_is_put_away_changes_nothing(place):
    end = place.stopped("late", "finishing", [signal.SIGTERM])
    assert end.code == 0, end
    place.assert_whole("late")


def test_p8_a_signal_while_resuming_leaves_the_run_as_it_was(place):
    assert place.stopped("again", "saving", [signal.SIGTERM]).code == 143
    before = sorted(one.name for one in (place.folder / "again" / "checkpoints").iterdir())
    run = place.folder / "again"
    end = place.stopped("again", "resuming", [signal.SIGTERM], nth=2, story=lambda: training.resume(str(run)))
    assert end.code == 143, end
    assert sorted(one.name for one in (place.folder / "again" / "checkpoints").iterdir()) == before
    place.assert_resumes("again")


def test_p8_ten_signals_at_once_are_one_request(place):
    end = place.stopped("ten", "evaluation", [signal.SIGTERM] * 10)
    assert end.code == 143, end
    assert "saved after step" in end.error
    place.assert_resumes("ten")


def test_p8_a_second_signal_leaves_in_the_middle_of_a_save_and_nothing_is_half_committed(place):
    end = place.stopped("twice", "retention", [signal.SIGTERM, signal.SIGINT], nth=2, pause_s=0.3)
    assert end.code == 128 + signal.SIGINT, end
    run = place.folder / "twice"
    steps = sorted((run / "checkpoints").glob("step-??????"))
    assert steps
    assert [durable.verify_manifest(step) for step in steps] == [[]] * len(steps)
    place.assert_resumes("twice")


# --- through the real command
# -------------------------------------------------------------------------------------------------------------


def command(place, name, *more):
    return [sys.executable, "-m", "llmtune", "train", *place.given, f"run.name={name}", *more]


def wait_for(condition, process, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.01)


def test_p8_a_closed_terminal_stops_the_run_saved(place):
    """The terminal goes away: SIGHUP, and from then on every write to it fails."""
    ours, theirs = pty.openpty()

    def own_the_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    words = command(
        place, "terminal", "tracking.trackers=[console,jsonl]", "training.max_steps=5000", "training.epochs=5000"
    )
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_the_terminal)
    os.close(theirs)
    run = place.folder / "terminal"
    os.set_blocking(ours, False)

    def has_trained():
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 65536)
        return line_count(run / "metrics.jsonl") >= 3

    wait_for(has_trained, process)
    os.close(ours)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    info = json.loads((run / "run.json").read_text())
    assert info["state"] == "stopped"
    assert (run / "checkpoints" / f"step-{info['step']:06d}" / "manifest.json").is_file()
    shutil.rmtree(run)


def test_p8_a_closed_pipe_costs_the_talk_and_never_the_run(place):
    """`llmtune train ... 2>&1 | head -1`: the reader goes away after the first line."""
    process = subprocess.Popen(command(place, "pipe"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) in (0, 128 + signal.SIGPIPE)
    place.assert_whole("pipe")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.campaign)])
def test_p8_a_signal_while_the_libraries_are_imported_ends_the_command_in_one_line(place, number):
    words = [sys.executable, "-X", "importtime", *command(place, "import")[1:]]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with process:
        said = []
        for line in process.stderr:
            if "import time:" not in line:
                said.append(line)
            elif "torch.nn" in line:
                process.send_signal(number)
                break
        rest = list(process.stderr)
        said += [line for line in rest if "import time:" not in line]
        assert process.wait(timeout=60) == 128 + number
    assert "Traceback" not in "".join(said)
    assert "stopped" in "".join(said)
    assert any(" transformers.cache_utils\n" in line for line in rest), (
        "torch's own start was cut short, and may abort the process"
    )
    assert not (place.folder / "import").exists()


def test_p8_a_signal_that_is_held_back_acts_when_the_body_has_ended():
    """An exception in the middle of torch's own start aborts the process: seen once in a dozen suites.

    Beside a thread that lets every signal through, as numpy's do: the system gives it what the main thread masks.
    """
    seen = []
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()

    def body():
        with signals_as_errors(), deferred_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append("went on")
            os.kill(os.getpid(), signal.SIGUSR1)  # one of them acts: the first
            time.sleep(0.01)
            seen.append("to the end")

    before = [signal.getsignal(one) for one in SIGNALS]
    try:
        with pytest.raises(StoppedBySignal, match="SIGTERM"):
            body()
    finally:
        over.set()
        other.join()
    assert seen == ["went on", "to the end"]
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_p8_what_is_ignored_stays_ignored_while_signals_are_held_back():
    """`nohup llmtune train ...`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_p8_another_thread_than_the_main_one_holds_nothing_back():
    """Python lets it install no handler, and handles none there."""
    seen = []

    def body():
        with deferred_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    other = threading.Thread(target=body)
    other.start()
    other.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


class Swallows(ModuleType):
    """A module in whose import Ctrl-C comes and is lost: seen in those of torch, in two of 200 starts of `torchrun`."""

    def __getattr__(self, name):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return lambda *_args, **_named: pytest.fail("processes were started")


def test_p8_ctrl_c_in_the_imports_of_the_launcher_is_not_lost(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.launcher.api", Swallows("api"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(KeyboardInterrupt):
        launch(2, ["train"])
