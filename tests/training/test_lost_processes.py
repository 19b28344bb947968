"""P12: a process that dies, a machine that vanishes and a process that hangs end the others with exit code 8."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from llmtune import durable
from llmtune.cli.main import run as command
from llmtune.engine import rank_messages, rank_watch
from llmtune.engine.devices import Devices
from llmtune.training import train
from rank_helpers import (
    LONG,
    TwoMachines,
    TwoRanks,
    end_of,
    environment,
    needs_namespaces,
    places,
    processes_of,
    recorded,
    wait_for_lines,
)
from training_helpers import Forked, lines_of, small_run, weights_of

SLOW_SAVE = """
import sys, time
from llmtune import durable
from llmtune.cli.main import main

class SlowDisk(durable.SystemBackend):
    def call(self, operation, *arguments):
        global slow
        if operation == "fsync":
            time.sleep(slow)
            slow = 0
        return super().call(operation, *arguments)

slow = 0
saved = durable.write_tensors
def write_tensors(*given, **named):
    global slow
    slow = 8
    return saved(*given, **named)

durable.write_tensors = write_tensors
with durable.use_backend(SlowDisk()):
    main()
"""


@pytest.fixture(scope="module")
def words(tiny_model_folder, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    given = small_run(tiny_model_folder, rows_file, folder, "training.max_steps=40", "checkpoint.every_steps=1000")
    return folder, given


def start(words, name, *more, steps=4, **how):
    folder, given = words
    both = TwoRanks("train", *given, f"run.name={name}", *more, **how)
    try:
        wait_for_lines(folder / name, steps)
    except BaseException:
        for process in both.processes:
            process.kill()
        print(both.end())
        raise
    return both


def left_alone(both, gone, within_s):
    """What the survivor said, which must end within this time, and when; the other one is killed then."""
    survivor = both.processes[1 - gone]
    began = time.monotonic()
    try:
        said = survivor.communicate(timeout=within_s + 20)[0]
        took = time.monotonic() - began
    finally:
        both.processes[gone].kill()
        both.processes[gone].communicate()
    assert survivor.returncode == 8, said
    assert took < within_s, said
    assert said.count("error: ") == 1, said
    return said, took


def test_p12_a_killed_process_ends_the_other_within_ten_seconds(words):
    both = start(words, "killed", LONG)
    both.processes[0].kill()
    said, _ = left_alone(both, 0, 10)
    assert f"process 0 ({socket.gethostname()}) died: its connection was closed" in said


def test_p8_a_signal_ends_a_process_that_waits_for_the_others(words):
    """It waits in C++, which runs no handler of Python until the others come."""
    _, given = words
    place = places()[0]
    alone = Forked(lambda: command(["train", *given, "run.name=alone"]), environ=environment(**place))
    began = time.monotonic()
    while True:  # the main process listens where they meet
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(place["MASTER_PORT"]))).close()
            break
        assert alone.poll() is None
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(alone.pid, signal.SIGTERM)
    began = time.monotonic()
    codes, said = end_of([alone])
    assert codes == [143], said
    assert time.monotonic() - began < 10
    assert said[0].count("stopped by SIGTERM: there was nothing to save") == 1, said


def in_two_that_prepare(words, name, late, pause, *more):
    """Train in two processes, of which one calls `pause` before it reads its rows: exit codes and what each printed."""
    prepare = train.prepare

    def prepare_late(*given, **named):
        if os.environ["RANK"] == str(late):
            pause()
        return prepare(*given, **named)

    def in_one():
        train.prepare = prepare_late
        rank_messages.LONGEST_SILENT_WAIT_S = 1
        return command(["train", *words[1], f"run.name={name}", "training.max_steps=2", *more])

    return [Forked(in_one, environ=environment(**place)) for place in places()]


@pytest.mark.parametrize("late", [0, 1])
def test_p12_a_process_that_starts_later_than_the_time_out_is_waited_for(words, late):
    """Each machine reads and tokenizes its rows in its own time."""
    codes, said = end_of(
        in_two_that_prepare(words, f"late-{late}", late, partial(time.sleep, 6.0), "distributed.timeout_s=3")
    )
    assert codes == [0, 0], said
    assert said[0].count("waiting for process 1, which is still at work") == late


@pytest.mark.parametrize("gone", [0, 1])
def test_p12_a_process_that_dies_while_it_starts_is_noticed_within_ten_seconds(words, gone):
    """The other one waits for its facts, or for its verdict, in a store that says nothing of the dead."""

    def die():
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    both = in_two_that_prepare(words, f"dies-{gone}", gone, die, "distributed.timeout_s=60")
    codes, said = end_of(both)
    assert (codes[gone], codes[1 - gone]) == (-signal.SIGKILL, 8), said
    assert time.monotonic() - began < 15
    assert f"process {gone} ({socket.gethostname()}) died: its connection was closed" in said[1 - gone]


@pytest.mark.campaign
@pytest.mark.parametrize("late", [0, 1])
def test_p12_a_process_that_is_stopped_while_it_starts_is_lost(words, late):
    both = in_two_that_prepare(
        words, f"stopped-{late}", late, lambda: os.kill(os.getpid(), signal.SIGSTOP), "distributed.timeout_s=3"
    )
    began = time.monotonic()
    said = both[1 - late].communicate(60)[0]
    both[late].kill()
    both[late].wait()
    assert both[1 - late].returncode == 8, said
    assert time.monotonic() - began < 20
    assert f"process {late} ({socket.gethostname()}) stopped answering" in said


def test_p12_a_save_is_written_to_its_end_when_another_process_dies(words):
    """What it writes is what the run goes on from; it takes longer than a process has to leave by itself."""
    write, folder = durable.write_tensors, words[0] / "outlived"

    def write_slowly(*given, **named):
        if given[0].name == "optimizer.safetensors":  # of a checkpoint
            (folder / "saving").touch()
            time.sleep(rank_watch.LEAVE_S + 2)
        return write(*given, **named)

    def in_one():
        durable.write_tensors = write_slowly
        return command(["train", *words[1], "run.name=outlived", LONG, "checkpoint.every_steps=2"])

    both = [Forked(in_one, environ=environment(**place)) for place in places()]
    deadline = time.monotonic() + 60
    while not (folder / "saving").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    both[1].kill()
    codes, said = end_of(both)
    assert codes == [8, -signal.SIGKILL], said
    assert (folder / "checkpoints" / "step-000002").is_dir(), said
    assert command(["verify", "checkpoint", str(folder)]) == 0


@pytest.mark.campaign
@pytest.mark.parametrize("late", [0, 1])
def test_p12_a_process_that_never_ends_its_step_is_lost_though_it_answers(words, late):
    sync, calls = Devices.sync_gradients, []

    def sync_late(*given):
        calls.append(given)
        if os.environ["RANK"] == str(late) and len(calls) == 3:
            time.sleep(100)
        sync(*given)

    def in_one():
        Devices.sync_gradients = sync_late
        return command(["train", *words[1], f"run.name=endless-{late}", LONG, "distributed.timeout_s=3"])

    began = time.monotonic()
    codes, said = end_of([Forked(in_one, environ=environment(**place)) for place in places()])
    assert codes == [8, 8], said
    assert time.monotonic() - began < 30
    both = "".join(said)
    assert both.count("error: ") == both.count(f"process {late} ({socket.gethostname()}) answers, and does not go on")
    assert both.count("error: ") == 1, said


FIRST_ALONE = ("sh", "-c", 'test "$RANK" = 0 && exec "$@"; exec sleep 60', "sh")
"""Of the processes that a launcher starts the first is the command, and the others never come."""


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "while it waits"])
def test_p8_a_launcher_that_dies_before_the_processes_have_met_leaves_none(words, number, waits):
    _, given = words
    name = f"orphan-{number}-{waits}"
    train = [sys.executable, "-m", "llmtune", "train", *given, f"run.name={name}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", *FIRST_ALONE]
    process = subprocess.Popen(
        [*launcher, *train], env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        began = time.monotonic()
        while "0" not in (found := processes_of(name)):
            assert process.poll() is None
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        first = psutil.Process(found["0"])
        idle = 0
        while waits and idle < 8:  # it takes no processor time once it waits
            assert time.monotonic() - began < 100
            before = sum(first.cpu_times()[:2])
            time.sleep(0.25)
            idle = idle + 1 if sum(first.cpu_times()[:2]) == before else 0
        process.send_signal(number)
        psutil.wait_procs([first], timeout=40)  # it imports the libraries first
        assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    finally:
        process.kill()
        process.wait()
        for left in processes_of(name).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


@pytest.mark.campaign
def test_p12_a_save_longer_than_the_time_out_ends_nobody(words):
    _, given = words
    both = TwoRanks(
        "train", *given, "run.name=slow", "distributed.timeout_s=3", "checkpoint.every_steps=20",
        "evaluation.every_steps=20", program=("-c", SLOW_SAVE),
    )  # fmt: skip
    began = time.monotonic()
    codes, said = both.end()
    assert codes == [0, 0], said
    assert time.monotonic() - began > 16
    assert command(["train", *given, "run.name=fast"]) == 0


@pytest.mark.campaign
@pytest.mark.parametrize("where", ["in a save", "in a step"])
def test_p12_a_process_that_hangs_in_a_save_is_named_too(words, where):
    folder, given = words
    program = ("-c", SLOW_SAVE) if where == "in a save" else ("-m", "llmtune")
    both = TwoRanks(
        "train", *given, f"run.name={where}", LONG, "distributed.timeout_s=3", "checkpoint.every_steps=20",
        program=program,
    )  # fmt: skip
    wait_for_lines(folder / where, 20)
    time.sleep(1)
    both.processes[0].send_signal(signal.SIGSTOP)
    assert "process 0" in left_alone(both, 0, 3 + 6)[0]


STEPS = ("training.max_steps=400", "checkpoint.every_steps=20", "distributed.timeout_s=6")


@pytest.fixture(scope="module")
def whole(words):
    """A run from which nobody was taken."""
    folder, given = words
    codes, said = TwoRanks("train", *given, *STEPS, "run.name=whole").end()
    assert codes == [0, 0], said
    return folder / "whole"


def goes_on(run, whole, resume, how, took):
    """The same processes, started again, finish to the same bytes."""
    step = max(line["step"] for line in lines_of(run))
    codes, said = resume("resume", str(run)).end()
    assert codes == [0, 0], said
    assert weights_of(run) == weights_of(whole)
    assert lines_of(run) == lines_of(whole)
    recorded(death=how, step=step, code=8, seconds=round(took, 2))


@pytest.mark.campaign
@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize(
    ("how", "number", "within_s", "text"),
    [
        ("killed", signal.SIGKILL, 10, "died: its connection was closed"),
        ("stopped", signal.SIGSTOP, 6 + 6, "stopped answering"),
    ],
)
def test_p12_after_a_process_is_lost_the_run_goes_on_to_the_same_bytes(words, whole, how, number, within_s, text, gone):
    name = f"{how}-{gone}"
    both = start(words, name, *STEPS, steps=45)
    both.processes[gone].send_signal(number)
    said, took = left_alone(both, gone, within_s)
    assert f"process {gone} ({socket.gethostname()}) {text}" in said
    goes_on(words[0] / name, whole, TwoRanks, name, took)


@pytest.mark.campaign
@needs_namespaces
@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("how", ["cut off", "switched off"])
def test_p12_a_machine_that_vanishes_is_noticed_within_ten_seconds_and_the_run_goes_on_to_the_same_bytes(
    words, whole, how, gone
):
    """The cable is pulled, so that nobody is told; of a machine that is switched off, the process is gone too."""
    folder, given = words
    run, host, is_on = folder / f"{how}-{gone}", socket.gethostname(), how == "cut off"
    with TwoMachines() as machines:
        both = machines.start("train", *given, *STEPS, "distributed.timeout_s=60", f"run.name={run.name}")
        wait_for_lines(run, 45)
        machines.cut(gone)
        if not is_on:
            both.processes[gone].kill()
        began = time.monotonic()
        codes, said = both.end()
        took = time.monotonic() - began
    left = (0, 1) if is_on else (1 - gone,)
    assert [codes[rank] for rank in left] == [8] * len(left), said
    assert took < 10 + 2.5, (took, said)  # noticed within ten seconds, and a moment to end by itself
    for rank in left:
        assert f"the machine of process {1 - rank} ({host}) no longer answers" in said[rank]
    with TwoMachines() as machines:
        goes_on(run, whole, machines.start, run.name, took)
