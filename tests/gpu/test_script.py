"""`scripts/gpu` and `benchmarks/many_gpus.py`: what fails, hangs or is killed costs its own rows.

The table on the disk is whole at every moment.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANGING = """#!/bin/sh
echo 'a library says something'
echo '{"what": "a rate", "value": "1 | 2", "ok": true}'
case "$*" in
  *attention*) echo '{"what": "a product", "value": "no", "ok": false}'; echo 'broken for a reason' >&2; exit 3;;
  *engine*) exec sleep 60;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Starts `scripts/gpu` with stages that end, fail and hang at once."""
    stub, out = tmp_path / "python", tmp_path / "table.md"
    stub.write_text(HANGING)
    stub.chmod(0o755)

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "scripts/gpu", "--out", str(out), *arguments],
            cwd=ROOT,
            env={**os.environ, "LLMTUNE_PYTHON": str(stub)},
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


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_a_stage_it_leaves_a_whole_table(script, sign):
    start, out = script
    process = start("machine", "attention", "engine", "speed")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and "| engine | the stage | running |" not in (
        out.read_text() if out.exists() else ""
    ):
        time.sleep(0.01)
    os.kill(process.pid, sign)
    process.communicate(timeout=20)
    found = rows(out.read_text())
    assert [stage for stage, what, _ in found if what == "the stage"] == ["machine", "attention", "engine"]
    assert found[-1] == ("engine", "the stage", "running")
    if sign == signal.SIGKILL:  # then nobody was left to end its stage
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.campaign
def test_all_stages_run_on_a_pretend_gpu_and_nothing_fails(tmp_path):
    """Point 5 of what `scripts/gpu` promises: it is tried before it meets a GPU."""
    out = tmp_path / "table.md"
    tests = ["--tests", "tests/kernels/test_swiglu.py", "tests/kernels/test_attention.py"]
    arguments = ["scripts/gpu", "--pretend", "--minutes", "60", "--out", str(out), *tests]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert {row[0] for row in rows(out.read_text().partition("\n\n")[2])} == {
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
    assert {row[0] for row in rows(out.read_text().partition("\n\n")[2])} == {
        "machine", "rates", "alike", "speed", "ends",
    }  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "**failed**" not in done.stdout
