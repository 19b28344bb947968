"""Forked processes: torch is imported once, each child then starts in milliseconds.

The parent must not have computed anything yet.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

from llmtune.errors import LlmtuneError, MachineError

__all__ = ["ChildEnd", "in_child"]

_LONGEST_MESSAGE = 4000


class ChildEnd(NamedTuple):
    """How a child ended: its exit code, or minus the number of the signal that ended it, and the error it ended with."""

    code: int
    error: str
    seconds: float = 0.0
    """How long it lived."""


def in_child(
    function: Callable[[], object], *, timeout_s: float = 600.0, kill_after_s: float | None = None
) -> ChildEnd:
    """Run `function` in a forked process; a refusal gives its own exit code, any other exception 1.

    Output goes nowhere.

    With `kill_after_s` it is killed with SIGKILL when it lives that long. Raises MachineError when it takes too long.
    """
    reader, writer = os.pipe()
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of threads; importing started none that holds a lock
        child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            function()
            code = 0
        except LlmtuneError as error:
            code = error.exit_code
            os.write(writer, str(error).encode("utf-8", "replace")[:_LONGEST_MESSAGE])
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:_LONGEST_MESSAGE])
            raise
        finally:
            os._exit(code)
    os.close(writer)
    end_s = timeout_s if kill_after_s is None else kill_after_s
    while (lived_s := time.monotonic() - begin) < end_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with os.fdopen(reader, "rb") as said:
                return ChildEnd(os.waitstatus_to_exitcode(status), said.read().decode("utf-8", "replace"), lived_s)
        time.sleep(max(0.0, min(0.002, end_s - lived_s)))
    os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if kill_after_s is None:
        raise MachineError(f"a child process did not end within {timeout_s:.0f} s")
    return ChildEnd(os.waitstatus_to_exitcode(status), "", lived_s)
