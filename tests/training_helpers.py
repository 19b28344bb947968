"""What the tests of whole runs share: kinds of runs, their bytes, and children that can be killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmtune.common.text import silent
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.runs.signals import StopRequest
from llmtune.training.train import open_run
from llmtune.training.training_run import TrainingRun
from llmtune.verify.compare_runs import compare_runs
from llmtune.verify.result import Verdict

TIMES = ("step_seconds", "tokens_per_second", "loss_tokens_per_second", "memory_bytes")
LORA = ("adapter.method=lora", "adapter.r=4", "adapter.dropout=0.1")
FOUR_BIT = (*LORA, "model.quantization=4bit")
SMALL = (
    "data.test_size=4",
    "training.batch_size=2",
    "training.precision=fp32",
    "evaluation.every_steps=2",
    "tracking.trackers=[jsonl]",
)
KINDS = {"lora": LORA, "full": (), "4bit": FOUR_BIT, "packed": ("data.packing=best_fit", "data.max_length=128")}


def small_run(model: Path, rows: Path, folder: Path, *more: str) -> list[str]:
    """The KEY=VALUE words of a short LoRA run in `folder`, evaluated at every second step; `more` on top."""
    return [f"model.name={model}", f"data.train={rows}", f"run.output_dir={folder}", *LORA, *SMALL, *more]


def comparing_run(model: Path, rows: Path, folder: Path, *more: str, name: str = "run") -> ResolvedConfig:
    """The config of a short run that compares or judges answers, in `folder`; `more` KEY=VALUE words on top."""
    words = [
        f"model.name={model}",
        f"data.train={rows}",
        f"data.cache_dir={folder / 'cache'}",
        "data.num_workers=1",
        f"run.output_dir={folder / 'runs'}",
        f"run.name={name}",
        "training.batch_size=2",
        "training.learning_rate=0.003",
        "training.precision=fp32",
        "tracking.trackers=[jsonl]",
        *more,
    ]
    return load_config(None, overrides=words, environ={})


def words_as_yaml(words: Sequence[str]) -> str:
    """KEY=VALUE words as the text of a config file."""
    sections: dict[str, list[str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        section, _, leaf = key.partition(".")
        sections.setdefault(section, []).append(f"  {leaf}: {value}\n")
    return "".join(f"{section}:\n{''.join(lines)}" for section, lines in sections.items())


def stopped_after(steps: int, resolved: ResolvedConfig, options: Options | None = None) -> str:
    """Make so many steps of a run and leave it; returns its folder, which the first process alone holds ('')."""
    with StopRequest() as stop:
        run = open_run(resolved, options or Options(), stop, print_line=silent)
        made = run.steps()
        for _ in range(steps):
            next(made)
        made.close()
    return "" if run.run is None else str(run.run.path)


class FirstWindow(NamedTuple):
    """What a run computes before any update."""

    loss: float
    metrics: dict[str, float]
    run: TrainingRun
    """Closed."""


def first_window(resolved: ResolvedConfig) -> FirstWindow:
    """Compute the loss and the metrics of a run's first window, and leave the run."""
    with StopRequest() as stop:
        run = open_run(resolved, Options(), stop, print_line=silent)
        window, objective = run.setup.batches.window(1), run.setup.objective
        count = objective.begin_window(window, run.devices)
        with run.setup.precision.autocast():
            loss = sum(objective.loss_sum(batch).item() for batch in window.micro_batches) / count
        found = FirstWindow(loss, objective.measure(run.devices), run)
        run.close()
    return found


def difference(whole: Path, run: Path) -> str:
    """What `verify resume` finds first that is not the same in the run and in the one nobody stopped; nothing: ''."""
    verdict = Verdict("resume")
    compare_runs(whole, run, verdict)
    assert verdict.findings, "nothing was compared"
    return next((f"{one.claim}: {one.measured}" for one in verdict.findings if not one.holds), "")


def weights_of(run: Path, which: str = "final") -> dict[str, bytes]:
    """Bytes of every safetensors file of the final (or another) checkpoint."""
    files = sorted((run / "checkpoints" / which).glob("*.safetensors"))
    assert files, f"no weights in {run}"
    return {file.name: file.read_bytes() for file in files}


def lines_of(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock or a meter decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


class Forked:
    """A function that runs in a forked process, with the methods of `subprocess.Popen`.

    It starts with the libraries that are loaded here: a new interpreter would import them for seconds first. It may
    be a command: `Forked(lambda: command(words))`, whose exit code is what the function returns (None is 0).
    """

    def __init__(self, function, *, environ=None):
        """`environ`: variables that the child has beside those of this process."""
        self.returncode = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has ended
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads; the child touches none of them
            self.pid = os.fork()
        if self.pid == 0:
            self._run(function, environ or {})

    def _run(self, function, environ):
        code = 70
        try:
            os.environ.update(environ)
            os.dup2(self._output.fileno(), 1)
            os.dup2(self._output.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            code = function() or 0
        except Exception as error:  # noqa: BLE001 - the parent reads the exit code
            traceback.print_exc()
            code = getattr(error, "exit_code", 1)
        finally:
            os._exit(code)

    def poll(self):
        """The exit code, or minus the number of the signal that ended it; None while it runs."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
                with self._output:
                    self._output.seek(0)
                    self._printed = self._output.read().decode()
        return self.returncode

    def wait(self, timeout=None):
        """Wait for its end and return its exit code."""
        deadline = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.001)
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for its end and return what it printed, stderr included, and None."""
        self.wait(timeout)
        return self._printed, None

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def in_child(function, *, kill_when=None, signal_number=signal.SIGKILL, timeout_s=120) -> int:
    """Run `function` in a forked process; send it a signal as soon as `kill_when()` is true.

    Returns its exit code, or minus the signal's number where that ended it.
    """
    child = Forked(function)
    try:
        while kill_when is not None and child.poll() is None:
            if kill_when():
                child.send_signal(signal_number)
                break
            time.sleep(0.001)
        return child.wait(timeout_s)
    finally:
        child.kill()
        print(child.communicate()[0])  # pytest shows it beside what failed


def line_count(path: Path) -> int:
    """Lines written so far."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
