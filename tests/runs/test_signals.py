"""P8: the first signal asks, the second leaves at once; at a place with nothing to save the first one leaves."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llmtune.errors import StoppedBySignal
from llmtune.runs import signals
from llmtune.runs.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_and_the_exit_code_is_128_plus_its_number(number, capfd):
    with StopRequest() as stop:
        assert not stop.is_requested
        os.kill(os.getpid(), number)
        assert stop.is_requested
        with pytest.raises(StoppedBySignal, match=f"stopped by {number.name}: there was nothing to save yet") as caught:
            stop.raise_if_requested()
        assert str(stop.error("saved step 3")).startswith(f"stopped by {number.name}: saved step 3")
    assert caught.value.exit_code == 128 + number
    assert "finishing this step and saving" in capfd.readouterr().err


def test_the_handlers_that_were_there_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_without_a_signal_nothing_stops():
    with StopRequest() as stop:
        stop.raise_if_requested()
        with stop.interrupting():
            pass


def wait_in(stop):
    with stop.interrupting():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_where_there_is_nothing_to_save_the_first_signal_interrupts():
    with StopRequest() as stop, pytest.raises(StoppedBySignal, match="there was nothing to save yet"):
        wait_in(stop)


def swallow_in(stop):
    with stop.interrupting(), contextlib.suppress(StoppedBySignal):  # as a library with a broad except does
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupt_that_a_library_swallows_still_stops_the_run():
    with StopRequest() as stop, pytest.raises(StoppedBySignal):
        swallow_in(stop)


def test_a_request_made_before_is_answered_before_the_loading_begins():
    with StopRequest() as stop:
        stop.request(signal.SIGUSR1)
        with pytest.raises(StoppedBySignal, match="SIGUSR1"), stop.interrupting():
            pytest.fail("loaded")


def test_outside_the_main_thread_only_a_request_asks():
    found = []

    def work():
        with StopRequest() as stop:
            stop.request()
            found.append(stop.is_requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


WAIT = """
import sys, time
from llmtune.runs.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < deadline:
        time.sleep(0.01)
        if stop.is_requested and sys.argv[2] == "stops":
            time.sleep(0.5)
            sys.exit(stop.error("saved").exit_code)
"""


def send(signals, mode, pause_s):
    """Send signals to a process that needs half a second to stop, or never does; return its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, "20", mode], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(pause_s)
        return process.wait(timeout=30)


def test_a_second_signal_leaves_at_once():
    begin = time.monotonic()
    assert send([signal.SIGTERM, signal.SIGINT], "hangs", pause_s=0.4) == 128 + signal.SIGINT
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(("count", "pause_s"), [(10, 0.005), (2, 0.4)])
def test_a_signal_that_a_launcher_doubles_is_one_request(count, pause_s):
    """The first one counts, whether the others come within a moment or late; the run still saves."""
    assert send([signal.SIGTERM] * count, "stops", pause_s=pause_s) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("later_s", "leaves"), [(4.9, False), (5.0, True)])
def test_a_second_request_of_a_launcher_is_one_that_comes_much_later(monkeypatch, later_s, leaves):
    left = []
    monkeypatch.setattr(signals, "exit_at_once", left.append)
    with signals.StopRequest() as stop:
        stop.announces = False
        now = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 0.01 + later_s)
        os.kill(os.getpid(), signal.SIGTERM)
    assert left == [signal.SIGTERM] * leaves


def test_a_closing_terminal_may_send_its_signal_as_often_as_it_wants():
    assert send([signal.SIGHUP, signal.SIGHUP], "stops", pause_s=0.3) == 128 + signal.SIGHUP


def test_a_closed_standard_error_is_no_reason_to_fail():
    code = WAIT.replace("import sys, time", "import os, sys, time; os.close(2)")
    with subprocess.Popen([sys.executable, "-c", code, "20", "stops"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=30) == 128 + signal.SIGHUP
