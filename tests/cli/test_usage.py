"""Q8: what people bring from other programs - flags, bare files, names of runs - is answered with the words that work
here.
"""

from __future__ import annotations

import re
import sys

import pytest

from llmtune.cli import failure
from llmtune.cli.main import COMMANDS, MAY_BE_BLANK, MAY_BE_EMPTY, build, run
from llmtune.errors import DataError, Problem


@pytest.fixture(autouse=True)
def _a_folder_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "a-model").mkdir()
    (tmp_path / "a-model" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config", "test", "--lr", "1e-4"], ["no option `--lr`", "write `training.learning_rate=1e-4`"]),
        (["train", "--num-train-epochs=3"], ["write `training.epochs=3`"]),
        (["train", "--lora_r", "8"], ["write `adapter.r=8`"]),
        (["train", "--training.batch_size", "4"], ["write `training.batch_size=4`"]),
        (["train", "--packing", "--config", "test"], ["write `data.packing=VALUE`"]),
        (
            ["train", "--every-steps", "5"],
            ["`evaluation.every_steps=5` or `checkpoint.every_steps=5` or `tracking.every_steps=5`"],
        ),
        (["plan", "-m", "custom-nano"], ["write `model.name=custom-nano`"]),
        (["data", "report", "--samples", "9"], ["write `data.max_samples=9`"]),
        (["train", "--confg", "test"], ["--confg", "--config", "`llmtune train --help`"]),
        (["config", "schema", "--lr", "1"], ["--lr", "`llmtune config schema --help`"]),
    ],
)
def test_an_option_of_another_program_is_answered_with_our_key(arguments, words, capsys):
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("rows.jsonl", "did you mean `data.train=rows.jsonl`?"),
        ("a-model", "did you mean `model.name=a-model`?"),
        ("model.gguf", "did you mean `model.name=model.gguf`?"),
        ("example:conversations", "did you mean `data.train=example:conversations`?"),
        ("production", "did you mean `--config production`?"),
        ("mine.yaml", "did you mean `--config mine.yaml`?"),
        ("nonsense", "write for example `training.batch_size=4`"),
        ("training.epochs:3", "write `training.epochs=3`"),
        ("data.train[0]=a.jsonl", "write `data.train=[a.jsonl]`"),
        ("data.train+=a.jsonl", "write `data.train=[a.jsonl]`"),
        ("training.batch_size+=4", "write `training.batch_size=4`"),
    ],
)
def test_a_bare_word_is_answered_with_the_name_it_lacks(word, fix, capsys):
    assert run(["config", "show", word]) == 2
    assert f"error: `{word}` is not KEY=VALUE\n  where: command line\n  fix: {fix}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["[*.q_proj]", "{a", '["x"', "[%x]"])
def test_a_value_that_is_no_yaml_is_one_problem_of_the_command_line(value, capsys):
    assert run(["config", "show", f"adapter.target_modules={value}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(("error: not valid YAML: ", "error: character")), said
    assert f"(`{value}`)\n  where: command line\n  fix: put the whole setting in single quotes" in said


def test_a_value_of_the_wrong_kind_is_said(capsys):
    assert run(["train", "--samples", "many"]) == 2
    assert "`many`" in capsys.readouterr().err
    assert run(["generate", "m", "hi", "--top-p=3"]) == 2
    said = capsys.readouterr().err
    assert "`3`" in said
    assert "--top-p" in said


def test_an_option_without_its_value_names_the_help_of_its_command(capsys):
    assert run(["--offline", "config", "show", "--config"]) == 2
    assert "fix: `llmtune config show --help` shows what it takes" in capsys.readouterr().err


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.words)
def test_an_empty_value_is_refused_by_every_option_that_takes_a_text(row, capsys):
    """`--from "$RUN"` with no such variable would be the working folder, `--score ""` no score at all."""
    words = row.words.split()
    command = build()
    for word in words:
        command = command.get_command(None, word)
    options = [each for each in command.params if each.param_type_name == "option" and not each.is_flag]
    texts = [each for each in options if each.name not in MAY_BE_EMPTY]
    for option in texts:
        for empty in ("",) if option.name in MAY_BE_BLANK else ("", " "):
            assert run([*words, f"{option.opts[0]}={empty}"]) == 2
            said = capsys.readouterr().err
            assert f"`{option.opts[0]}` is empty" in said or f"it is `{empty}`" in said, said


@pytest.mark.parametrize("words", ["generate", "resume", "merge-lora", "runs", "report", "dashboard", "init", "docs"])
def test_an_empty_argument_is_refused(words, capsys):
    assert run([words, ""]) == 2
    assert "is empty\n  where: command line\n  fix: give it a value, or leave it out;" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["generate", "nosuch", "hi"], ["evaluate", "nosuch"], ["export", "nosuch", "--output", "x"]]
)
def test_a_name_that_is_neither_run_nor_model_is_refused_as_both(command, capsys):
    assert run(command) == 4
    said = capsys.readouterr().err
    assert "where: RUN|MODEL" in said
    assert "`llmtune runs` lists the runs" in said


