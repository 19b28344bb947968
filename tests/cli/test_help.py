"""The help of every command: it fits 80 columns and ends with examples that the program takes; completion of words."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.cli.commands import COMMANDS
from llmtune.cli.main import build, run
from llmtune.config.keys import LEAVES
from llmtune.training.progress import next_commands


def parsed(line):
    """(the command, its words, its options) of a command line; the shell's redirections are left out."""
    words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$| > \S+$', r"\1", line))
    assert words[0] == "llmtune"
    row = max(
        (row for row in COMMANDS if words[1:][: len(row.words.split())] == row.words.split()),
        key=lambda r: len(r.words),
    )
    command = build()
    for name in row.words.split():
        command = command.get_command(None, name)
    return row, command, words[1 + len(row.words.split()) :]


def refusals(line):
    """What the program would refuse in a command line: unknown options, unknown keys, missing or extra words."""
    _, command, words = parsed(line)
    context = command.make_context("llmtune", list(words), resilient_parsing=True)
    found = [f"extra {word}" for word in context.args]
    options = {option for parameter in command.params for option in parameter.opts}
    found += [word for word in words if word.startswith("-") and word.partition("=")[0] not in options]
    found += [
        parameter.name for parameter in command.params if parameter.required and not context.params[parameter.name]
    ]
    keys = [word.partition("=")[0] for word in words if re.match(r"[a-z_]+\.[a-z_.]+=", word)]
    return found + [key for key in keys if key not in LEAVES]


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.words)
def test_the_help_of_a_command_fits_80_columns_and_ends_with_its_examples(row, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*row.words.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert row.examples
    assert [line.strip() for line in lines[-len(row.examples) :]] == list(row.examples)
    assert lines[-len(row.examples) - 1].strip() == "Examples:"


@pytest.mark.parametrize("line", [line for row in COMMANDS for line in row.examples])
def test_an_example_is_a_command_line_that_the_program_takes(line):
    row, *_ = parsed(line)
    assert line in row.examples
    assert refusals(line) == []


def test_examples_with_a_wrong_option_or_key_are_told_apart():
    assert refusals("llmtune train --colour training.learning_rte=1") == ["--colour", "training.learning_rte"]
    assert refusals("llmtune merge-lora runs/A") == ["output"]


@pytest.mark.parametrize("is_adapter", [False, True])
def test_the_commands_at_the_end_of_a_run_are_taken_by_the_program(tmp_path, is_adapter):
    (tmp_path / "a run" / "final").mkdir(parents=True)
    if is_adapter:
        (tmp_path / "a run" / "final" / "adapter_config.json").touch()
    commands = [line for state in ("finished", "stopped") for _, line in next_commands(tmp_path / "a run", state)]
    assert len(commands) == 6 + is_adapter
    assert [refusals(line) for line in commands] == [[]] * len(commands)
    assert all(str(Path("a run")) in line for line in commands)


def test_after_a_training_of_scores_nobody_is_told_to_ask_for_text(tmp_path):
    commands = [line for _, line in next_commands(tmp_path / "run", "finished", gives_scores=True)]
    assert not any(word in line for line in commands for word in ("generate", "chat"))
    assert commands[0].startswith("llmtune predict ")
    assert [refusals(line) for line in commands] == [[]] * len(commands)


def test_the_list_of_commands_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_printed(shell, capsys):
    assert run(["completion", shell]) == 0
    assert "_LLMTUNE_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [("llmtune da", {"dashboard", "data"}), ("llmtune config sh", {"show"}), ("llmtune train --dry", {"--dry-run"})],
)
def test_words_are_completed(words, expected):
    environ = {
        **os.environ,
        "_LLMTUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run([sys.executable, "-m", "llmtune"], env=environ, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == expected, done.stderr
