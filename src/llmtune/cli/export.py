"""`llmtune export`: a run or a model as files for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.failure import print_line
from llmtune.cli.options import Checkpoint, Dtype
from llmtune.cli.process import prepare_process
from llmtune.common.offline import is_offline

__all__ = ["export"]


class FileFormat(StrEnum):
    """Forms a model can be exported in."""

    safetensors = "safetensors"
    gguf = "gguf"


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run, an adapter, a model's folder, a name of list-models, a hub id."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, or FILE.gguf; it must not exist.")],
    checkpoint: Checkpoint = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type of the written weights; as they are stored when not given.")
    ] = None,
    file_format: Annotated[
        FileFormat | None,
        typer.Option(
            "--format", help="safetensors (a folder) or gguf (a file); by the name of the output when not given."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Where an adapter's base is, when not where it was in training.")
    ] = None,
) -> None:
    """Write a model as one self-contained folder (transformers, vLLM) or one GGUF file (llama.cpp).

    It is read back and compared first.
    """
    prepare_process()
    from llmtune.deploy.export import export as write

    report = write(
        source,
        output,
        file_format=None if file_format is None else file_format.value,
        dtype=None if dtype is None else dtype.value,
        base=base,
        checkpoint=checkpoint,
        offline=is_offline(),
        print_line=print_line,
    )
    for note in report.notes:
        print_line(note)
    difference = report.difference
    print_line(
        f"{report.format}, {report.dtype}; against its source: "
        f"largest logit difference {difference.max_abs_logit:.3g}, "
        f"mean KL {difference.mean_kl:.3g} nats ({report.tolerance})"
    )
    print(output)
