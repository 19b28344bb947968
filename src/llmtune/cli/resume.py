"""`llmtune resume`: go on with a run, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.failure import print_line

__all__ = ["go_on", "resume"]


def resume(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|KEY=VALUE",
            help="A run's folder or name (the newest unfinished when not given), and overrides.",
        ),
    ] = None,
    no_cuda: Annotated[
        bool, typer.Option("--no-cuda", help="Train on the CPU even where there is a CUDA device.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes", help="Go on although something changed that makes it another training from here."
        ),
    ] = False,
) -> None:
    """Go on with a run from its newest valid checkpoint."""
    given = list(arguments or [])
    run = given.pop(0) if given and ("=" not in given[0] or Path(given[0]).exists()) else None
    go_on(run, given, no_cuda=no_cuda, trust_remote_code=trust_remote_code, allow_changes=allow_changes)


def go_on(
    run: str | None,
    overrides: Sequence[str],
    *,
    no_cuda: bool,
    trust_remote_code: bool,
    allow_changes: bool = False,
    checkpoint: Path | None = None,
) -> None:
    """Resume `run` (or the run of `checkpoint`) and show how it ended."""
    from llmtune.cli.process import prepare_process

    prepare_process(trains=True)
    from llmtune.cli.result import show_result
    from llmtune.common.offline import is_offline
    from llmtune.config.process_options import Options
    from llmtune.training import train as training

    options = Options(no_cuda=no_cuda, offline=is_offline(), trust_remote_code=trust_remote_code)
    show_result(
        training.resume(
            run,
            overrides=overrides,
            options=options,
            allow_changes=allow_changes,
            checkpoint=checkpoint,
            print_line=print_line,
        )
    )
