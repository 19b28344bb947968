"""How a training is shown: a screen where stderr is a terminal, plain lines where it is none, the folder on stdout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.cli.failure import print_line
from llmtune.common.printing import PrintLine
from llmtune.config.layers import ResolvedConfig
from llmtune.config.process_options import Options

if TYPE_CHECKING:
    from llmtune.tracking.screen import Screen
    from llmtune.training.result import Result

__all__ = ["TrainingOutput", "go_on_and_print", "open_training_output", "print_plan"]


@dataclass(frozen=True)
class TrainingOutput:
    """Where a training is shown. The command that trains holds it, and nothing of it stands between the two."""

    line: PrintLine
    screen: Screen | None
    """None where stderr is no terminal."""

    def print_result(self, result: Result) -> None:
        """Show how a run ended and what can be done with it."""
        from llmtune.training.progress import print_result

        print_result(result, self.line, self.screen)
        # On a screen it was just shown; a program reads it here.
        if result.folder is not None and not (self.screen and sys.stdout.isatty()):
            print(result.folder)


def open_training_output(*, verbose: bool) -> TrainingOutput:
    """Return the output of this process."""
    from llmtune.tracking.screen import open_screen

    screen = open_screen(verbose=verbose)
    return TrainingOutput(screen.line if screen else print_line, screen)


def go_on_and_print(resolved: ResolvedConfig, options: Options, *, verbose: bool) -> None:
    """Go on with the run that this command began before, or begin it, and show it."""
    from llmtune.training.auto_resume import find_own_run
    from llmtune.training.train import train_or_resume

    own = find_own_run(resolved, options)
    devices = own.joined[0]
    if devices.is_main:
        print_line(own.sentence())
    if own.path is not None and own.state == "finished":
        devices.close()
        if devices.is_main:
            print(own.path)
        return
    output = open_training_output(verbose=verbose)
    output.print_result(train_or_resume(own, options, print_line=output.line, screen=output.screen))


def print_plan(resolved: ResolvedConfig, options: Options, *, verbose: bool) -> None:
    """Print on stdout what is known of a run before its model is loaded."""
    from llmtune.tracking.screen import open_screen
    from llmtune.training.train import dry_run

    screen = open_screen(sys.stdout, verbose=verbose)
    dry_run(resolved, options, print_line=screen.line if screen else print, screen=screen)
