"""`llmtune sync`: a run that is over, sent to wandb or written for TensorBoard."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Literal

import typer

from llmtune.common.environment import is_offline
from llmtune.common.text import print_line
from llmtune.errors import MachineError, UsageError

__all__ = ["sync"]

UPLOAD_TIMEOUT_S = 3600.0


def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or name of a run.")],
    to: Annotated[Literal["wandb", "tensorboard"], typer.Option("--to", help="Where to send it.")] = "wandb",
    artifact: Annotated[bool, typer.Option("--artifact", help="Send the final model too (wandb).")] = False,
    output_dir: Annotated[str, typer.Option("--runs", metavar="DIR", help="Folder of runs with names.")] = "runs",
) -> None:
    """Send a run's record to wandb, or write it for TensorBoard; what wandb kept offline goes by `wandb sync`."""
    from llmtune.config.layers import load_config
    from llmtune.runs.folder import config_file_of, resolve_run
    from llmtune.tracking.replay import replay
    from llmtune.tracking.tensorboard import TensorBoardTracker
    from llmtune.tracking.wandb import WandbTracker

    folder = resolve_run(run, output_dir)
    if to == "tensorboard":
        if artifact:
            raise UsageError("TensorBoard takes no artifacts", "--artifact", "leave it out, or send to wandb")
        if any((folder / "tensorboard").glob("events.*")):
            raise UsageError("this run has its TensorBoard files already", str(folder / "tensorboard"))
        count = replay(folder, TensorBoardTracker())
        print_line(f"{count:,} lines are in {folder / 'tensorboard'}")
        return
    tracking = load_config(str(config_file_of(folder)), environ={}).config.tracking
    offline_runs = sorted((folder / "wandb").glob("offline-run-*"))
    if offline_runs and not artifact:
        _upload_offline([str(path) for path in offline_runs])
        return
    tracker = WandbTracker(
        tracking.project,
        tags=tracking.tags,
        mode="offline" if is_offline() else None,
        entity=tracking.wandb_entity,
        group=tracking.wandb_group,
        finish_timeout_s=UPLOAD_TIMEOUT_S,
    )
    model = folder / "checkpoints" / "final" if artifact else None
    if model is not None and not model.is_dir():
        raise UsageError("this run has no final model", str(folder), "leave --artifact out")
    count = replay(folder, tracker, model=model)
    print_line(f"{count:,} lines were given to wandb")


def _upload_offline(folders: list[str]) -> None:
    """Run wandb's own upload of what it kept."""
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], check=False)  # noqa: S603
    if done.returncode:
        fix = "read what wandb says above; `wandb login` stores a key"
        raise MachineError(f"`wandb sync` ended with {done.returncode}", folders[0], fix)
