"""`llmtune verify ...`: commands that prove a claim of llmtune on this machine, or show the first difference."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import Overrides
from llmtune.cli.process import prepare_process
from llmtune.common.environment import is_offline
from llmtune.common.text import print_line
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.runs.folder import resolve_run

if TYPE_CHECKING:
    from llmtune.verify.result import Verdict

__all__ = ["batching", "checkpoint", "crash", "merge", "packing", "preference", "resume"]

ConfigName = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A preset or a file; the test preset with custom-nano when not given."),
]
Steps = Annotated[int, typer.Option("--steps", min=2, help="Steps of the training that is tried.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")]

DEFAULT = ("test", ["model.name=custom-nano", "data.max_samples=24"])
OF_PAIRS = ("data.train=example:preferences/pairs", "objective.method=dpo")


def resume(
    overrides: Overrides = None,
    config: ConfigName = None,
    steps: Steps = 8,
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often the run is killed with SIGKILL.")] = 2,
) -> None:
    """Kill a run with SIGKILL, resume it, and compare it byte for byte with the run nobody stopped."""
    prepare_process()
    from llmtune.verify.resumed_run import verify_resume

    name, edits = _config(config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        _end(verify_resume(name, edits, Path(folder), steps=steps, kills=kills, print_line=print_line))


def crash(
    overrides: Overrides = None,
    config: ConfigName = None,
    steps: Steps = 4,
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often a process is killed with SIGKILL.")] = 12,
    seed: Annotated[int, typer.Option("--seed", help="Decides the moments of the kills.")] = 0,
    through_commands: Annotated[
        bool,
        typer.Option("--through-commands", help="Kill the real `llmtune train` and `llmtune resume` (slower)."),
    ] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Add one JSON line for each kill to this file.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="Work in this folder and leave there what differs, instead of a temporary one."),
    ] = None,
) -> None:
    """Kill runs at random moments, resume them, and compare them byte for byte with the run nobody stopped."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the threads of OpenMP do not survive a fork
    prepare_process()
    from llmtune.verify.crash import verify_crash

    name, edits = _config(config, overrides)
    with contextlib.nullcontext(str(keep)) if keep is not None else tempfile.TemporaryDirectory() as folder:
        _end(
            verify_crash(
                name,
                edits,
                Path(folder),
                steps=steps,
                kills=kills,
                print_line=print_line,
                seed=seed,
                through_commands=through_commands,
                record=record,
            )
        )


def batching(overrides: Overrides = None, config: ConfigName = None) -> None:
    """Compare loss and gradients of one window, cut into micro-batches in several ways."""
    resolved = _resolved(config, overrides)
    prepare_process()
    from llmtune.verify.numbers import verify_batching

    _end(verify_batching(resolved, Options(offline=is_offline()), print_line=print_line))


def packing(overrides: Overrides = None, config: ConfigName = None) -> None:
    """Compare packed rows with rows alone, and change one row to see whether a neighbour moves."""
    resolved = _resolved(config, overrides)
    prepare_process()
    from llmtune.verify.numbers import verify_packing

    _end(verify_packing(resolved, Options(offline=is_offline()), print_line=print_line))


def preference(overrides: Overrides = None, config: ConfigName = None) -> None:
    """Check start, cut, swap and reference of a loss that compares answers, on the config's own rows."""
    resolved = _resolved(config, overrides if config else [*OF_PAIRS, *(overrides or [])])
    prepare_process()
    from llmtune.verify.preference import verify_preference

    _end(verify_preference(resolved, Options(offline=is_offline()), print_line=print_line))


def checkpoint(run: Run) -> None:
    """Re-read every byte of a run's checkpoints, and show that damage to a copy is found."""
    prepare_process()
    from llmtune.verify.file_checks import verify_checkpoint

    _end(verify_checkpoint(resolve_run(run, "runs"), print_line=print_line))


def merge(run: Run) -> None:
    """Merge a run's adapter into a scratch folder and compare its logits with base plus adapter."""
    prepare_process()
    from llmtune.verify.file_checks import verify_merge

    _end(verify_merge(resolve_run(run, "runs"), offline=is_offline(), print_line=print_line))


def _config(config: str | None, overrides: list[str] | None) -> tuple[str, list[str]]:
    return (config, overrides or []) if config else (DEFAULT[0], [*DEFAULT[1], *(overrides or [])])


def _resolved(config: str | None, overrides: list[str] | None) -> ResolvedConfig:
    name, edits = _config(config, overrides)
    return load_config(name, overrides=edits)


def _end(verdict: Verdict) -> None:
    """Print the verdict; exit code 5 where a claim does not hold."""
    for line in verdict.lines():
        print(line)
    if not verdict.passed:
        raise typer.Exit(5)
