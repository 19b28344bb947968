"""`llmtune merge-lora`: fold an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import Checkpoint, Dtype
from llmtune.cli.process import prepare_process
from llmtune.common.environment import is_offline
from llmtune.common.text import print_line

__all__ = ["merge_lora"]


def merge_lora(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|ADAPTER", help="A run with an adapter (folder or name), or an adapter's folder."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make; it must not exist.")],
    checkpoint: Checkpoint = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Where its base is; a base trained in 4 or 8 bit is then taken unquantized."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type of the written weights; as in the base when not given.")
    ] = None,
) -> None:
    """Merge an adapter into its base, weight by weight; the result is reloaded and compared before it gets its name."""
    prepare_process()
    from llmtune.adapters.find import find_result_named, named_folder
    from llmtune.deploy.merge import merge_lora as merge

    chosen = find_result_named(source, "runs", checkpoint) if checkpoint is not None else named_folder(source, "runs")
    folder = chosen or source
    report = merge(
        folder,
        output,
        base=base,
        dtype=dtype.value if dtype is not None else None,
        offline=is_offline(),
        print_line=print_line,
    )
    for note in report.notes:
        print_line(note)
    print_line(f"merged into {report.merged_into}; {report.weights_changed} weights changed")
    lost = f"{report.entries_unchanged_by_rounding:,} of {report.entries_changed:,}"
    print_line(f"{lost} changed entries change by less than the written type can express")
    difference = report.difference
    print_line(
        f"against base + adapter: largest logit difference {difference.max_abs_logit:.3g}, "
        f"mean KL {difference.mean_kl:.3g} nats ({report.tolerance})"
    )
    if report.other_base is not None:
        print_line(f"against the adapter on the other form of its base: mean KL {report.other_base.mean_kl:.3g} nats")
    print(output)
