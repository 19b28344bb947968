"""`llmtune resume`: go on with a run, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.failure import print_line
from llmtune.cli.launch import launch, launches
from llmtune.cli.options import AllowChanges, Devices, NoCudaInTraining, Score, TrustRemoteCode
from llmtune.cli.process import prepare_process
from llmtune.common.offline import is_offline
from llmtune.config.process_options import Options

__all__ = ["resume", "resume_run"]


def resume(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|KEY=VALUE",
            help="A run's folder or name (the newest unfinished when not given), or one of its checkpoints; "
            "and overrides.",
        ),
    ] = None,
    devices: Devices = None,
    no_cuda: NoCudaInTraining = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_changes: AllowChanges = False,
    score: Score = None,
) -> int | None:
    """Go on with a run from its newest valid checkpoint, or from the one that is named."""
    if launches(devices):
        return launch(devices, context.find_root().obj)
    overrides = list(arguments or [])
    # A run's folder may have `=` in its name.
    has_run = bool(overrides) and ("=" not in overrides[0] or Path(overrides[0]).exists())
    run = overrides.pop(0) if has_run else None
    options = Options(no_cuda=no_cuda, offline=is_offline(), trust_remote_code=trust_remote_code, score=score)
    resume_run(run, overrides, options, allow_changes=allow_changes)
    return None


def resume_run(
    run: str | None,
    overrides: Sequence[str],
    options: Options,
    *,
    allow_changes: bool = False,
    checkpoint: Path | None = None,
) -> None:
    """Resume `run` (or the run of `checkpoint`) and show how it ended."""
    prepare_process(trains=True)
    from llmtune.training import train as training
    from llmtune.training.progress import print_result

    result = training.resume(
        run,
        overrides=overrides,
        options=options,
        allow_changes=allow_changes,
        checkpoint=checkpoint,
        print_line=print_line,
    )
    print_result(result, print_line)
    if result.folder is not None:
        print(result.folder)
