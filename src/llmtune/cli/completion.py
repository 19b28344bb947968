"""Completion of words in a shell: the script that a shell loads, and the answers it asks the program for."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.completion import completion_init, get_completion_script, shell_complete

__all__ = ["answer_shell", "completion"]

VARIABLE = "_LLMTUNE_COMPLETE"
"""The shell asks by running the program with this variable."""


class Shell(StrEnum):
    """Shells with a script."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="The shell that loads it.")]) -> None:
    """Print a script; a shell that loads it completes commands and options of llmtune."""
    print(get_completion_script(prog_name="llmtune", complete_var=VARIABLE, shell=shell.value))


def answer_shell(program: Any) -> int:
    """Answer a shell that asks for words, and return the exit code."""
    completion_init()
    return shell_complete(program, {}, "llmtune", VARIABLE, os.environ[VARIABLE])
