"""Forked processes: torch is imported once, each child then starts in milliseconds. The parent must not have computed anything yet."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable

from llmtune.errors import LlmtuneError, MachineError

__all__ = ["in_child"]


def in_child(function: Callable[[], object], *, timeout_s: float = 600.0) -> int:
    """Run `function` in a forked process and return its exit code, or minus the number of the signal that ended it.

    A refusal gives its own exit code, any other exception 1. Output goes nowhere. Raises MachineError when it takes too long.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; importing started none that holds a lock
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
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise MachineError(f"a child process did not end within {timeout_s:.0f} s")
