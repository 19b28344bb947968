"""`llmtune resume`: go on with a run, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.launch import launch, launches
from llmtune.cli.options import AllowChanges, Devices, NoCudaInTraining, Rewards, Score, TrustRemoteCode, Verbose
from llmtune.cli.train import resume_run
from llmtune.common.environment import is_offline
from llmtune.config.process_options import Options

__all__ = ["resume"]


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
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Of the run: step-N; the newest valid one when not given.")
    ] = None,
    devices: Devices = None,
    no_cuda: NoCudaInTraining = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_changes: AllowChanges = False,
    score: Score = None,
    reward: Rewards = None,
    verbose: Verbose = False,
) -> int | None:
    """Go on with a run from its newest valid checkpoint, or from the one that is named."""
    if devices is not None and launches(devices):
        return launch(devices, context.find_root().obj)
    overrides = list(arguments or [])
    # A run's folder may have `=` in its name.
    has_run = bool(overrides) and ("=" not in overrides[0] or Path(overrides[0]).exists())
    run = overrides.pop(0) if has_run else None
    options = Options(no_cuda, is_offline(), trust_remote_code, score, tuple(reward or ()))
    resume_run(run, overrides, options, allow_changes=allow_changes, checkpoint=checkpoint, verbose=verbose)
    return None
