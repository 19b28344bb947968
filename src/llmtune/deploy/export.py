"""Make of a run or a model what other programs take: one self-contained folder, or one GGUF file.

Read back, compared, then named (N8).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from llmtune import durable
from llmtune.adapters.find import find_result, named_folder
from llmtune.common.dtypes import torch_dtype
from llmtune.common.printing import PrintLine, silent
from llmtune.deploy.compare_logits import (
    Difference,
    compare_logits,
    limit_for,
    logits_of,
    probe_prompts,
    refuse_if_different,
    reloaded_logits,
)
from llmtune.deploy.gguf_model import refuse_unwritable, write_gguf
from llmtune.deploy.gguf_vocabulary import refuse_other_ids
from llmtune.deploy.merge import MergeReport, merge_lora
from llmtune.deploy.model_folder import ModelFolder, open_model_folder, write_model_folder
from llmtune.errors import UsageError
from llmtune.models.catalog import resolve_model_argument
from llmtune.models.gguf import read_gguf

__all__ = ["ExportReport", "Format", "export"]

Format = Literal["safetensors", "gguf"]


@dataclass(frozen=True)
class ExportReport:
    """What was written and how close it is to its source."""

    source: str
    format: Format
    dtype: str
    """Type of the written weights; `as stored` when none was asked for."""
    difference: Difference
    """What was written against its source, both in float32 arithmetic; of an adapter, against base + adapter."""
    tolerance: str
    notes: list[str] = field(default_factory=list)


def export(
    source: str,
    output: Path,
    *,
    file_format: Format | None = None,
    dtype: str | None = None,
    base: str | None = None,
    output_dir: str = "runs",
    offline: bool = False,
    print_line: PrintLine = silent,
) -> ExportReport:
    """Write `output` from RUN|MODEL|ADAPTER: a model folder, or a GGUF file where its name ends so or `file_format`
    says so.

    dtype: float32, bfloat16 or float16, each weight rounded once; as stored when None. base: another place of an
    adapter's base. Raises UsageError for an output that exists or contradicts the format, ModelError or TokenizerError
    for what the format cannot hold, CheckpointError when what was read back differs from the source by more than the
    tolerance; `output` then does not exist.
    """
    chosen = _choose_format(output, file_format)
    if output.exists():
        raise UsageError(f"`{output}` already exists", where="--output", fix="name one that does not")
    folder = named_folder(source, output_dir)
    found = None if folder is None else find_result(folder) or folder
    is_adapter = found is not None and (found / "adapter_config.json").is_file()
    if base is not None and not is_adapter:
        raise UsageError("--base is for adapters, and this is a whole model", where="--base", fix="leave it out")
    durable.prepare_target(output, print_line)  # an export that was killed leaves a folder as large as the model
    write = _write_gguf if chosen == "gguf" else _write_safetensors
    wanted = _Wanted(str(found or source), output, dtype, base, offline, print_line)
    return write(wanted, found if is_adapter else None)


@dataclass(frozen=True)
class _Wanted:
    """What was asked for."""

    source: str
    output: Path
    dtype: str | None
    base: str | None
    offline: bool
    print_line: PrintLine

    @property
    def type(self) -> torch.dtype | None:
        return None if self.dtype is None else torch_dtype(self.dtype)

    def merge(self, adapter: Path, target: Path) -> MergeReport:
        return merge_lora(
            adapter, target, base=self.base, dtype=self.dtype, offline=self.offline, print_line=self.print_line
        )


def _choose_format(output: Path, asked: Format | None) -> Format:
    is_file = output.suffix.lower() == ".gguf"
    if asked is None:
        return "gguf" if is_file else "safetensors"
    assert asked in get_args(Format)
    if is_file != (asked == "gguf"):
        fix = "name a file that ends in .gguf" if asked == "gguf" else "name a folder"
        raise UsageError(f"--format {asked} does not go with the output `{output}`", where="--output", fix=fix)
    return asked


def _write_safetensors(wanted: _Wanted, adapter: Path | None) -> ExportReport:
    if adapter is not None:
        merged = wanted.merge(adapter, wanted.output)
        return ExportReport(
            wanted.source, "safetensors", merged.dtype, merged.difference, merged.tolerance, list(merged.notes)
        )
    whole = open_model_folder(resolve_model_argument(wanted.source, offline=wanted.offline))
    with durable.commit_folder(wanted.output, replace=False) as staging:
        wanted.print_line(f"writing the model in {whole.folder}")
        write_model_folder(whole, staging, dtype=wanted.type)
        prompts = probe_prompts(whole.tokenizer, whole.rows)
        wanted.print_line(f"comparing what was written with its source on {len(prompts)} prompts")
        report = _judged(wanted, whole, prompts, reloaded_logits(staging, prompts), "safetensors")
        durable.write_json(staging / "export_report.json", asdict(report))
    return report


def _write_gguf(wanted: _Wanted, adapter: Path | None) -> ExportReport:
    with durable.commit_file(wanted.output) as path:
        merged = None
        if adapter is not None:
            merged = wanted.merge(adapter, path.parent / "merged")
        whole = open_model_folder(
            resolve_model_argument(
                wanted.source if merged is None else str(path.parent / "merged"), offline=wanted.offline
            )
        )
        refuse_unwritable(whole.config)
        wanted.print_line(f"writing the model in {whole.folder}" if merged is None else "writing the merged model")
        vocabulary = write_gguf(whole, path, dtype=wanted.type, name=wanted.output.stem)
        nothing = path.parent / "nothing"
        durable.make_folder(nothing)
        wanted.print_line("reading the file back and comparing it with its source")
        model, tokenizer = read_gguf(path, nothing)
        refuse_other_ids(whole.tokenizer, tokenizer, normalizes=vocabulary.normalizes)
        prompts = probe_prompts(whole.tokenizer, whole.rows)
        written = logits_of(model.eval(), prompts)
        del model
        notes = [] if merged is None else list(merged.notes)
        if vocabulary.normalizes:
            notes.append(
                "this tokenizer composes its text first (NFC), and llama.cpp does not: text in decomposed form gets other tokens"
            )
        return _judged(wanted, whole, prompts, written, "gguf", notes)


def _judged(
    wanted: _Wanted,
    whole: ModelFolder,
    prompts: list[list[int]],
    written: list[torch.Tensor],
    kind: Format,
    notes: list[str] | None = None,
) -> ExportReport:
    """Compare with the source's own logits. Raises CheckpointError beyond the tolerance."""
    source = whole.logits(prompts)
    types = {whole.dtype(name, wanted.type) for name in whole.names}
    report = ExportReport(
        source=wanted.source,
        format=kind,
        dtype=wanted.dtype or "as stored",
        difference=compare_logits(source, written),
        tolerance=limit_for(source, is_float32=types == {torch.float32}),
        notes=notes or [],
    )
    fix = "export with --dtype float32"
    refuse_if_different(
        report.difference, report.tolerance, problem="what was written is not its source", where=wanted.source, fix=fix
    )
    return report
