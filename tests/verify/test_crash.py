"""P1, P2, P6: `verify crash` kills at random moments, tells their phase from the run folder, and finds no run lost."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from llmtune.verify.crash import PHASES, Trace, phase_between, trace_of, verify_crash
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


def test_p1_verify_crash_kills_at_random_moments_and_passes(given, memory):
    record = memory / "kills.jsonl"
    verdict = verify_crash(None, given, memory / "runs", steps=3, kills=3, print_line=silent, record=record)
    assert verdict.passed, verdict.lines()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["identical"] * 3
    assert {line["phase"] for line in lines} <= set(PHASES)
    assert list((memory / "runs").glob("life-*")) == []


NO_RUN = Trace(is_run=False, last_line={}, unfinished=frozenset())
NEW_RUN = NO_RUN._replace(is_run=True)
PART = frozenset({".llmtune-part-1"})


@pytest.mark.parametrize(
    ("before", "after", "phase"),
    [
        (NO_RUN, NO_RUN, "starting"),
        (NO_RUN, NEW_RUN, "training"),
        (NO_RUN, NEW_RUN._replace(last_line={"step": 2}), "training"),
        (NO_RUN, NEW_RUN._replace(last_line={"step": 2}, unfinished=PART), "saving"),
        (NO_RUN, NEW_RUN._replace(last_line={"step": 3}, unfinished=PART), "finishing"),
        (NEW_RUN, NEW_RUN, "resuming"),
        (NEW_RUN._replace(unfinished=PART), NEW_RUN._replace(unfinished=PART), "resuming"),
        (NEW_RUN._replace(unfinished=PART), NEW_RUN._replace(last_line={"step": 1}), "training"),
        (NEW_RUN._replace(last_line={"step": 3}), NEW_RUN._replace(last_line={"step": 3}), "resuming"),
    ],
)
def test_the_phase_of_a_kill_is_told_from_the_folder_before_and_after(before, after, phase):
    assert phase_between(before, after, steps=3) == phase


def test_the_trace_of_a_run_folder_is_its_last_line_and_its_unfinished_folders(tmp_path):
    assert trace_of(tmp_path / "none") == NO_RUN
    (tmp_path / "checkpoints" / ".llmtune-part-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002").mkdir()
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert trace_of(tmp_path) == Trace(is_run=True, last_line={"step": 2}, unfinished=PART)


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
