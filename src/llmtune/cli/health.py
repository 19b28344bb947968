"""`llmtune health`: what looked wrong in a run, and the advice."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmtune.common.text import print_line, printable

__all__ = ["health"]

NOT_WELL = 7
"""Exit code where an error was found: that of a training that diverged."""


def health(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or name of a run, at work or ended.")],
    output_dir: Annotated[str, typer.Option("--runs", metavar="DIR", help="Folder of runs with names.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> int:
    """Check the record of a run: non-finite values, spikes, plateaus, over-fitting, learning rate, gradients, speed.

    Prints a line for each finding, with advice. Exit code 7 where there is an error among them.
    """
    from llmtune.runs.folder import resolve_run
    from llmtune.watch.health import health_of

    folder = resolve_run(run, output_dir)
    events = health_of(folder)
    for event in events:
        if as_json:
            print(json.dumps(event))
        else:
            print(
                f"step {event['step']:>7}  {event['level']:<7}  {printable(str(event['message']))}; {event['advice']}"
            )
    if not events:
        print_line(f"{printable(folder.name)}: nothing looked wrong")
    return NOT_WELL if any(event["level"] == "error" for event in events) else 0
