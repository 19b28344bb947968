"""What the tests of whole runs share: kinds of runs, their bytes, and children that can be killed."""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

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


def in_child(function, *, kill_when=None, signal_number=signal.SIGKILL, timeout_s=120) -> int:
    """Run `function` in a forked process; send it a signal as soon as `kill_when()` is true.

    Returns its exit code, or minus the signal's number where that ended it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of threads; those here do not touch what the child uses
        child = os.fork()
    if child == 0:
        code = 70
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
            function()
            code = 0
        except Exception as error:  # noqa: BLE001 - the parent reads the exit code
            code = getattr(error, "exit_code", 1)
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    sent = False
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill_when is not None and not sent and kill_when():
            os.kill(child, signal_number)
            sent = True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child did not end within {timeout_s} s")


def line_count(path: Path) -> int:
    """Lines written so far."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
