"""P12: a process that dies, a machine that vanishes and a process that hangs end the others with exit code 8."""

import signal
import socket
import time

import pytest

from llmtune.cli.main import run as command
from rank_helpers import LONG, TwoMachines, TwoRanks, needs_namespaces, wait_for_lines
from training_helpers import small_run

SLOW_SAVE = """
import sys, time
from llmtune import durable
from llmtune.cli.main import main

class SlowDisk(durable.SystemBackend):
    def fsync(self, *given, **named):
        global slow
        time.sleep(slow)
        slow = 0
        return super().fsync(*given, **named)

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


def start(words, name, *more, **how):
    folder, given = words
    both = TwoRanks("train", *given, f"run.name={name}", *more, **how)
    try:
        wait_for_lines(folder / name, 4)
    except BaseException:
        for process in both.processes:
            process.kill()
        print(both.end())
        raise
    return both


def left_alone(both, gone, within_s):
    """What the survivor said, which must end within this time; the other one is killed then."""
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
    return said


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.campaign)])
def test_p12_a_killed_process_ends_the_other_within_ten_seconds(words, killed):
    both = start(words, f"killed-{killed}", LONG)
    both.processes[killed].kill()
    said = left_alone(both, killed, 10)
    assert f"process {killed} ({socket.gethostname()}) died: its connection was closed" in said


@pytest.mark.campaign
@pytest.mark.parametrize("stopped", [0, 1])
def test_p12_a_process_that_hangs_is_named_after_the_time_out(words, stopped):
    both = start(words, f"stopped-{stopped}", LONG, "distributed.timeout_s=6")
    both.processes[stopped].send_signal(signal.SIGSTOP)
    said = left_alone(both, stopped, 6 + 6)
    assert f"process {stopped} ({socket.gethostname()}) stopped answering" in said


@pytest.mark.campaign
def test_p12_a_save_longer_than_the_time_out_ends_nobody(words):
    _, given = words
    both = TwoRanks(
        "train", *given, "run.name=slow", "distributed.timeout_s=3", "checkpoint.every_steps=20",
        program=("-c", SLOW_SAVE),
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
    assert "process 0" in left_alone(both, 0, 3 + 6)


@pytest.mark.campaign
@needs_namespaces
def test_p12_a_machine_that_vanishes_is_noticed_within_ten_seconds_on_both_sides_and_the_run_goes_on(words):
    folder, given = words
    with TwoMachines() as machines:
        both = machines.start("train", *given, "run.name=cut", LONG)
        wait_for_lines(folder / "cut", 10)
        machines.cut()
        began = time.monotonic()
        codes, said = both.end()
        took = time.monotonic() - began
    assert codes == [8, 8], said
    assert took < 10 + 2.5, (took, said)  # noticed within ten seconds, and a moment to end by itself
    host = socket.gethostname()
    for rank in range(2):
        assert f"the machine of process {1 - rank} ({host}) no longer answers" in said[rank]
    with TwoMachines() as machines:
        codes, said = machines.start("resume", str(folder / "cut"), "training.max_steps=40", "--allow-changes").end()
        assert codes == [0, 0], said
