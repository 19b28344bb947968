"""`llmtune export`: a run or a model as files for other programs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.evaluate import held_out_rows, measure
from llmtune.cli.merge import adapter_folder, check_push, print_usage, push_result
from llmtune.cli.options import Checkpoint, Dtype, Push
from llmtune.cli.process import prepare_process
from llmtune.common.environment import is_offline
from llmtune.common.text import print_line
from llmtune.errors import LlmtuneError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from llmtune.cli.evaluate import HeldOut
    from llmtune.config.schema import Config
    from llmtune.deploy.export import ExportReport, Format

__all__ = ["export"]


class FileFormat(StrEnum):
    """Forms a model can be exported in."""

    safetensors = "safetensors"
    gguf = "gguf"
    ollama = "ollama"


class GgufTypeName(StrEnum):
    """Number types of a GGUF file."""

    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"
    mxfp4 = "mxfp4"
    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"


GgufTypeOption = Annotated[
    GgufTypeName | None,
    typer.Option("--type", help="Type of the matrices in a GGUF file; q... and mxfp4 are quantized."),
]
HeldOutData = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="With a quantized --type: rows to measure its perplexity on; the run's own when not given."
    ),
]


FormatOption = Annotated[
    FileFormat | None,
    typer.Option(
        "--to",
        "--format",
        help="safetensors (a folder), gguf (a file) or ollama (a folder with a Modelfile); by the output's name when "
        "not given.",
    ),
]
WrittenType = Annotated[
    Dtype | None, typer.Option("--dtype", help="Type of the written weights; as they are stored when not given.")
]
Base = Annotated[
    str | None, typer.Option("--base", help="Where an adapter's base is, when not where it was in training.")
]
AdapterOnly = Annotated[
    bool, typer.Option("--adapter-only", help="Write a GGUF file of the adapter alone, to be added to its base's.")
]


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run, an adapter, a model's folder, a name of list-models, a hub id."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, or FILE.gguf; it must not exist.")],
    checkpoint: Checkpoint = None,
    dtype: WrittenType = None,
    gguf_type: GgufTypeOption = None,
    data: HeldOutData = None,
    file_format: FormatOption = None,
    base: Base = None,
    adapter_only: AdapterOnly = False,
    push: Push = None,
) -> None:
    """Write a model as one self-contained folder (transformers, vLLM), one GGUF file (llama.cpp) or for Ollama.

    It is read back and compared first.
    """
    prepare_process()
    check_push(push)
    if adapter_only:
        given = {"--type": gguf_type, "--dtype": dtype, "--to": file_format, "--data": data}
        _export_adapter(adapter_folder(Path(source), checkpoint), output, base, given)
        push_result(output, push)
        return
    from llmtune.deploy.export import check_output
    from llmtune.deploy.export import export as write
    from llmtune.deploy.gguf_types import GGUF_TYPES

    format_name: Format | None = None if file_format is None else file_format.value
    dtype_name = None if dtype is None else dtype.value
    type_name = None if gguf_type is None else gguf_type.value
    check_output(output, format_name, dtype=dtype_name, gguf_type=type_name)
    is_quantized = type_name is not None and GGUF_TYPES[type_name].is_quantized
    if data and not is_quantized:
        problem = "--data names rows to measure a quantized file on, and no quantized type is asked for"
        raise UsageError(problem, where="--data", fix="add --type q8_0, or leave --data out")
    unquantized = _measure_unquantized(source, checkpoint, data) if is_quantized else None
    report = write(
        source,
        output,
        file_format=format_name,
        dtype=dtype_name,
        gguf_type=type_name,
        base=base,
        checkpoint=checkpoint,
        offline=is_offline(),
        print_line=print_line,
    )
    for note in report.notes:
        print_line(note)
    _print_differences(report)
    if unquantized is not None:
        _print_perplexities(output, unquantized, report.dtype)
    print_usage(report.usage)
    push_result(output, push)
    print(output)


def _export_adapter(source: Path, output: Path, base: str | None, given: Mapping[str, object]) -> None:
    """given: options that are about a whole model, by name."""
    from llmtune.deploy.gguf_adapter import export_adapter

    for option in (option for option, value in given.items() if value):
        problem = f"{option} is about a whole model, and --adapter-only writes an adapter in float32"
        raise UsageError(problem, where=option, fix="leave one of them out")
    print_usage(export_adapter(source, output, base=base, offline=is_offline()))
    print(output)


def _print_differences(report: ExportReport) -> None:
    difference, rounded = report.difference, report.quantization
    against = "its source" if rounded is None else f"its source rounded to {report.dtype} in memory"
    print_line(
        f"{report.format}, {report.dtype}; against {against}: "
        f"largest logit difference {difference.max_abs_logit:.3g}, "
        f"mean KL {difference.mean_kl:.3g} nats ({report.tolerance})"
    )
    if rounded is not None:
        print_line(
            f"against its source unquantized: mean KL {rounded.mean_kl:.3g} nats, "
            f"the same most likely token at {100 * rounded.same_top_token:.1f} % of the positions"
        )


@dataclass(frozen=True)
class _Unquantized:
    """The perplexity of a source before it is quantized, and all that measures the file in the same way."""

    perplexity: float
    rows: HeldOut
    settings: Config
    tokenizer: PreTrainedTokenizerFast
    device: torch.device


def _measure_unquantized(source: str, checkpoint: str | None, data: list[str] | None) -> _Unquantized | None:
    """Measure the source on held-out rows; None, with the reason printed, where no rows are at hand."""
    from llmtune.deploy.gguf_architectures import refuse_unwritable
    from llmtune.evaluation.inference_model import load_inference_model

    try:
        loaded = load_inference_model(source, checkpoint=checkpoint, offline=is_offline())
    except LlmtuneError as error:  # its base may be where --base says; the export refuses what cannot be read at all
        print_line(f"the perplexity is not measured: {error.problems[0].problem}")
        return None
    refuse_unwritable(loaded.model.config)  # before the rows are measured, which takes longer
    try:
        rows, settings = held_out_rows(loaded, data, None)
    except LlmtuneError as error:
        if data:
            raise
        print_line(f"the perplexity is not measured: {error.problems[0].problem}; name rows with --data FILE")
        return None
    print_line(f"measuring the unquantized model on {rows.row_count} held-out rows")
    device = next(loaded.model.parameters()).device
    perplexity = measure(loaded.model, loaded.tokenizer, settings, rows, ROWS_AT_ONCE)["eval_perplexity"]
    return _Unquantized(perplexity, rows, settings, loaded.tokenizer, device)


def _print_perplexities(path: Path, source: _Unquantized, dtype: str) -> None:
    before, after = source.perplexity, _perplexity_of_file(path, source)
    print_line(
        f"perplexity of {source.rows.row_count} held-out rows: {before:.5g} unquantized, "
        f"{after:.5g} as {dtype} ({100 * (after / before - 1):+.2f} %)"
    )


def _perplexity_of_file(path: Path, source: _Unquantized) -> float:
    """Return the perplexity of a GGUF file on the rows that its source was measured on."""
    from llmtune.deploy.usage import GGUF_NAME
    from llmtune.models.gguf import read_gguf

    print_line("measuring the file on them")
    path = path / GGUF_NAME if path.is_dir() else path
    with tempfile.TemporaryDirectory() as empty_folder:
        model = read_gguf(path, Path(empty_folder))[0]
    model.to(source.device)  # type: ignore[arg-type]  # transformers' wrapper hides its signature
    return measure(model, source.tokenizer, source.settings, source.rows, ROWS_AT_ONCE)["eval_perplexity"]


ROWS_AT_ONCE = 8
"""Rows of a batch in which a perplexity is measured; the result does not depend on it."""
