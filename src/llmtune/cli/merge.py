"""`llmtune merge-lora`: fold an adapter into its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import Checkpoint, Dtype, Push
from llmtune.cli.process import prepare_process
from llmtune.common.environment import is_offline
from llmtune.common.text import print_line

__all__ = ["adapter_folder", "check_push", "merge_lora", "print_usage", "push_result"]


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
    push: Push = None,
) -> None:
    """Merge an adapter into its base, weight by weight; the result is reloaded and compared before it gets its name."""
    prepare_process()
    check_push(push)
    from llmtune.deploy.merge import merge_lora as merge

    report = merge(
        adapter_folder(source, checkpoint),
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
    print_usage(report.usage)
    push_result(output, push)
    print(output)


def print_usage(lines: Sequence[str]) -> None:
    """Print the command lines that serve a result, on stderr."""
    for line in ("serve it with:", *(f"  {line}" for line in lines)) if lines else ():
        print_line(line)


def adapter_folder(source: Path, checkpoint: str | None) -> Path:
    """Return the folder of RUN|ADAPTER, which may be the name of a run, or of a checkpoint of it."""
    from llmtune.adapters.find import find_result_named, named_folder

    chosen = find_result_named(source, "runs", checkpoint) if checkpoint is not None else named_folder(source, "runs")
    return chosen or source


def check_push(repository: str | None) -> None:
    """Refuse an upload that cannot succeed, before there is anything to upload."""
    if repository is not None:
        from llmtune.deploy.push import check_push as check

        check(repository, offline=is_offline())


def push_result(result: Path, repository: str | None) -> None:
    """Upload a result where that was asked for."""
    if repository is not None:
        from llmtune.deploy.push import push

        print_line(f"uploading {result} to {repository}")
        print_line(f"uploaded: {push(result, repository)}")
