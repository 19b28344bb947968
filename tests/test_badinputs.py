"""Q8: every bad input ends with its exit code and one message of what, where and the fix; no traceback, nothing
half-made.

The corpus is data: one table a kind in `badinputs/`. A case lays out a working folder, runs one command line and states
the answer.
"""

import io
import os
import re
import shutil
import sys
import tempfile
from collections import Counter

import pytest

import badinputs_explained as explained
import badinputs_runner as runner
import fix_lines
from llmtune.cli.main import main
from llmtune.data.rendering.limits import Limits
from llmtune.data.rendering.renderer import Renderer
from training_fixtures import _one_thread, _planned_bytes, config_of, rows_file  # noqa: F401

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


@pytest.fixture
def try_fixes(capsys, monkeypatch):
    """Run every fix of an outcome, where it was laid out, and give those that the program refuses."""

    def refused(case, outcome, here, places):
        wrong = []
        if case.environ or case.child or not here.is_dir():
            return wrong  # the surroundings are at fault, not the words
        monkeypatch.chdir(here)
        for words in fix_lines.command_lines_in(outcome.err, runner.arguments_of(case, here, places)):
            monkeypatch.setattr(sys, "stdin", io.StringIO(""))
            with pytest.raises(SystemExit) as end:
                main(words)
            err = capsys.readouterr().err
            # What a file says wrongly stays wrong; the setting itself stands on the command line.
            is_setting, is_of_setting = words[:2] == ["config", "show"], "command line" in err
            if end.value.code == 2 and (is_of_setting or not is_setting):
                wrong.append((words, err))
        return wrong

    return refused


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
def test_q8_a_bad_input_ends_with_its_code_and_one_message(case, try_case, try_fixes, places, tmp_path):
    outcome = try_case(case)
    assert_answered(case, outcome)
    assert try_fixes(case, outcome, tmp_path / "top" / case.folder, places) == []
    if case in explained.CHOSEN:
        shown = explained.entry(case, outcome, tmp_path / "top" / case.folder, places)
        if os.environ.get("WRITE_EXPLAINED"):
            explained.write(shown)
        assert shown in explained.entries(), "what `llmtune explain` shows is old: see badinputs_explained.py"


@pytest.mark.campaign
@pytest.mark.parametrize("case", [case for case in CASES if case.code and not case.child], ids=lambda case: case.id)
def test_a_command_that_a_fix_names_is_run_and_not_refused(case, try_case, places, tmp_path, capsys, monkeypatch):
    outcome = try_case(case)
    here, run = tmp_path / "top" / case.folder, tmp_path / "the run"
    if not here.is_dir() or case.environ:
        return
    shutil.copytree(places["run"], run, symlinks=True)
    given = {"RUN": run, "FOLDER": run.parent, "MODEL": places["model"], "ADAPTER": run / "checkpoints" / "final"}
    places_of_words = {**{word: str(path) for word, path in given.items()}, "N": "2", "NEW": str(tmp_path / "new")}
    for words in fix_lines.filled_command_lines(outcome.err, places_of_words):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as end:
            main([*words, "--dry-run"] if words[0] == "train" else words)
        err = capsys.readouterr().err
        # Named without what it is to work on, a command asks for that.
        assert end.value.code != 2 or re.search("Missing (argument|option)|no training data is named", err), (
            words,
            err,
        )


TAKES_SETTINGS = ("train", "data preview", "data report", "plan", "config show", "resume", "verify")


@pytest.mark.campaign
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.code and not case.child and case.command.startswith(TAKES_SETTINGS)],
    ids=lambda case: case.id,
)
def test_a_setting_that_a_fix_proposes_heals_the_command_that_was_typed(case, try_case, places, tmp_path, capsys):
    outcome = try_case(case)
    here = tmp_path / "top" / case.folder
    if not here.is_dir():
        return
    said = runner.problems_in(outcome.err)
    for fix, attempts in fix_lines.healed_command_lines(outcome.err, runner.arguments_of(case, here, places)):
        left = []
        for words in attempts:
            with pytest.raises(SystemExit):
                main([*words, "--dry-run"] if words[0] == "train" and "--dry-run" not in words else words)
            left.append(said & runner.problems_in(capsys.readouterr().err))
        assert any(still < said or not said for still in left), f"{fix!r} heals nothing of {said}"


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


@pytest.mark.parametrize(
    "fix",
    [
        "set `training.epochs: none`",
        "set `checkpoint.final: best`",  # of this config, which holds nothing out
        "run `llmtune resum here`",
        "run `llmtune generate here --shorter`",
        "say --allow-everything to go on",
    ],
)
def test_a_fix_that_would_be_refused_is_found_by_running_it(fix, try_fixes, places, tmp_path):
    case = next(case for case in CASES if case.id == "config-three-problems")
    here = tmp_path / "top" / case.folder
    here.mkdir(parents=True)
    (here / "bad.yaml").write_text("run: {seed: 1}\n")
    outcome = runner.RowResult(2, "", f"error: bad\n  fix: {fix}\n", [])
    ((words, _),) = try_fixes(case, outcome, here, places)
    assert words[0] in ("config", "resum", "generate", "train")


def test_a_fix_becomes_the_command_lines_by_which_it_is_tried():
    err = (
        "  fix: set `a.b: 1` or `a.c=x`, or run `llmtune runs` or `llmtune resume RUN`; say --allow-changes to go on\n"
    )
    assert fix_lines.command_lines_in(err, ["train", "-c", "c.yaml", "d.e=2", "--no-cuda"]) == [
        ["config", "show", "-c", "c.yaml", "d.e=2", "a.b=1"],
        ["config", "show", "-c", "c.yaml", "d.e=2", "a.c=x"],
        ["runs"],
        ["train", "-c", "c.yaml", "d.e=2", "--no-cuda", "--allow-changes"],
    ]
