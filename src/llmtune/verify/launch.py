"""How a training under attack is started: in a forked process, or as the command a user types."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from llmtune import durable
from llmtune.config.layers import load_config
from llmtune.training import train as training
from llmtune.verify.kill_points import Marker, watched
from llmtune.verify.subprocesses import in_child

__all__ = ["Commands", "End", "Forked", "Kill", "Starter"]

_LONGEST_S = 3600.0
_PRELOADED = ("llmtune.", "transformers.")
_NOT_PRELOADED = ("integrations", "bitsandbytes", "quantizers")


class Kill(NamedTuple):
    """When a process is to be killed: after so many seconds, or at so many file operations; one of the two."""

    after_s: float | None = None
    at_call: int | None = None

    def __str__(self) -> str:
        return f"after {self.after_s:.2f} s" if self.after_s is not None else f"at operation {self.at_call}"


NO_KILL = Kill()


class End(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code, or minus the number of the signal that ended it."""
    error: str
    seconds: float
    phase: str
    """What it was doing (see `PHASES`)."""
    calls: int
    """File operations it made in the attacked phases; 0 where nobody counted."""

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL was what ended it."""
        return self.code == -signal.SIGKILL


class Starter(Protocol):
    """Starts the trainings of one config under names, and goes on with them."""

    counts_calls: bool
    """Whether operations are counted, so that a kill can fall on one."""

    def train(self, name: str, kill: Kill = NO_KILL) -> End:
        """Start a training and wait for its end."""

    def resume(self, folder: Path, kill: Kill = NO_KILL) -> End:
        """Go on with the run in `folder`, and wait for its end."""


class Forked:
    """Trainings in forked processes: nothing is imported again, so each takes a fraction of a second."""

    counts_calls = True

    def __init__(self, config: str | None, overrides: Sequence[str], output_dir: Path) -> None:
        self._config, self._overrides = config, list(overrides)
        self._modules = output_dir / "modules.json"

    def train(self, name: str, kill: Kill = NO_KILL) -> End:
        """Start a training and wait for its end."""
        is_first = not self._modules.exists()

        def train() -> None:
            training.train(load_config(self._config, overrides=[*self._overrides, f"run.name={name}"]))
            if is_first:
                durable.write_json(self._modules, sorted(sys.modules))

        end = _watch(train, kill)
        if is_first and self._modules.exists():
            _import_all(json.loads(self._modules.read_bytes()))
        return end

    def resume(self, folder: Path, kill: Kill = NO_KILL) -> End:
        """Go on with the run in `folder`, and wait for its end."""
        return _watch(lambda: training.resume(str(folder)), kill)


def _import_all(names: Sequence[str]) -> None:
    """Import what the first training imported late, so that the forked ones need not; importing computes nothing."""
    for name in names:
        if name.startswith(_PRELOADED) and not any(word in name for word in _NOT_PRELOADED):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _watch(function: Callable[[], object], kill: Kill) -> End:
    marker = Marker()
    end = in_child(watched(function, marker, kill_at=kill.at_call), kill_after_s=kill.after_s)
    return End(end.code, end.error, end.seconds, marker.phase, marker.calls)


class Commands:
    """The real `llmtune train` and `llmtune resume`.

    The phase of a killed one is told from what it had said and written.
    """

    counts_calls = False

    def __init__(self, config: str | None, overrides: Sequence[str], output_dir: Path) -> None:
        self._train = ["train", *(["--config", config] if config else []), *overrides]
        self._output_dir = output_dir

    def train(self, name: str, kill: Kill = NO_KILL) -> End:
        """Start a training and wait for its end."""
        return _command([*self._train, f"run.name={name}"], self._output_dir / name, kill)

    def resume(self, folder: Path, kill: Kill = NO_KILL) -> End:
        """Go on with the run in `folder`, and wait for its end."""
        return _command(["resume", str(folder)], folder, kill)


def _command(arguments: Sequence[str], run: Path, kill: Kill) -> End:
    lines_before = len(durable.read_lines(run / "metrics.jsonl"))
    command = [sys.executable, "-m", "llmtune", *arguments]
    with tempfile.TemporaryFile() as said:
        begin = time.monotonic()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said) as process:
            try:
                process.wait(timeout=_LONGEST_S if kill.after_s is None else kill.after_s)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - begin
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    phase = _phase_of(text, run, resumes=arguments[0] == "resume", lines_before=lines_before)
    return End(process.returncode, text[-2000:] if process.returncode else "", seconds, phase, 0)


def _phase_of(said: str, run: Path, *, resumes: bool, lines_before: int) -> str:
    if not said.strip():
        return "start"
    if not (run / "run.json").is_file():
        return "loading" if "trained" in said else "data"
    left = [one.name for one in (run / "checkpoints").iterdir() if one.name.startswith(".llmtune")]
    if left:
        return "saving"
    lines = len(durable.read_lines(run / "metrics.jsonl"))
    if resumes and lines <= lines_before:
        return "resuming"
    return "finishing" if (run / "checkpoints" / "final").is_dir() else "training"
