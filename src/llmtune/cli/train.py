"""`llmtune train`: a new run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.launch import launch, launches
from llmtune.cli.options import (
    AllowChanges,
    ConfigName,
    Devices,
    MaxRestarts,
    NoCudaInTraining,
    Overrides,
    Rewards,
    Score,
    TrustRemoteCode,
    Verbose,
)
from llmtune.cli.process import prepare_process
from llmtune.common.environment import home_expanded, is_offline
from llmtune.common.text import PrintLine, print_line, printable
from llmtune.config.arguments import FLAGS
from llmtune.config.layers import ResolvedConfig, load_config
from llmtune.config.process_options import Options
from llmtune.config.schema import RunConfig
from llmtune.errors import CheckpointError, UsageError
from llmtune.runs.run_file import RUN_FILE

if TYPE_CHECKING:
    from llmtune.tracking.screen import Screen
    from llmtune.training.progress import Result

__all__ = ["TrainingOutput", "go_on_and_print", "open_training_output", "print_plan", "resume_run", "train"]


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
        devices.close(wait_for_main=True)
        if devices.is_main:
            print(own.path)
        return
    output = open_training_output(verbose=verbose)
    output.print_result(train_or_resume(own, options, print_line=output.line, screen=output.screen))


def resume_run(
    run: str | None,
    overrides: Sequence[str],
    options: Options,
    *,
    allow_changes: bool = False,
    checkpoint: Path | str | None = None,
    verbose: bool = False,
) -> None:
    """Resume `run` (or the run of `checkpoint`) and show how it ended."""
    prepare_process(trains=True)
    from llmtune.training import train as training

    output = open_training_output(verbose=verbose)
    result = training.resume(
        run,
        overrides=overrides,
        options=options,
        allow_changes=allow_changes,
        checkpoint=checkpoint,
        print_line=output.line,
        screen=output.screen,
    )
    output.print_result(result)


def print_plan(resolved: ResolvedConfig, options: Options, *, verbose: bool) -> None:
    """Print on stdout what is known of a run before its model is loaded."""
    from llmtune.tracking.screen import open_screen
    from llmtune.training.train import dry_run

    screen = open_screen(sys.stdout, verbose=verbose)
    dry_run(resolved, options, print_line=screen.line if screen else print, screen=screen)


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A name of `llmtune list-models`, a folder, a .gguf file, a hub id."),
]
Samples = Annotated[int | None, typer.Option("--samples", "-s", help="Use at most this many training rows.")]
Project = Annotated[str | None, typer.Option("--project", "-p", help="Project name for trackers that have projects.")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", help="Folder in which the run's folder is made.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
ListModels = Annotated[bool, typer.Option("--list-models", help="List the models that have a name, and stop.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="RUN|FOLDER", help="Start from what was trained: a run, an adapter, a model's folder."
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto",
        help="Go on with the run that this very command began before, or begin it: for jobs that are started again.",
    ),
]
ResumeFrom = Annotated[
    Path | None,
    typer.Option("--resume-from-checkpoint", help="Go on with the run this checkpoint folder belongs to."),
]


def train(
    context: typer.Context,
    overrides: Overrides = None,
    config: ConfigName = None,
    model: Model = None,
    samples: Samples = None,
    project: Project = None,
    output_dir: OutputDir = None,
    name: Name = None,
    devices: Devices = None,
    no_cuda: NoCudaInTraining = False,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    list_models: ListModels = False,
    start_from: From = None,
    resume: Resume = None,
    max_restarts: MaxRestarts = 0,
    resume_from_checkpoint: ResumeFrom = None,
    allow_changes: AllowChanges = False,
    score: Score = None,
    reward: Rewards = None,
    verbose: Verbose = False,
) -> int | None:
    """Train a model: from a preset or file, with any key overridden."""
    if list_models:
        from llmtune.cli.models import list_models as show_models

        show_models()
        return None
    options = Options(no_cuda, is_offline(), trust_remote_code, score, tuple(reward or ()))
    flags: dict[str, object] = {"model.name": model, "data.max_samples": samples, "tracking.project": project}
    flags |= {"run.output_dir": output_dir, "run.name": name}
    # The flag that other toolkits have; a run goes on with its own config, so most flags beside it are a mistake.
    goes_on = resume_from_checkpoint is not None or allow_changes
    if goes_on:
        _check_resume(resume_from_checkpoint, {"config": config, "from": start_from, "resume": resume, **flags})
    else:
        if start_from is not None:
            flags |= _start_flags(start_from, output_dir)
        # Before anything heavy is imported: a config error is answered at once.
        resolved = load_config(config, flags=flags, overrides=overrides or ())
        _check_same_command(resume, resolved.config.run.name, max_restarts=max_restarts, devices=devices)
    if devices is not None and launches(devices):
        return launch(devices, context.find_root().obj, max_restarts=max_restarts)
    if goes_on:
        more = {"allow_changes": allow_changes, "verbose": verbose}
        resume_run(None, overrides or [], options, checkpoint=resume_from_checkpoint, **more)
        return None
    prepare_process(trains=True)
    if dry_run or resume:
        (print_plan if dry_run else go_on_and_print)(resolved, options, verbose=verbose)
    else:
        from llmtune.training.train import train as train_run

        output = open_training_output(verbose=verbose)
        output.print_result(train_run(resolved, options, print_line=output.line, screen=output.screen))
    return None


def _check_same_command(resume: str | None, name: str, *, max_restarts: int, devices: int | None) -> None:
    """Raise UsageError where the same command, started again, could not find its run."""
    where = "command line"
    if resume not in (None, "auto"):
        fix = "say --resume auto for the run of this very command; a named one goes on with `llmtune resume RUN`"
        raise UsageError(f"--resume takes `auto`, not `{resume}`", where, fix)
    if max_restarts and (resume is None or devices is None):
        fix = "add --resume auto and --devices N"
        raise UsageError("--max-restarts starts processes again, which must find their run", where, fix)
    if resume is not None and "{timestamp}" in name:
        fix = "give it one that stays: --name NAME"
        raise UsageError(f"--resume auto finds its run by name, and `{name}` is another at each start", where, fix)


def _start_flags(name: str, output_dir: str | None) -> dict[str, object]:
    """Return the keys that `--from` stands for: an adapter is trained further, a whole model becomes the base."""
    from llmtune.adapters.find import find_result_named, run_of

    result = find_result_named(home_expanded(name), output_dir or RunConfig.output_dir, None)
    if result is not None and not (result / "adapter_config.json").is_file():
        run = run_of(result)
        if run is not None and result.name.startswith("step-"):
            # A checkpoint holds the state of a training, and no tokenizer that a new run could begin with.
            problem = f"the run `{run.name}` has not finished: after {result.name} it has saved no best or final model"
            fix = f"finish it: `llmtune resume {shlex.quote(str(run))}`, or name a folder that holds a whole model"
            raise UsageError(problem, "--from", fix)
        return {"model.name": str(result)}
    return {"adapter.start_from": name, "adapter.method": "lora"}


def _check_resume(checkpoint: Path | None, beside: Mapping[str, object]) -> None:
    """Check what a run that goes on is named by.

    Raises UsageError where nothing is named, or flags of a new run stand beside it, CheckpointError where it is gone.
    """
    if checkpoint is None:
        raise UsageError(
            "--allow-changes is for a run that goes on",
            where="command line",
            fix="name its checkpoint with --resume-from-checkpoint, or leave it out",
        )
    given = [FLAGS.get(key, f"--{key}") for key, value in beside.items() if value is not None]
    # The flag that other toolkits have; a run goes on with its own config, so most flags beside it are a mistake.
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot be given with --resume-from-checkpoint",
            where="command line",
            fix="a run goes on with its own config; override single keys with KEY=VALUE",
        )
    # Of a run that is there its checkpoints are listed, by what opens it.
    if not checkpoint.exists() and not (checkpoint.absolute().parent.parent / RUN_FILE).is_file():
        raise CheckpointError(
            f"there is no folder `{printable(checkpoint)}`",
            where="--resume-from-checkpoint",
            fix="name a checkpoint of a run, RUN/checkpoints/step-N, or the run itself; `llmtune runs` lists them",
        )
