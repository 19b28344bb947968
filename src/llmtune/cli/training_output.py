"""How a training is shown: a screen where stderr is a terminal, plain lines where it is none, the folder on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmtune.cli.failure import print_line
from llmtune.common.printing import PrintLine
from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options

if TYPE_CHECKING:
    from llmtune.tracking.screen import Screen
    from llmtune.training.training_run import Result

__all__ = ["print_plan", "show_training", "train_and_print"]


def show_training(training: Callable[[PrintLine, Screen | None], Result], *, verbose: bool) -> None:
    """Train, and show everything from the first fact to what can be done with the result."""
    from llmtune.tracking.screen import open_screen
    from llmtune.training.progress import print_result

    screen = open_screen(verbose=verbose)
    say = screen.line if screen else print_line
    result = training(say, screen)
    print_result(result, say, screen)
    # On a screen it was just shown; a program reads it here.
    if result.folder is not None and not (screen and sys.stdout.isatty()):
        print(result.folder)


def train_and_print(resolved: ResolvedConfig, options: Options, *, verbose: bool) -> None:
    """Train a new run and show it."""
    from llmtune.training.train import train

    show_training(lambda say, screen: train(resolved, options, print_line=say, screen=screen), verbose=verbose)


def print_plan(resolved: ResolvedConfig, options: Options, *, verbose: bool) -> None:
    """Print on stdout what is known of a run before its model is loaded."""
    from llmtune.tracking.screen import open_screen
    from llmtune.training.train import dry_run

    screen = open_screen(sys.stdout, verbose=verbose)
    dry_run(resolved, options, print_line=screen.line if screen else print, screen=screen)
