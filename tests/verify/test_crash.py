"""P1, P2, P6: `verify crash` kills in every phase, by time and by file operation, and notices what a mutant loses."""

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from llmtune.verify.crash import verify_crash
from llmtune.verify.kill_points import ATTACKED, PHASES
from llmtune.verify.launch import Forked, Kill
from training_helpers import LORA


def silent(line):
    pass


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where the machine has such a place: waiting for a disk at every sync shows nothing here."""
    place = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=place)) if os.access(place, os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def given(tiny_model_folder, rows_file):
    return [
        f"model.name={tiny_model_folder}",
        f"data.train={rows_file}",
        "data.test_size=4",
        *LORA,
        "training.batch_size=2",
    ]


def test_p1_verify_crash_kills_by_time_and_by_operation_and_passes(given, memory):
    record = memory / "kills.jsonl"
    verdict = verify_crash(None, given, memory / "runs", steps=3, kills=4, print_line=silent, record=record)
    assert verdict.passed, verdict.lines()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert Counter(line["how"] for line in lines) == {"time": 2, "call": 2}
    assert {line["outcome"] for line in lines} == {"identical"}
    assert {line["phase"] for line in lines} <= set(PHASES)
    assert {line["phase"] for line in lines if line["how"] == "call"} <= set(ATTACKED)
    assert list((memory / "runs").glob("life-*")) == []


def test_a_killed_process_tells_its_phase_and_its_operations(given, memory):
    forked = Forked(
        None, [*given, "training.max_steps=2", f"run.output_dir={memory}", "tracking.trackers=[jsonl]"], memory
    )
    whole = forked.train("whole")
    assert (whole.code, whole.phase) == (0, "start")
    assert whole.calls > 50
    killed = forked.train("killed", Kill(at_call=whole.calls // 2))
    assert killed.was_killed
    assert killed.calls == whole.calls // 2
    assert killed.phase in ATTACKED
    late = forked.train("late", Kill(after_s=3600.0))
    assert not late.was_killed


@pytest.mark.campaign
@pytest.mark.parametrize("through_commands", [False, True], ids=["forked", "commands"])
def test_p2_a_campaign_of_kills_loses_no_run(given, memory, through_commands):
    """The published thousand are `llmtune verify crash --kills 500` on two configs, and `--through-commands`; see
    docs/reliability.md.
    """
    kills = 20 if through_commands else 200
    verdict = verify_crash(
        None, given, memory, steps=6, kills=kills, print_line=silent, seed=7, through_commands=through_commands
    )
    assert verdict.passed, verdict.lines()
