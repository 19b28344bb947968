"""`scripts/gpu` and `benchmarks/many_gpus.py`: what fails, hangs or is killed costs its own rows.

The table on the disk is whole at every moment.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from rank_helpers import end_of, environment, places
from training_helpers import Forked

ROOT = Path(__file__).parents[2]
PRETENDED = "Pretended: no figure here was measured on a GPU.\n\n"
HANGING = """#!/bin/sh
echo 'a library says something'
echo '{"what": "a rate", "value": "1 | 2", "ok": true}'
case "$*" in
  *"$FAILING"*) echo '{"what": "a product", "value": "no", "ok": false}'; echo 'broken for a reason' >&2; exit 3;;
  *"$HANGING"*) sleep 60; sleep 60;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Starts `scripts/gpu` with stages that end, fail and hang at once."""
    stub, out = tmp_path / "python", tmp_path / "table.md"
    stub.write_text(HANGING)
    stub.chmod(0o755)

    def start(*arguments, hanging="engine", failing="attention", python=stub):
        stages = {"LLMTUNE_PYTHON": str(python), "HANGING": hanging, "FAILING": failing}
        return subprocess.Popen(
            [sys.executable, "scripts/gpu", "--out", str(out), *arguments],
            cwd=ROOT,
            env={**os.environ, **stages},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    return start, out


def rows(text):
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "| stage | what | found |"
    assert text.endswith("|\n")
    assert all(re.fullmatch(r"\|.*\|.*\|.*\|", line) for line in lines), text
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def test_a_stage_that_fails_or_hangs_costs_its_own_rows(script):
    start, out = script
    process = start("--minutes", "0.2", "machine", "attention", "engine", "speed")
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    found = rows(out.read_text())
    assert printed.strip() == out.read_text().strip()
    assert ("machine", "a rate", "1 / 2") in found
    assert ("attention", "a product", "**failed** no") in found
    ends = {stage: end for stage, what, end in found if what == "the stage"}
    assert ends["attention"].startswith("ended with 3: broken for a reason")
    assert ends["engine"].startswith("stopped after its 1 s")
    assert ends["speed"].startswith("ended with 0")
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 5


def end_in(stage, process, out, sign, after_s=0.3):
    """Send a signal when a stage has run so long; returns the rows of the table, and its processes that are left."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and f"| {stage} | the stage | running |" not in (
        out.read_text() if out.exists() else ""
    ):
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not psutil.Process(process.pid).children():
        time.sleep(0.01)
    time.sleep(after_s)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, sign)
    process.communicate(timeout=20)
    left = psutil.wait_procs(children, timeout=5 if sign == signal.SIGINT else 0)[1]
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return rows(out.read_text().removeprefix(PRETENDED)), left


STAGES = ("machine", "attention", "engine", "kernels", "speed", "longest", "tests")
OFTEN = "engine"
SIGNALS = [signal.SIGKILL, signal.SIGINT]


@pytest.mark.parametrize("sign", SIGNALS)
@pytest.mark.parametrize(
    "stage", [stage if stage == OFTEN else pytest.param(stage, marks=pytest.mark.campaign) for stage in STAGES]
)
def test_killed_in_a_stage_it_leaves_a_whole_table(script, stage, sign):
    start, out = script
    process = start(hanging=stage, failing="no stage")
    found, left = end_in(stage, process, out, sign)
    assert [name for name, what, _ in found if what == "the stage"] == list(STAGES[: STAGES.index(stage) + 1])
    if sign == signal.SIGKILL:  # then nobody was left to end its stage
        assert found[-1] == (stage, "the stage", "running")
        return
    assert process.returncode == 1
    assert left == []
    assert found[-1][2].startswith("interrupted, ")
    if stage != "tests":
        assert found[-2] == (stage, "a rate", "1 / 2"), "what the stage had found is kept"


@pytest.mark.campaign
@pytest.mark.parametrize("sign", SIGNALS)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_a_stage_on_a_pretend_gpu_it_leaves_a_whole_table_and_on_ctrl_c_no_process(script, stage, sign):
    start, out = script
    tests = ["--tests", "tests/kernels/test_swiglu.py"]
    process = start("--pretend", "--minutes", "60", stage, *tests, python=sys.executable)
    found, left = end_in(stage, process, out, sign, after_s=4.0)
    assert {name for name, *_ in found} == {stage}
    assert sign == signal.SIGKILL or (left == [] and found[-1][2].startswith("interrupted, "))


@pytest.mark.campaign
def test_all_stages_run_on_a_pretend_gpu_and_nothing_fails(tmp_path):
    """Point 5 of what `scripts/gpu` promises: it is tried before it meets a GPU."""
    out = tmp_path / "table.md"
    tests = ["--tests", "tests/kernels/test_swiglu.py", "tests/kernels/test_attention.py"]
    arguments = ["scripts/gpu", "--pretend", "--minutes", "60", "--out", str(out), *tests]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert {row[0] for row in rows(out.read_text().removeprefix(PRETENDED))} == {
        "machine", "attention", "engine", "kernels", "speed", "longest", "tests",
    }  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "**failed**" not in done.stdout
    assert re.search(r"\| pytest -m gpu \| [6-9] passed", done.stdout), done.stdout


