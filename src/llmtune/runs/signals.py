"""Signals: the first one asks the run to stop, saved, at its next step boundary; a second one ends it at once (P8)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import TypeAlias

from llmtune.errors import StoppedBySignal

__all__ = [
    "SIGNALS",
    "StopRequest",
    "deferred_signals",
    "exit_where_blocked",
    "signals_as_errors",
    "stop_with_launcher",
]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None
"""What `signal.signal` takes and returns; None for a handler that was not installed by Python."""

# A launcher passes on a signal that the scheduler also sends to each process itself, on a busy machine seconds later:
# two within this time are one. A person who presses Ctrl-C again does not wait so long.
_ONE_REQUEST_S, _ONE_INTERRUPT_S = 5.0, 0.25
_SHOW_CURSOR = b"\x1b[?25h\x1b[0m"


class StopRequest:
    """A context in which SIGTERM, SIGINT, SIGHUP and SIGUSR1 become a request that the run reads between steps.

    The first signal is stored and announced. A second one ends the process at once with exit code 128 + its number:
    commits are atomic, so no file is half there. SIGHUP never counts as the second, because a closing terminal sends it
    more than once, and where it was ignored from the start (`nohup`) it stays ignored. Outside the main thread no
    handler is installed (Python allows it only there); `request` works everywhere.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        """Number of the first signal, None before it."""
        self.announces = True
        """Whether the first signal is announced on stderr; of several processes of a run one does it."""
        self._requested_at_s = 0.0
        self._may_interrupt = False
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = _install(self._handle, [number for number in SIGNALS if not _is_ignored_hangup(number)])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _reinstall(self._previous)
        self._previous = {}

    @property
    def is_requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self.signal_number is not None

    def request(self, signal_number: int = signal.SIGTERM) -> None:
        """Request a stop, as the first signal does."""
        if not self.is_requested:
            self._requested_at_s = time.monotonic()
            self.signal_number = int(signal_number)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise StoppedBySignal at once when a signal arrives in the body, where nothing needs saving (loading, data).

        A request made before the body is raised at its start.
        """
        self.raise_if_requested()
        self._may_interrupt = True
        try:
            yield
        finally:
            self._may_interrupt = False
        self.raise_if_requested()  # in case a library swallowed the exception

    def raise_if_requested(self) -> None:
        """Raise StoppedBySignal if the run was asked to stop."""
        if self.is_requested:
            raise self.error()

    def error(self, saved: str | None = None) -> StoppedBySignal:
        """Return the error with which a stopped run ends; `saved` is the part of its message about the save."""
        number = self.signal_number or int(signal.SIGTERM)
        outcome = saved or "there was nothing to save yet"
        return StoppedBySignal(
            number, f"stopped by {_name(number)}: {outcome}", fix="`llmtune resume` goes on" if saved else None
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.is_requested:
            self.request(number)
            # Nothing is trained yet, so there is nothing to save and no reason to wait.
            if self._may_interrupt:
                raise self.error()
            if self.announces:
                _print_line(f"\nllmtune: {_name(number)}: finishing this step and saving; once more to leave at once\n")
        elif number != signal.SIGHUP:
            one_request_s = _ONE_INTERRUPT_S if number == signal.SIGINT else _ONE_REQUEST_S
            if time.monotonic() - self._requested_at_s >= one_request_s:
                exit_at_once(number)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    """Whether this is SIGHUP and the process was started to outlive its terminal (`nohup`)."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _install(handler: Handler, numbers: Sequence[signal.Signals]) -> dict[signal.Signals, Handler]:
    """Install `handler` for these signals and return the previous ones; in the main thread only."""
    return {number: signal.signal(number, handler) for number in numbers}


def _reinstall(handlers: dict[signal.Signals, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Delay signals until the end of the body, where the first one acts.

    For the start of a library, whose C++ code an exception in its middle would abort.
    """
    # Handlers, not the thread's signal mask: the system gives a masked signal to any other thread that lets it through.
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    received: list[int] = []
    handled = [number for number in SIGNALS if signal.getsignal(number) not in (None, signal.SIG_IGN)]
    previous = _install(lambda number, _frame: received.append(number), handled)
    try:
        yield
    finally:
        _reinstall(previous)
        if received:
            # After the old handlers are back, so that one of them acts on it.
            signal.raise_signal(received[0])


@contextlib.contextmanager
def signals_as_errors() -> Iterator[None]:
    """Raise StoppedBySignal in the body at SIGTERM, SIGHUP or SIGUSR1, so that unfinished files are removed.

    A second one kills. For commands that have no step to finish (a merge, a report) and for the imports before a
    training, which then has its own StopRequest. SIGINT stays Python's KeyboardInterrupt. Outside the main thread
    signals stay as they are.
    """
    raised: list[StoppedBySignal] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        # The default first, so that a second signal ends a clean-up that hangs.
        raised.append(StoppedBySignal(number, f"stopped by {_name(number)}: there was nothing to save"))
        raise raised[0]

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = _install(
        stop, [number for number in SIGNALS if number != signal.SIGINT and not _is_ignored_hangup(number)]
    )
    try:
        yield
    finally:
        _reinstall(previous)
    if raised:
        raise raised[0]  # a library swallowed it


_HANDLER_S = 1.0
"""Seconds that Python's own handler of a signal gets: what it raises closes what is open."""


@contextlib.contextmanager
def exit_where_blocked(*, announces: bool = True) -> Iterator[None]:
    """End this process at a signal that comes while the body waits in C++, which runs no handler of Python.

    For a wait in which nothing is there to save, such as that for other processes. `announces`: say so on stderr.
    Outside the main thread the wait is as it was.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    received, written = socket.socketpair()
    written.setblocking(False)

    def exit_at_signal() -> None:
        with received:
            while numbers := received.recv(1):
                if numbers[0] in SIGNALS and not ended.wait(_HANDLER_S):
                    if announces:
                        _print_line(f"error: stopped by {_name(numbers[0])}: there was nothing to save\n")
                    os._exit(128 + numbers[0])

    # The system writes the number there at once, wherever the main thread is.
    previous = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=exit_at_signal, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        written.close()  # at which the thread reads an end


def stop_with_launcher() -> None:
    """Ask the kernel (Linux) for SIGTERM when torch's launcher dies that started this process, one of several.

    SIGKILL ends a launcher without a word to the processes that it has started, and so does SIGUSR1. What the kernel
    watches is the thread that started this process.
    """
    is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform == "linux" and is_one_of_several:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h: the signal that a process gets when the thread that started it ends."""


def exit_at_once(number: int) -> None:
    """End this process with exit code 128 + `number` after showing the terminal's cursor; no clean-up runs."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)  # a progress bar had hidden it
    _print_line(f"\nllmtune: {_name(number)} again: left at once; the last checkpoint stands\n")
    # Not sys.exit, whose exception could be caught, or wait for threads.
    os._exit(128 + number)


def _print_line(text: str) -> None:
    """Write to standard error without Python's buffers, whose lock the interrupted code may hold."""
    # None in a process that was started without one.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, text.encode())


def _name(number: int) -> str:
    return signal.Signals(number).name
