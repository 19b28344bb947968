"""How an error looks in a terminal: one message of what, where and the fix; a crash goes to a file."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from llmtune.common.folders import state_folder
from llmtune.common.secrets import redacted, redacted_command
from llmtune.common.text import printable
from llmtune.errors import LlmtuneError, Problem
from llmtune.version import __version__

__all__ = ["message", "print_line", "report_crash", "report_error"]


def message(error: LlmtuneError) -> str:
    """Return an error as plain text: one paragraph for one problem, a line for each of several, each fix once.

    What an error quotes (an argument, a row, a file's name) cannot steer the terminal: control characters are shown as
    escapes.
    """
    problems = [
        Problem(_harmless(one.problem) or "", _harmless(one.where), _harmless(one.fix)) for one in error.problems
    ]
    if len(problems) == 1:
        only = problems[0]
        lines = [f"error: {only.problem}"]
        lines += [f"  where: {only.where}"] if only.where else []
        lines += [f"  fix: {only.fix}"] if only.fix else []
        return "\n".join(lines)
    lines = [f"error: {len(problems)} problems"]
    for fix, alike in itertools.groupby(problems, key=lambda one: one.fix):
        group = [f"  {one.where}: {one.problem}" if one.where else f"  {one.problem}" for one in alike]
        lines += group
        lines += [f"    fix: {fix}" + (f" (for the {len(group)} above)" if len(group) > 1 else "")] if fix else []
    return "\n".join(lines)


def _harmless(text: str | None) -> str | None:
    return text and printable(text, keep="\n\t")


def print_line(text: str) -> None:
    """Write a line of talk to stderr; a terminal that cannot show a character gets its escape, a closed one nothing."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)


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
    """Keep the traceback of a bug of ours in a file, say so in one line, and return 1."""
    text = redacted(crash_text(error, arguments))
    summary = redacted("".join(traceback.format_exception_only(error)).strip().splitlines()[-1])
    place = _write_crash(text)
    if debug:
        print_line(text)
    where = f"\n  where: {place}" if place else "\n  where: no folder could take a crash file; run again with --debug"
    print_line(
        f"error: this is a bug in llmtune: {summary}{where}\n  fix: report it with that file; it holds no secrets, but read it first"
    )
    return 1


def crash_text(error: BaseException, arguments: Sequence[str]) -> str:
    """Return what a crash file holds: versions, the command and the traceback, but no variables."""
    head = [
        f"llmtune {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"time: {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        f"command: llmtune {' '.join(redacted_command(arguments))}",
        "",
    ]
    return "\n".join(head) + "\n" + "".join(traceback.format_exception(error))


def _write_crash(text: str) -> Path | None:
    from llmtune import durable

    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (state_folder() or Path(tempfile.gettempdir()) / "llmtune", Path(tempfile.gettempdir())):
        try:
            durable.make_folder(folder)
            durable.write_text(folder / name, text)
        except (OSError, LlmtuneError):
            continue
        return folder / name
    return None
