"""`verify resume`: kill a run with SIGKILL in its middle, resume it, and compare with the run nobody stopped.

Every run is started through the real command line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from llmtune.common.text import PrintLine
from llmtune.errors import CheckpointError
from llmtune.verify.compare_runs import compare_runs
from llmtune.verify.result import Verdict
from llmtune.verify.subprocesses import llmtune_command, run_command

__all__ = ["verify_resume"]

_LONGEST_S = 3600.0


def verify_resume(
    config: str | None,
    overrides: Sequence[str],
    folder: Path,
    *,
    steps: int,
    kills: int,
    print_line: PrintLine,
) -> Verdict:
    """Train `steps` steps (at least 2) twice under `folder`, the second time killed `kills` times and resumed.

    Raises CheckpointError when a command that nobody stopped fails.
    """
    shared = [*overrides, f"training.max_steps={steps}", f"run.output_dir={folder}", "tracking.trackers=[jsonl]"]
    shared += [f"checkpoint.every_steps={max(1, steps // 4)}", "checkpoint.keep_last=0", "evaluation.prompts=[]"]
    shared.append("training.deterministic=true")  # on a GPU two equal trainings differ without it
    train = ["train", *(["--config", config] if config else [])]
    print_line(f"training {steps} steps without a stop")
    _run([*train, *shared, "run.name=whole"])
    print_line(f"training the same, killed {kills} times")
    stopped, verdict = folder / "stopped", Verdict("resume")
    command = [*train, *shared, "run.name=stopped"]
    for kill in range(kills):
        # Evenly spread over the steps.
        lines = 1 + (kill + 1) * steps // (kills + 1)
        killed = _kill_at(command, stopped / "metrics.jsonl", lines)
        verdict.add(f"kill -9 number {kill + 1} met a running training", f"after {lines} lines of metrics", killed)
        command = ["resume", str(stopped)]
    _run(["resume", str(stopped)])
    compare_runs(folder / "whole", stopped, verdict)
    return verdict


def _run(arguments: Sequence[str]) -> None:
    end = run_command(arguments)
    if end.code != 0:
        last = "\n".join(end.error.strip().splitlines()[-6:])
        raise CheckpointError(
            f"`llmtune {' '.join(arguments)}` ended with exit code {end.code}:\n{last}", fix="try that command itself"
        )


def _kill_at(arguments: Sequence[str], metrics: Path, lines: int) -> bool:
    """Start the command, kill it once `metrics` has that many lines, and return whether the kill ended it."""
    with subprocess.Popen(llmtune_command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + _LONGEST_S
        while child.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
                break
            # A step of the smallest model takes a few milliseconds.
            time.sleep(0.005)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
    return child.returncode == -signal.SIGKILL
