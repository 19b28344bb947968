"""Q8: every bad input ends with its exit code and one message of what, where and the fix; no traceback, nothing
half-made.

The corpus is data: one table a kind in `badinputs/`. A case lays out a working folder, runs one command line and states
the answer.
"""

import os
import re
import tempfile
from collections import Counter

import pytest

import badinputs_explained as explained
import badinputs_runner as runner
import fix_lines
from llmtune.data.rendering.limits import Limits
from llmtune.data.rendering.renderer import Renderer
from training_fixtures import _one_thread, config_of, rows_file  # noqa: F401

CASES = runner.cases()
KINDS = {"adapters", "checkpoints", "commands", "configs", "data", "environments", "models", "templates", "tokenizers"}


@pytest.fixture(scope="session")
def places(tiny_model_folder, rows_file, tmp_path_factory):  # noqa: F811
    """A model, rows, a run of four steps that kept each checkpoint, and its adapter; cases copy what they spoil."""
    from llmtune.config.layers import load_config
    from llmtune.training import train as training

    keys = {
        "model.name": tiny_model_folder, "data.train": rows_file, "run.output_dir": tmp_path_factory.mktemp("runs"), "run.name": "run",  # noqa: E501
        "data.max_samples": 16, "training.epochs": 1, "training.batch_size": 4, "training.precision": "fp32",
        "training.learning_rate": 0.01,
        "adapter.method": "lora", "adapter.r": 2, "checkpoint.every_steps": 2, "tracking.trackers": "[jsonl]",
    }  # fmt: skip
    resolved = load_config(None, overrides=[f"{key}={value}" for key, value in keys.items()], environ={})
    run = training.train(resolved).folder
    return {
        "long": "a" * 300,
        "model": tiny_model_folder,
        "rows": rows_file,
        "run": run,
        "adapter": run / "checkpoints" / "final",
    }


@pytest.fixture
def try_case(places, tmp_path, monkeypatch, capsys):
    """Lay a case out, run it, and return its outcome."""

    def attempt(case):
        here = runner.lay_out(case, tmp_path / "top", places)
        temporary, home = tmp_path / "temporary", tmp_path / "home"
        temporary.mkdir()
        home.mkdir()
        for name in [
            name for name in os.environ if name.startswith(("LLMTUNE_", "WANDB_")) and name != "LLMTUNE_CACHE_DIR"
        ]:
            monkeypatch.delenv(name)
        environ = {
            "HOME": home,
            "TMPDIR": temporary,
            "XDG_STATE_HOME": home / "state",
            "HF_HUB_OFFLINE": 1,
            "COLUMNS": 80,
            **case.environ,
        }
        for name, value in environ.items():
            monkeypatch.setenv(name, runner.filled(str(value), here, places))
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        monkeypatch.setitem(Renderer.__init__.__kwdefaults__, "limits", Limits(seconds=0.5))
        monkeypatch.chdir(here)
        before = runner.seen(here, temporary, home)
        capsys.readouterr()
        code, out, err = (
            runner.start(case, here, places) if case.child else runner.run_here(case, here, places, capsys, monkeypatch)
        )
        new = runner.changes(before, runner.seen(here, temporary, home), case, here)
        return runner.RowResult(code, out, err, new)

    return attempt


def assert_answered(case, outcome):
    """The law: its code, one message that says what and where or the fix, and nothing left behind."""
    text = runner.one_line(outcome.err)
    assert outcome.code == case.code, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    if case.code:
        assert len(re.findall("^error: ", outcome.err, re.MULTILINE)) == 1, outcome.err
        assert re.search(r"fix: |where: |^stopped", text), f"neither place nor fix: {outcome.err}"
    for part in case.says.split(" & "):
        assert re.search(part, text), f"{part!r} is not in: {outcome.err}"
    assert outcome.new == [], f"left behind: {outcome.new}"
    assert fix_lines.refused_in(outcome.err, case.command) == [], outcome.err


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_q8_a_bad_input_ends_with_its_code_and_one_message(case, try_case, places, tmp_path):
    outcome = try_case(case)
    assert_answered(case, outcome)
    if case in explained.CHOSEN:
        shown = explained.entry(case, outcome, tmp_path / "top" / case.folder, places)
        if os.environ.get("WRITE_EXPLAINED"):
            explained.write(shown)
        assert shown in explained.entries(), "what `llmtune explain` shows is old: see badinputs_explained.py"


def test_what_explain_shows_is_of_this_corpus_and_nothing_else():
    shown = explained.entries()
    assert {one["id"] for one in shown} == {case.id for case in explained.CHOSEN}
    assert set(explained.KINDS.values()) | {"machine"} == {one["kind"] for one in shown}
    assert all(count >= 3 for count in Counter(one["kind"] for one in shown).values())


def test_q8_the_corpus_is_whole():
    assert {case.kind for case in CASES} == KINDS
    assert len(CASES) >= 150
    assert [one for one, times in Counter(case.id for case in CASES).items() if times > 1] == []
    bad = [case for case in CASES if case.code]
    assert len(bad) >= 150
    assert {case.code for case in bad} >= {2, 3, 4, 5, 6}
