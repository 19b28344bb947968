"""`llmtune runs`: the runs of a folder, with their state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmtune.common.text import print_line, printable
from llmtune.errors import UsageError
from llmtune.runs.folder import RunSummary, list_runs, resolve_run

__all__ = ["print_table", "runs"]


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="DIR|RUN", help="Folder in which the runs are (runs/); with --compare the runs."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Print in which keys and numbers the runs that are named differ.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the runs of a folder, the newest last: state, step, loss; or how some of them differ."""
    if compare:
        _compare(names or [], as_json=as_json)
        return
    if len(names or []) > 1:
        raise UsageError(f"{len(names or [])} folders are named", "command line", "name one, or add --compare")
    output_dir = names[0] if names else "runs"
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
    print_table(rows)


def _compare(names: list[str], *, as_json: bool) -> None:
    from llmtune.watch.differences import as_in_config, differing_keys, numbers_of
    from llmtune.watch.run_data import RunData

    if len(names) < 2:
        raise UsageError("there is nothing to compare", "command line", "name two runs or more behind --compare")
    found = [RunData(resolve_run(name, "runs")) for name in names]
    for run in found:
        run.refresh()
    keys, numbers = differing_keys(found), numbers_of(found)
    if as_json:
        print(json.dumps({"runs": names, "keys": keys, "numbers": numbers}, ensure_ascii=False))
        return
    rows = [("KEY", *(printable(run.name) for run in found))]
    rows += [(key, *(printable(as_in_config(key, value)) for value in row)) for key, row in keys.items()]
    if not keys:
        print_line("their configs are equal")
    rows.append(("NUMBER", *("" for _ in found)))
    rows += [(key, *(_number(value) for value in row)) for key, row in numbers.items()]
    print_table(rows)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of as many cells each, the columns below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(run: RunSummary) -> tuple[str, ...]:
    step = "-" if run.step is None else str(run.step) if run.total_steps is None else f"{run.step}/{run.total_steps}"
    created = run.created.replace("T", " ")[:16]
    train, held_out = _loss(run.train_mean_nll, run.train_loss), _loss(run.eval_mean_nll, run.eval_loss)
    return printable(run.name), run.state, step, train, held_out, created


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:,.6g}"


def _loss(*losses: float | None) -> str:
    """The first loss that there is: a run has one of nats per token, or one that compares answers."""
    return next((f"{float(loss):.4f}" for loss in losses if loss is not None), "-")
