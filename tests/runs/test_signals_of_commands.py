"""P8 outside a training: a command that is asked to end clears away what it began, says one line, and exits with 128 +
the signal.
"""

import contextlib
import os
import signal
import threading

import pytest

from llmtune import durable
from llmtune.errors import StoppedBySignal
from llmtune.runs.signals import SIGNALS, StopRequest, signals_as_errors

ENDING = [one for one in SIGNALS if one != signal.SIGINT]


def fill(folder, number):
    with signals_as_errors(), durable.commit_folder(folder / "result") as staging:
        (staging / "half").write_text("of it")
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ENDING)
def test_p8_a_signal_in_the_middle_of_a_result_leaves_nothing_of_it(number, tmp_path):
    with pytest.raises(StoppedBySignal, match=f"stopped by {number.name}: there was nothing to save") as caught:
        fill(tmp_path, number)
    assert caught.value.exit_code == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_the_handlers_that_were_there_come_back_and_outside_the_main_thread_none_are_set():
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals_as_errors():
        assert [signal.getsignal(number) for number in ENDING] != [signal.getsignal(signal.SIGINT)] * len(ENDING)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    thread = threading.Thread(target=lambda: signals_as_errors().__enter__())
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_a_library_swallows_still_ends_the_command():
    with pytest.raises(StoppedBySignal), signals_as_errors(), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_training_inside_a_command_has_its_own_handlers():
    with signals_as_errors(), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_requested


@pytest.mark.parametrize("context", [StopRequest, signals_as_errors])
def test_a_run_started_with_nohup_outlives_its_terminal(context):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with context():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
