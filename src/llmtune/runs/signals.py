"""A signal asks the run to stop at its next step boundary, saved; a second one leaves at once (P8)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

from llmtune.errors import StoppedBySignal

__all__ = ["SIGNALS", "StopRequest", "ending_in_order", "held_back"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# A launcher passes on a signal that the scheduler also sends to each process itself: two within this time are one
# request.
_ONE_REQUEST_S = 0.25
_SHOW_CURSOR = b"\x1b[?25h\x1b[0m"


class StopRequest:
    """A context in which SIGTERM, SIGINT, SIGHUP and SIGUSR1 become a request that the pipeline reads between steps.

    The first one is noted and announced. A second one ends the process at once with 128 + its number: commits are
    atomic, so nothing is half there. SIGHUP never counts as the second, because a closing terminal sends it more than
    once, and where it was ignored from the start (`nohup`) it stays ignored. Outside the main thread nothing is
    installed (Python allows signal handlers only there) and `request` is the only way to ask.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        """Number of the signal that asked, None while none did."""
        self._asked_at_s = 0.0
        self._may_interrupt = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {one: signal.signal(one, self._handle) for one in SIGNALS if not _is_of_no_concern(one)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._previous.items():
            signal.signal(one, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    @property
    def is_requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self.signal_number is not None

    def request(self, signal_number: int = signal.SIGTERM) -> None:
        """Ask as a first signal would."""
        if self.signal_number is None:
            self._asked_at_s = time.monotonic()
            self.signal_number = int(signal_number)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """While the body runs there is nothing to save (loading, preparing data): a signal raises StoppedBySignal there
        and then.

        A request made before the body raises at its start.
        """
        self.refuse_to_go_on()
        self._may_interrupt = True
        try:
            yield
        finally:
            self._may_interrupt = False
        self.refuse_to_go_on()  # in case a library swallowed the exception

    def refuse_to_go_on(self, saved: str | None = None) -> None:
        """Raise StoppedBySignal if the run was asked to stop; `saved` says what was saved."""
        if self.signal_number is not None:
            raise self.error(saved)

    def error(self, saved: str | None = None) -> StoppedBySignal:
        """Return the error with which a run ends that was asked to stop."""
        number = self.signal_number or int(signal.SIGTERM)
        what = saved or "there was nothing to save yet"
        return StoppedBySignal(
            number, f"stopped by {_name(number)}: {what}", fix="`llmtune resume` goes on" if saved else None
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_number is None:
            self.request(number)
            if self._may_interrupt:
                raise self.error()
            _print_line(f"\nllmtune: {_name(number)}: finishing this step and saving; once more to leave at once\n")
        elif number != signal.SIGHUP and time.monotonic() - self._asked_at_s >= _ONE_REQUEST_S:
            leave_at_once(number)


def _is_of_no_concern(number: signal.Signals) -> bool:
    """Whether whoever started this process wants it to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """While the body runs, signals wait: for a library's own start, which an exception in the middle of its C++ would
    abort.

    The first one acts at the end. Not by the thread's mask, for a signal to a process goes to whichever thread lets it
    through.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    held: list[int] = []
    wanted = [one for one in SIGNALS if signal.getsignal(one) not in (None, signal.SIG_IGN)]
    try:
        with _handled_by(lambda number, _frame: held.append(number), wanted):
            yield
    finally:
        if held:
            signal.raise_signal(held[0])


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """While the body runs, in the main thread, `handler` gets these signals."""
    previous: dict[signal.Signals, Any] = {one: signal.signal(one, handler) for one in numbers}
    try:
        yield
    finally:
        for one, before in previous.items():
            signal.signal(one, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """While the body runs, SIGTERM, SIGHUP and SIGUSR1 raise StoppedBySignal, so that what was begun is cleared away.

    A second one kills.

    For everything that has no step to finish: a merge, a report, the imports before a training, which then has its own
    StopRequest. SIGINT stays Python's KeyboardInterrupt. Nothing happens outside the main thread.
    """
    asked: list[StoppedBySignal] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        asked.append(StoppedBySignal(number, f"stopped by {_name(number)}: there was nothing to save"))
        raise asked[0]

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [one for one in SIGNALS if one != signal.SIGINT and not _is_of_no_concern(one)]
    with _handled_by(stop, wanted):
        yield
    if asked:
        raise asked[0]  # a library swallowed it


def leave_at_once(number: int) -> None:
    """End this process now with exit code 128 + `number`, the terminal's cursor back in place.

    Nothing is saved, nothing is flushed.
    """
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
    _print_line(f"\nllmtune: {_name(number)} again: left at once; the last checkpoint stands\n")
    os._exit(128 + number)


def _print_line(text: str) -> None:
    """Write to standard error past Python's buffers, which the interrupted code may be holding.

    A closed terminal is no reason to fail.
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def _name(number: int) -> str:
    return signal.Signals(number).name
