"""`llmtune config import`: a config of another toolkit as one of ours, with what became of every key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from llmtune import durable
from llmtune.common.text import print_line
from llmtune.errors import UsageError

__all__ = ["import_config"]

NOT_WHOLE = 3
"""Exit code where a key has no equivalent: what the other toolkit would train is not what this config trains."""


def import_config(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="YAML, JSON, a shell script, a Python script or a notebook. Nothing is run."
        ),
    ],
    peer: Annotated[
        str | None, typer.Option("--from", metavar="TOOLKIT", help="The toolkit; found by the file's keys.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the config here; printed when not given.")
    ] = None,
    number: Annotated[int, typer.Option("--number", min=1, help="Of several command lines in the file, this one.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the config and the report as JSON.")] = False,
) -> int:
    """Turn another toolkit's config into one of ours, its own defaults written out.

    The report says of every key: kept, computed, dropped because, needs you, no equivalent. Exit code 0 when nothing
    is without an equivalent, else 3.
    """
    from llmtune.config.importers.convert import import_source
    from llmtune.config.importers.report import as_data, report_lines
    from llmtune.config.importers.source import read_sources

    sources = read_sources(file)
    if number > len(sources):
        raise UsageError(
            f"`{file.name}` holds {len(sources)} of them, not {number}", "--number", "name a smaller number"
        )
    if output is not None and output.exists():
        raise UsageError(f"`{output}` exists already", "--output", "choose another name, or move it away")
    source = sources[number - 1]
    imported = import_source(source, peer)
    if len(sources) > 1:
        print_line(f"{source.place}: {number} of {len(sources)} command lines; `--number` takes another")
    if output is not None:
        durable.write_text(output, imported.yaml)
    lines = report_lines(imported, min(shutil.get_terminal_size((100, 24)).columns, 120))
    if as_json:
        print(json.dumps(as_data(imported), indent=2, ensure_ascii=False))
    elif output is not None:
        print("\n".join(lines))
    else:
        print(imported.yaml, end="")
        for line in lines:
            print_line(line)
    if output is not None:
        print_line(f"written to {output}; next: `llmtune plan --config {output}`")
    return 0 if imported.is_whole else NOT_WHOLE
