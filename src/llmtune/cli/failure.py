"""Errors as messages for a terminal: problem, location and fix; the traceback of a crash goes to a file."""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from llmtune import durable
from llmtune.common.environment import state_folder
from llmtune.common.secrets import redacted, redacted_command
from llmtune.common.text import print_line, printable
from llmtune.errors import LlmtuneError, Problem
from llmtune.version import __version__

__all__ = ["message", "report_crash", "report_error"]


def message(error: LlmtuneError) -> str:
    """Return an error as plain text: one paragraph for one problem, a line for each of several, each fix once.

    Control characters in quoted arguments, rows and file names are shown as escapes, so that they cannot steer the
    terminal.
    """
    problems = [Problem(_escaped(row.problem) or "", _escaped(row.where), _escaped(row.fix)) for row in error.problems]
    if len(problems) == 1:
        (problem,) = problems
        lines = [f"error: {problem.problem}"]
        lines += [f"  where: {problem.where}"] if problem.where else []
        lines += [f"  fix: {problem.fix}"] if problem.fix else []
        return "\n".join(lines)
    lines = [f"error: {len(problems)} problems"]
    # Only neighbours share a fix: sorting would take the problems out of the order of the file.
    for fix, alike in itertools.groupby(problems, key=lambda row: row.fix):
        group = [f"  {row.where}: {row.problem}" if row.where else f"  {row.problem}" for row in alike]
        lines += group
        lines += [f"    fix: {fix}" + (f" (for the {len(group)} above)" if len(group) > 1 else "")] if fix else []
    return "\n".join(lines)


def _escaped(text: str | None) -> str | None:
    return text and printable(text, keep="\n\t")


def report_error(error: LlmtuneError, *, debug: bool = False) -> int:
    """Print a refusal and return its exit code; of several processes that train together, one alone prints it."""
    if _another_prints(error):
        return error.exit_code
    if debug:
        print_line(redacted("".join(traceback.format_exception(error))))
    print_line(message(error))
    return error.exit_code


def _another_prints(error: LlmtuneError) -> bool:
    if error.is_reported is not None:
        return error.is_reported
    # The processes have not met: what is wrong with a command is the same for all that a launcher started here.
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0"


def report_crash(error: BaseException, arguments: Sequence[str], *, debug: bool = False) -> int:
    """Write the traceback of a bug to a file, print where it is, and return exit code 1."""
    # People paste crash files into public issues.
    text = redacted(crash_text(error, arguments))
    summary = redacted("".join(traceback.format_exception_only(error)).strip().splitlines()[-1])
    path = _write_crash(text)
    if debug:
        print_line(text)
    where = path or "no folder could take a crash file; run again with --debug"
    fix = "report it with that file; it holds no secrets, but read it first"
    print_line(f"error: this is a bug in llmtune: {summary}\n  where: {where}\n  fix: {fix}")
    return 1


def crash_text(error: BaseException, arguments: Sequence[str]) -> str:
    """Return the content of a crash file: versions, the command and the traceback, without variables."""
    head = [
        f"llmtune {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"time: {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        f"command: llmtune {' '.join(redacted_command(arguments))}",
        "",
    ]
    return "\n".join(head) + "\n" + "".join(traceback.format_exception(error))


def _write_crash(text: str) -> Path | None:
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    temporary = Path(tempfile.gettempdir())
    # The second is for a home folder that is full or read-only, which may be what crashed.
    for folder in (state_folder() or temporary / "llmtune", temporary):
        try:
            durable.make_folder(folder)
            durable.write_text(folder / name, text)
        except (OSError, LlmtuneError):
            continue
        return folder / name
    return None
