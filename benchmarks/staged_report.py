"""What reports in stages share: each stage a process with a limit, one JSON line a finding, one Markdown table.

What fails, hangs or is killed costs its own rows and nothing else. The table is written again after every stage, so
Ctrl-C keeps what there is. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["findings_of", "run_stages"]

Finding = dict[str, object]
"""`what` was measured, its `value`, and whether it is `ok`."""

INTERRUPTED = "interrupted"
"""How a stage ended in which Ctrl-C came; what it had found is kept."""


def findings_of(_stage: str, printed: Sequence[str]) -> list[Finding]:
    """Read the findings among the printed lines."""
    found = []
    for line in printed:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict) and {"what", "value", "ok"} <= one.keys():
            found.append(one)
    return found


def run_stages(
    stages: Mapping[str, tuple[float, str]],
    wanted: Sequence[str],
    command: Callable[[str], list[str]],
    *,
    environment: Mapping[str, str],
    folder: Path,
    minutes: float,
    out: Path,
    head: str = "",
    read: Callable[[str, Sequence[str]], list[Finding]] = findings_of,
) -> int:
    """Run the stages in order, write the table after each and print it at the end; returns the exit code.

    stages: the share of the time that each may take, and what it says. command: of a stage, run in `folder`. out: the
    table; JSON lines stand beside it. head: what stands above it.
    """
    found: dict[str, list[Finding]] = {}
    ended: dict[str, str] = {}
    try:
        for stage in wanted:
            found[stage] = []
            _write(out, head + _table(found, ended))
            share, about = stages[stage]
            print(f"... {stage}: {about}", file=sys.stderr, flush=True)
            printed, ended[stage] = _run(command(stage), environment, folder, 60 * minutes * share)
            found[stage] = read(stage, printed)
            _write(out, head + _table(found, ended))
            lines = [json.dumps({"stage": name, **one}) for name, rows in found.items() for one in rows]
            _write(out.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
            if ended[stage].startswith(INTERRUPTED):
                break
    except KeyboardInterrupt:
        _write(out, head + _table(found, ended))
    print(out.read_text(encoding="utf-8"))
    print(f"also in {out} and {out.with_suffix('.jsonl')}", file=sys.stderr)
    whole = len(ended) == len(wanted) and not any(how.startswith(INTERRUPTED) for how in ended.values())
    return 0 if whole and all(one["ok"] for rows in found.values() for one in rows) else 1


def _run(command: Sequence[str], environment: Mapping[str, str], folder: Path, limit_s: float) -> tuple[list[str], str]:
    """Run one stage; returns the lines that it printed, and in words how it ended."""
    began = time.monotonic()
    # Files and not pipes: what a killed stage had written is still there.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdout=out, stderr=errors, process_group=0
        ) as process:
            try:
                process.wait(timeout=limit_s)
                how = f"ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                how = f"stopped after its {limit_s:.0f} s"
            except KeyboardInterrupt:
                how = INTERRUPTED
            finally:
                with suppress(ProcessLookupError):  # with the processes that it has started
                    os.killpg(process.pid, signal.SIGKILL)
        out.seek(0)
        errors.seek(0)
        printed, last = out.read().splitlines(), errors.read().strip().splitlines()[-1:]
    if process.returncode not in (0, -9) and last:
        how += f": {last[0][:160]}"
    return printed, f"{how}, {time.monotonic() - began:.0f} s"


def _table(found: Mapping[str, Sequence[Finding]], ended: Mapping[str, str]) -> str:
    """The findings as Markdown."""
    lines = ["| stage | what | found |", "| --- | --- | --- |"]
    for stage, rows in found.items():
        for one in rows:
            value = str(one["value"]).replace("|", "/").replace("\n", " ")
            lines.append(f"| {stage} | {one['what']} | {'' if one['ok'] else '**failed** '}{value} |")
        lines.append(f"| {stage} | the stage | {ended.get(stage, 'running')} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file whole, or leave the one before: this process may be killed at any moment."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