@pytest.mark.campaign
def test_all_stages_for_several_gpus_run_in_cpu_processes_and_nothing_fails(tmp_path):
    out = tmp_path / "table.md"
    arguments = ["benchmarks/many_gpus.py", "--pretend", "--minutes", "60", "--out", str(out)]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert {row[0] for row in rows(out.read_text().removeprefix(PRETENDED))} == {
        "machine", "rates", "alike", "speed", "ends",
    }  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "**failed**" not in done.stdout


@pytest.fixture
def trainings(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("trainings")


TRAINING = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if os.fork():
    signal.pause()  # the launcher
signal.signal(signal.SIGTERM, lambda *_: (folder.parent / "saved").touch())
for step in range(int(sys.argv[2])):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "step_seconds": 0.1, "process": os.getpid()}) + "\\n")
    time.sleep(0.05)
print("error: the disk is full", file=sys.stderr)
os.kill(os.getppid(), signal.SIGKILL)
"""
"""Stands for a training that is a process of its launcher and saves when it is asked to stop."""


def test_a_training_that_is_timed_is_ended_before_it_saves_and_leaves_no_run(trainings, tmp_path, monkeypatch):
    """Each checkpoint of full tuning of 1B is 15 GB, and fourteen trainings are timed."""
    bench = trainings.Bench(tmp_path, 2, pretend=True)
    folder = bench.run_folder(["run.name=timed"])
    monkeypatch.setattr(bench, "command", lambda *_: [sys.executable, "-c", TRAINING, str(folder), "1000"])
    lines = bench.unsaved(2, ["run.name=timed"], 5)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    psutil.wait_procs([psutil.Process(pid) for pid in {line["process"] for line in lines} if psutil.pid_exists(pid)], 5)
    assert not psutil.pid_exists(lines[0]["process"])
    assert list(folder.parent.iterdir()) == []


def test_a_training_that_ends_before_its_steps_says_why(trainings, tmp_path, monkeypatch):
    bench = trainings.Bench(tmp_path, 2, pretend=True)
    folder = bench.run_folder(["run.name=timed"])
    monkeypatch.setattr(bench, "command", lambda *_: [sys.executable, "-c", TRAINING, str(folder), "2"])
    with pytest.raises(RuntimeError, match="exit code -9: error: the disk is full"):
        bench.unsaved(2, ["run.name=timed"], 5)
    assert list(folder.parent.iterdir()) == []


def test_bytes_a_second_are_measured_by_operations_that_the_oldest_torch_has(trainings, monkeypatch):
    many_gpus = importlib.import_module("many_gpus")
    for name in ("all_gather_single", "reduce_scatter_single"):  # of torch 2.13
        monkeypatch.delattr(torch.distributed, name, raising=False)
    codes, said = end_of(
        [Forked(lambda: many_gpus.rates_of_a_rank(pretend=True), environ=environment(**places(count=1)[0]))]
    )
    assert codes == [0], said
    assert len(rows_of(said[0])) == 6


def rows_of(said):
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("printed", "wrong"),
    [
        (["tests/a.py::t PASSED [ 50%]", "tests/a.py::u PASSED [100%]", "=== 2 passed in 1.00s ==="], []),
        (["tests/a.py::t[a b] ERROR [ 50%]", "=== 1 error in 1.00s ==="], ["tests/a.py::t[a b]", "pytest -m gpu"]),
        (["tests/a.py::t FAILED [ 50%]", "tests/a.py::u "], ["tests/a.py::t", "pytest -m gpu"]),
        (["tests/a.py::t PASSED [ 50%]", "tests/a.py::u "], ["pytest -m gpu"]),
        (["ERROR tests/a.py - ImportError: no", "=== 3 passed, 1 error in 1.00s ==="], ["tests/a.py", "pytest -m gpu"]),
        ([], ["pytest -m gpu"]),
    ],
    ids=["passed", "error", "failed and stopped", "stopped", "not imported", "nothing printed"],
)
def test_tests_are_right_only_where_pytest_came_to_its_end_and_none_failed(printed, wrong):
    findings = runpy.run_path(str(ROOT / "scripts" / "gpu"))["findings"]
    rows_of_it = findings("tests", printed)
    assert [row["value"] if row["what"] == "failed" else row["what"] for row in rows_of_it if not row["ok"]] == wrong


def test_a_stage_of_tests_that_was_stopped_says_in_which():
    findings = runpy.run_path(str(ROOT / "scripts" / "gpu"))["findings"]
    printed = ["tests/a.py::t PASSED [ 50%]", "tests/a.py::u[a b] "]
    assert findings("tests", printed)[-1]["value"] == "1 passed, then stopped in tests/a.py::u[a b]"


def test_the_stage_of_tests_takes_every_file_with_a_test_for_a_gpu_and_no_warning_for_a_failure():
    """A library's deprecation of its own on a GPU ended the whole report."""
    script = runpy.run_path(str(ROOT / "scripts" / "gpu"))
    tests = script["files_with_gpu_tests"]()
    assert {"tests/kernels/test_attention.py", "tests/kernels/test_swiglu.py"} <= set(tests)
    words = script["command"]("tests", argparse.Namespace(tests=tests, pretend=False))
    assert words[words.index("pytest") :][3:5] == ["-W", "default"]
    assert words[-len(tests) :] == tests
