"""`llmtune runs`: the runs of a folder, with their state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.failure import print_line
from llmtune.common.text import printable
from llmtune.runs.folder import RunSummary, list_runs

__all__ = ["runs"]


def runs(
    output_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder in which the runs are.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the runs of a folder, the newest last: state, step, loss."""
    summaries = list_runs(output_dir)
    if as_json:
        for run in summaries:
            print(json.dumps({**run._asdict(), "path": printable(run.path)}, ensure_ascii=False))
        return
    if not summaries:
        print_line(
            f"no runs in {printable(output_dir)}" + ("" if Path(output_dir).is_dir() else ": there is no such folder")
        )
        return
    rows = [("RUN", "STATE", "STEP", "TRAIN LOSS", "EVAL LOSS", "CREATED (UTC)"), *(_row(run) for run in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(run: RunSummary) -> tuple[str, ...]:
    step = "-" if run.step is None else str(run.step) if run.total_steps is None else f"{run.step}/{run.total_steps}"
    created = run.created.replace("T", " ")[:16]
    train, held_out = _loss(run.train_mean_nll, run.train_loss), _loss(run.eval_mean_nll, run.eval_loss)
    return printable(run.name), run.state, step, train, held_out, created


def _loss(*losses: float | None) -> str:
    """The first loss that there is: a run has one of nats per token, or one that compares answers."""
    return next((f"{float(loss):.4f}" for loss in losses if loss is not None), "-")
