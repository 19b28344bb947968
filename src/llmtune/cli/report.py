"""`llmtune report`: a run, or several over each other, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmtune.common.text import print_line, printable, readable_bytes

__all__ = ["report"]


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders or names of runs; the first gives the file's place.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write; RUN/report.html when not given."),
    ] = None,
    output_dir: Annotated[str, typer.Option("--runs", metavar="DIR", help="Folder of runs with names.")] = "runs",
) -> None:
    """Write one self-contained HTML file: curves, held-out metrics, samples, rows, config, plan, health.

    Several runs are drawn over each other, with a table of what differs and of who is better. The file's path is
    printed on stdout.
    """
    from llmtune.runs.folder import resolve_run
    from llmtune.watch.report.page import read_run, write_report

    folders = [resolve_run(run, output_dir) for run in runs]
    path = output or folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    size = write_report([read_run(folder) for folder in folders], path)
    print_line(f"report of {len(folders)} run{'s' if len(folders) > 1 else ''}, {readable_bytes(size)}")
    print(printable(path))
