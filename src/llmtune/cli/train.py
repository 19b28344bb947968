"""`llmtune train`: a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.failure import print_line
from llmtune.cli.options import ConfigName, Overrides
from llmtune.cli.result import show_result
from llmtune.config.layers import load_config
from llmtune.errors import UsageError

__all__ = ["train"]


def train(
    overrides: Overrides = None,
    config: ConfigName = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A name of `llmtune list-models`, a folder, a .gguf file, a hub id."),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", "-s", help="Use at most this many training rows.")] = None,
    project: Annotated[
        str | None, typer.Option("--project", "-p", help="Project name for trackers that have projects.")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", help="Folder in which the run's folder is made.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run.")] = None,
    no_cuda: Annotated[
        bool, typer.Option("--no-cuda", help="Train on the CPU even where there is a CUDA device.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="List the models that have a name, and stop.")
    ] = False,
    resume_from_checkpoint: Annotated[
        Path | None,
        typer.Option("--resume-from-checkpoint", help="Go on with the run this checkpoint folder belongs to."),
    ] = None,
) -> None:
    """Train a model: from a preset or file, with any key overridden."""
    if list_models:
        from llmtune.cli.models import list_models as show_models

        show_models()
        return
    from llmtune.common.offline import is_offline

    if resume_from_checkpoint is not None:
        from llmtune.cli.resume import go_on

        given = {"--config": config, "--model": model, "--samples": samples, "--name": name, "--output-dir": output_dir}
        clash = [flag for flag, value in given.items() if value is not None]
        if clash:
            raise UsageError(
                f"{' and '.join(clash)} cannot be given with --resume-from-checkpoint",
                where="command line",
                fix="a run goes on with its own config; override single keys with KEY=VALUE",
            )
        go_on(
            None,
            overrides or [],
            no_cuda=no_cuda,
            trust_remote_code=trust_remote_code,
            checkpoint=resume_from_checkpoint,
        )
        return
    flags = {
        "model.name": model,
        "data.max_samples": samples,
        "tracking.project": project,
        "run.output_dir": output_dir,
        "run.name": name,
    }
    resolved = load_config(config, flags=flags, overrides=overrides or ())

    from llmtune.cli.process import prepare_process

    prepare_process(trains=True)
    from llmtune.config.process_options import Options
    from llmtune.training.train import dry_run as run_dry
    from llmtune.training.train import train as run_training

    options = Options(no_cuda=no_cuda, offline=is_offline(), trust_remote_code=trust_remote_code)
    if dry_run:
        run_dry(resolved, options, print_line=print)
        return
    show_result(run_training(resolved, options, print_line=print_line))
