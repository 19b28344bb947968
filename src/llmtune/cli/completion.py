"""Completion of words in a shell: the script that a shell loads, and the answers it asks the program for."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer._completion_classes import completion_init
from typer.completion import shell_complete

__all__ = ["answer_shell", "completion"]

VARIABLE = "_LLMTUNE_COMPLETE"
"""The shell asks by running the program with this variable."""


class Shell(StrEnum):
    """Shells with a script."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(context: typer.Context, shell: Annotated[Shell, typer.Argument(help="The shell that loads it.")]) -> int:
    """Print a script; a shell that loads it completes commands and options of llmtune."""
    completion_init()
    return shell_complete(context.find_root().command, {}, "llmtune", VARIABLE, f"source_{shell.value}")


def answer_shell(program: Any) -> int:
    """Answer a shell that asks for words, and return the exit code."""
    completion_init()
    return shell_complete(program, {}, "llmtune", VARIABLE, os.environ[VARIABLE])
