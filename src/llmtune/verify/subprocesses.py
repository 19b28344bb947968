"""Processes that are killed on purpose: a forked copy of this one, or an `llmtune` command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmtune.errors import LlmtuneError, MachineError

__all__ = ["ProcessEnd", "run_command", "run_forked"]

_LONGEST_S = 3600.0
_LONGEST_FORK_S = 600.0
_LONGEST_MESSAGE = 4000


class ProcessEnd(NamedTuple):
    """The end of a process."""

    code: int
    """Exit code, or minus the number of the signal that ended it."""
    error: str
    """The error it ended with; empty after exit code 0."""
    seconds: float
    """Lifetime of the process."""

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL


def run_forked(function: Callable[[], object], *, kill_after_s: float | None = None) -> ProcessEnd:
    """Run `function` in a forked process without output; an LlmtuneError gives its own exit code, another error 1.

    torch is not imported again, so the process starts in milliseconds; in return this process must not have computed
    anything yet (threads do not survive a fork). With `kill_after_s` it gets SIGKILL when it lives that long. Raises
    MachineError when it lives longer than ten minutes.
    """
    reader, writer = os.pipe()
    begin = time.monotonic()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads at a fork; those that imports started hold no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            function()
            code = 0
        except LlmtuneError as error:
            code = error.exit_code
            os.write(writer, str(error).encode("utf-8", "replace")[:_LONGEST_MESSAGE])
        except BaseException as error:  # the parent learns of anything only through this pipe
            os.write(writer, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:_LONGEST_MESSAGE])
            raise
        finally:
            os._exit(code)  # no clean-up of what belongs to the parent
    os.close(writer)
    end_s = _LONGEST_FORK_S if kill_after_s is None else kill_after_s
    while (lived_s := time.monotonic() - begin) < end_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with os.fdopen(reader, "rb") as message:
                return ProcessEnd(os.waitstatus_to_exitcode(status), message.read().decode("utf-8", "replace"), lived_s)
        # Short naps, because a kill must come within milliseconds of its moment.
        time.sleep(max(0.0, min(0.002, end_s - lived_s)))
    os.kill(child, signal.SIGKILL)
    # It may have ended by itself in this very moment; then the status says so.
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if kill_after_s is None:
        raise MachineError(f"a child process did not end within {_LONGEST_FORK_S:.0f} s")
    return ProcessEnd(os.waitstatus_to_exitcode(status), "", lived_s)


def run_command(arguments: Sequence[str], *, kill_after_s: float | None = None) -> ProcessEnd:
    """Run `llmtune` with `arguments` in a new process; with `kill_after_s` it gets SIGKILL when it lives that long."""
    begin = time.monotonic()
    with (
        # A file and not a pipe, which fills up when nobody reads it, and then the process hangs.
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            llmtune_command(arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        ) as process,
    ):
        try:
            process.wait(timeout=_LONGEST_S if kill_after_s is None else kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.wait()
        stderr.seek(0)
        text = stderr.read().decode("utf-8", "replace")
    return ProcessEnd(code, text[-_LONGEST_MESSAGE:] if code else "", time.monotonic() - begin)


def llmtune_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of `llmtune` with `arguments`, run by this Python."""
    return [sys.executable, "-m", "llmtune", *arguments]
