"""`llmtune dashboard`: runs as charts in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.process import yield_to_runs
from llmtune.common.environment import home_expanded
from llmtune.errors import UsageError
from llmtune.runs.folder import list_runs

if TYPE_CHECKING:
    from llmtune.watch.dashboard import Source
    from llmtune.watch.run_data import RunData

__all__ = ["dashboard"]


@dataclass(frozen=True)
class _Folder:
    data: RunData

    def refresh(self) -> bool:
        return self.data.refresh()


def dashboard(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Runs (folders or names), laid over each other; the newest when none."),
    ] = None,
    log: Annotated[
        list[Path] | None,
        typer.Option("--log", metavar="FILE", help="A redirected log of a training, instead of a folder; repeatable."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and stop.")] = False,
    output_dir: Annotated[
        str, typer.Option("--runs", metavar="DIR", help="Folder in which names are looked up.")
    ] = "runs",
) -> None:
    """Show runs in the terminal: progress, charts, figures, answers, messages; also while they train."""
    sources = _sources(runs or [], log or [], output_dir)
    if once or not sys.stdout.isatty():
        from rich.console import Console

        from llmtune.watch.frame import frame

        for source in sources:
            source.refresh()
        console = Console(highlight=False, markup=False, emoji=False)
        console.print(frame([source.data for source in sources], console.width))
        return
    from llmtune.watch.dashboard import Dashboard

    yield_to_runs()  # from here on: its start would take a minute beside a run
    Dashboard(sources).run()


def _sources(runs: list[str], logs: list[Path], output_dir: str) -> list[Source]:
    from llmtune.watch.log_file import LogFile
    from llmtune.watch.run_data import RunData

    if not runs and not logs:
        found = list_runs(output_dir)
        if not found:
            fix = "name a run, or start one with `llmtune train`"
            raise UsageError("there is no run to show", output_dir, fix)
        # One that trains now is what a person wants to see.
        runs = [str(([run for run in found if run.state == "running"] or found)[-1].path)]
    # A folder that is not there yet is waited for: its run may be about to begin.
    folders = [_Folder(RunData(_folder(name, output_dir))) for name in runs]
    return [*folders, *(LogFile(path) for path in logs)]


def _folder(name: str, output_dir: str) -> Path:
    path = Path(home_expanded(name))
    in_output_dir = Path(home_expanded(output_dir)) / name
    # A bare name that is no folder yet is that of a run to come.
    is_name = len(path.parts) == 1 or in_output_dir.is_dir()
    return in_output_dir if is_name and not path.is_dir() else path