def test_a_run_is_merged_by_its_name(tmp_path, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert run(["merge-lora", "mine", "--output", "merged"]) == 4
    assert "there is no adapter here\n  where: runs/mine" in capsys.readouterr().err


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.words)
def test_a_usage_line_wraps_each_argument_once(row, capsys):
    assert run([*row.words.split(), "--help"]) == 0
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert re.findall(r"\[\[|\]\]|\]\.\.\.\]", usage) == [], usage


def test_a_number_of_rows_that_is_estimated_is_said_to_be(monkeypatch):
    from llmtune.training import progress as reporting

    monkeypatch.setattr(reporting, "PROGRESS_EVERY_S", 0.0)
    said = []
    progress = reporting.tokenizing_progress(said.append)
    progress(2048, 3010, 940.0)
    progress(2048, None, 940.0)
    progress(3000, 3000, 940.0)
    assert said == [
        "tokenizing: 2,048 of about 3,010 rows, 940 rows/s",
        "tokenizing: 2,048 rows, 940 rows/s",
        "tokenizing: 3,000 of 3,000 rows, 940 rows/s",
    ]


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [(80, ["licence", "context", "source"]), (120, ["licence", "context"]), (200, []), (None, [])],
)
def test_the_models_fit_the_terminal_and_what_is_left_out_is_said(columns, left_out, monkeypatch, capsys):
    """In a pipe (no width) every column is there."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: columns is not None, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns or 40))
    assert run(["list-models"]) == 0
    captured = capsys.readouterr()
    headings = captured.out.splitlines()[0].split()
    assert headings == [
        one for one in ("name", "parameters", "context", "source", "licence", "here", "method") if one not in left_out
    ]
    assert max(map(len, captured.out.splitlines())) <= (columns or 1000)
    said = f"a wider terminal also shows {' and '.join(left_out)}; --json gives everything"
    assert (said in captured.err) == bool(left_out)


def test_a_folder_without_runs_is_told_from_one_that_is_not_there(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(["runs", "empty"]) == run(["runs", "nowhere"]) == 0
    assert capsys.readouterr().err == "no runs in empty\nno runs in nowhere: there is no such folder\n"


def test_a_fix_that_is_the_same_for_several_problems_is_said_once():
    error = DataError.all(
        [
            Problem("one", "a:1", "fix it"),
            Problem("two", "a:2", "fix it"),
            Problem("three", "a:3", "else"),
            Problem("four"),
        ]
    )
    assert failure.message(error).splitlines() == [
        "error: 4 problems",
        "  a:1: one",
        "  a:2: two",
        "    fix: fix it (for the 2 above)",
        "  a:3: three",
        "    fix: else",
        "  four",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--model", "custom-nano", "-m", "custom-tiny"],
        ["train", "--samples=1", "--samples", "2"],
        ["verify", "batching", "-c", "test", "-c", "test"],
        ["generate", "x", "--max-new-tokens", "1", "--max-new-tokens", "2"],
    ],
)
def test_an_option_given_twice_is_refused(arguments, capsys):
    assert run(arguments) == 2
    assert "is given twice\n  where: command line\n  fix: give it once" in capsys.readouterr().err


def test_two_configs_and_a_repeated_key_are_said(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("training: {epochs: 5}\n")
    arguments = ["-c", "mine.yaml", "-c", "test", "run.seed=1", "run.seed=2"]
    for command in (["config", "show", *arguments], ["data", "report", *arguments, "data.train=no.jsonl"]):
        run(command)
        err = capsys.readouterr().err
        assert "`test` comes last, so it sets `training.epochs` again" in err
        assert "`run.seed` is given twice; the last one wins: `2`" in err


@pytest.mark.parametrize("words", [["completion"], ["completion", "powershell"]])
def test_a_choice_that_is_missing_or_wrong_is_one_line_with_every_choice(capsys, words):
    assert run(words) == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert error.startswith("error: ")
    assert all(shell in error for shell in ("bash", "zsh", "fish"))
    assert "Value error" not in error


def test_a_key_behind_a_command_that_takes_none_is_sent_to_the_config(capsys):
    assert run(["sweep", "s.yaml", "training.max_steps=3"]) == 2
    error = capsys.readouterr().err
    assert "`llmtune sweep` takes no KEY=VALUE, such as `training.max_steps=3`" in error
    assert "write it into the config" in error
