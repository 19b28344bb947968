"""Export a run or a model for other programs: one self-contained folder, or one GGUF file.

The result is read back and compared with its source before it gets its name (N8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from llmtune import durable
from llmtune.adapters.find import find_result_named, named_folder, run_of
from llmtune.common.dtypes import torch_dtype
from llmtune.common.text import PrintLine, silent
from llmtune.config.layers import load_config
from llmtune.deploy.compare_logits import (
    Difference,
    compare_logits,
    limit_for,
    logits_of,
    probe_prompts,
    refuse_if_different,
    reloaded_logits,
)
from llmtune.deploy.gguf_architectures import refuse_unwritable
from llmtune.deploy.gguf_model import places_of, read_back, write_gguf
from llmtune.deploy.gguf_types import GGUF_TYPES, GgufType
from llmtune.deploy.gguf_vocabulary import gguf_vocabulary, refuse_other_ids
from llmtune.deploy.merge import MergeReport, merge_lora
from llmtune.deploy.model_folder import ModelFolder, open_model_folder, write_model_folder
from llmtune.deploy.ollama import modelfile as modelfile_of
from llmtune.deploy.usage import GGUF_NAME, Result, usage
from llmtune.errors import ModelError, UsageError
from llmtune.evaluation.inference_model import find_prompt_defaults, find_tokenizer, labels_in
from llmtune.models.catalog import resolve, resolve_model_argument

__all__ = ["ExportReport", "Format", "check_output", "export"]

Format = Literal["safetensors", "gguf", "ollama"]


@dataclass(frozen=True)
class ExportReport:
    """The result of an export and its distance from the source."""

    source: str
    format: Format
    dtype: str
    """Type of the written weights; `as stored` when none was requested."""
    difference: Difference
    """Result against its source, both in float32 arithmetic; of an adapter, against base + adapter. For a quantized
    type the source's weights are first rounded to that type.
    """
    tolerance: str
    quantization: Difference | None = None
    """Result against its source as it is: what a quantized type costs. None for other types."""
    notes: list[str] = field(default_factory=list)
    usage: list[str] = field(default_factory=list)
    """Command lines that serve the result."""


def export(
    source: str,
    output: Path,
    *,
    file_format: Format | None = None,
    dtype: str | None = None,
    gguf_type: str | None = None,
    base: str | None = None,
    checkpoint: str | None = None,
    output_dir: str = "runs",
    offline: bool = False,
    print_line: PrintLine = silent,
) -> ExportReport:
    """Write `output` from RUN|MODEL|ADAPTER: a model folder, a GGUF file, or a folder for Ollama.

    file_format: by the ending of `output` when None, a model folder or a file. dtype: float32, bfloat16 or float16,
    each weight rounded once; as stored when None. gguf_type: a name of `GGUF_TYPES`, instead of `dtype`. base: another
    copy of an adapter's base. checkpoint: of a run (see `find_result`).

    Raises UsageError for an output that exists or contradicts the format or a checkpoint that is not there, ModelError,
    AdapterError or TokenizerError for a source that cannot be read or that the format cannot hold, CheckpointError when
    the result differs from the source by more than the tolerance, MachineError when the system refuses to write;
    `output` then does not exist.
    """
    file_format = check_output(output, file_format, dtype=dtype, gguf_type=gguf_type)
    result = find_result_named(source, output_dir, checkpoint) or named_folder(source, output_dir)
    adapter = result if result is not None and (result / "adapter_config.json").is_file() else None
    if base is not None and adapter is None:
        raise UsageError("--base is for adapters, and this is a whole model", where="--base", fix="leave it out")
    if file_format != "safetensors" and result is not None and labels_in(result):
        fix = "name a folder as --output, which transformers loads as sequence classification"
        raise UsageError("a GGUF file holds a model that answers, and this one gives scores", str(output), fix)
    durable.prepare_target(output, print_line)  # an export that was killed leaves a folder as large as the model
    named_type = GGUF_TYPES[gguf_type] if gguf_type is not None else None
    if named_type is not None:
        # An adapter is merged in float32 before a quantized type rounds it: each weight is rounded once.
        dtype = str(named_type.torch_dtype).removeprefix("torch.")
    request = _Request(
        str(result or source), adapter, output, dtype, named_type, base, offline, print_line, file_format
    )
    return _EXPORTS[file_format](request)


@dataclass(frozen=True)
class _Request:
    """The arguments of an export."""

    source: str
    adapter: Path | None
    """The source, where it is an adapter."""
    output: Path
    dtype: str | None
    named_type: GgufType | None
    """The type of GGUF that was named."""
    base: str | None
    offline: bool
    print_line: PrintLine
    file_format: Format

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else torch_dtype(self.dtype)

    @property
    def gguf_type(self) -> GgufType | None:
        plain = {kind.torch_dtype: kind for kind in GGUF_TYPES.values() if not kind.is_quantized}
        return self.named_type or (None if self.torch_dtype is None else plain[self.torch_dtype])

    @property
    def quantized_type(self) -> GgufType | None:
        return self.named_type if self.named_type is not None and self.named_type.is_quantized else None

    @property
    def described_type(self) -> str:
        return self.quantized_type.name.lower() if self.quantized_type else self.dtype or "as stored"

    def result(self, model_folder: ModelFolder) -> Result:
        """Describe what is written, for the command lines that serve it."""
        if self.file_format == "safetensors":
            return model_folder.result(str(self.output))
        is_quantized = self.quantized_type is not None
        return Result(self.file_format, str(self.output), model_folder.defaults, is_quantized=is_quantized)

    def merge(self, adapter: Path, output: Path) -> MergeReport:
        return merge_lora(
            adapter, output, base=self.base, dtype=self.dtype, offline=self.offline, print_line=self.print_line
        )

    def open(self, name: str) -> ModelFolder:
        source, run = resolve_model_argument(name, offline=self.offline), run_of(Path(name))
        if run is None:
            return open_model_folder(source)
        config = load_config(str(run / "config.yaml"), environ={}).config
        base = resolve(config.model.name, config.model.revision, offline=self.offline)
        if config.model.train_only and Path(name).name.startswith("step-"):
            problem = "a checkpoint of `model.train_only` holds the trained weights alone, not a whole model"
            fix = f"finish the run (`llmtune resume {run}`), or export its best model with --checkpoint best"
            raise ModelError(problem, where=name, fix=fix)
        tokenizer = find_tokenizer(Path(name), run, base, config)
        return open_model_folder(source, tokenizer, find_prompt_defaults(Path(name), run, config))


def check_output(
    output: Path, requested: Format | None, *, dtype: str | None = None, gguf_type: str | None = None
) -> Format:
    """Return the format of `output`. Raises UsageError for one that exists, or contradicts the format or the type."""
    file_format = _choose_format(output, requested)
    if gguf_type is not None and dtype is not None:
        problem = f"--type {gguf_type} and --dtype {dtype} both name the type of the weights"
        raise UsageError(problem, where="command line", fix="give one of them")
    if gguf_type is not None and file_format == "safetensors":
        problem = f"--type {gguf_type} is a type of GGUF files, and `{output}` is a folder"
        raise UsageError(problem, where="--type", fix="name a file that ends in .gguf, or give --dtype instead")
    if output.exists():
        raise UsageError(f"`{output}` already exists", where="--output", fix="name one that does not")
    return file_format


def _choose_format(output: Path, requested: Format | None) -> Format:
    is_file = output.suffix.lower() == ".gguf"
    if requested is None:
        return "gguf" if is_file else "safetensors"
    assert requested in get_args(Format)
    # A folder called model.gguf, or a file without an ending, would surprise the program that opens it.
    if is_file != (requested == "gguf"):
        fix = "name a file that ends in .gguf" if requested == "gguf" else "name a folder"
        raise UsageError(f"--to {requested} does not go with the output `{output}`", where="--output", fix=fix)
    return requested


def _export_safetensors(request: _Request) -> ExportReport:
    if request.adapter is not None:
        merged = request.merge(request.adapter, request.output)  # compares its result itself
        return ExportReport(
            request.source,
            "safetensors",
            merged.dtype,
            merged.difference,
            merged.tolerance,
            notes=list(merged.notes),
            usage=list(merged.usage),
        )
    model_folder = request.open(request.source)
    with durable.commit_folder(request.output, replace=False) as staging:
        request.print_line(f"writing the model in {model_folder.folder}")
        write_model_folder(model_folder, staging, dtype=request.torch_dtype)
        prompts = probe_prompts(model_folder.tokenizer, model_folder.rows)
        request.print_line(f"comparing what was written with its source on {len(prompts)} prompts")
        report = _compare(request, model_folder, prompts, reloaded_logits(staging, prompts))
        durable.write_json(staging / "export_report.json", asdict(report))
    return report


def _export_gguf(request: _Request) -> ExportReport:
    with durable.commit_file(request.output) as path:
        return _write_file(request, path)


def _export_ollama(request: _Request) -> ExportReport:
    with durable.commit_folder(request.output, replace=False) as staging:
        with durable.commit_file(staging / GGUF_NAME) as path:
            report = _write_file(request, path, modelfile=staging / "Modelfile")
        durable.write_json(staging / "export_report.json", asdict(report))
    return report


def _write_file(request: _Request, path: Path, *, modelfile: Path | None = None) -> ExportReport:
    """Write the GGUF file `path`, and a Modelfile for it. What is needed on the way lies beside `path`."""
    notes: list[str] = []
    if request.adapter is None:
        model_folder = request.open(request.source)
    else:
        merged_folder = path.parent / "merged"
        notes += request.merge(request.adapter, merged_folder).notes
        model_folder = request.open(str(merged_folder))
    refuse_unwritable(model_folder.config)
    if modelfile is not None:
        durable.write_text(modelfile, _modelfile(model_folder))
    request.print_line(
        f"writing the model in {model_folder.folder}" if request.adapter is None else "writing the merged model"
    )
    vocabulary = write_gguf(model_folder, path, requested=request.gguf_type, name=request.output.stem)
    request.print_line("reading the file back and comparing it with its source")
    empty_folder = path.parent / "nothing"
    durable.make_folder(empty_folder)
    # An empty folder stands for the model's, so that nothing beside the file can make the comparison pass.
    model, tokenizer = read_back(path, model_folder, empty_folder)
    refuse_other_ids(model_folder.tokenizer, tokenizer, vocabulary)
    prompts = probe_prompts(model_folder.tokenizer, model_folder.rows)
    written = logits_of(model.eval(), prompts)
    del model  # the comparison loads the source
    if request.quantized_type is not None:
        notes.append(_kept_weights(model_folder, request.quantized_type))
    prompts_in_training = model_folder.defaults.described()
    if modelfile is not None and not model_folder.defaults.parse_control_tokens:
        notes.append("in Ollama a text that spells a control token is that token, which llmtune keeps from users")
    elif modelfile is None and prompts_in_training:
        notes.append(f"a GGUF file cannot hold what stood around each prompt in training: {prompts_in_training}")
    if vocabulary.normalizes:
        notes.append(
            "this tokenizer composes its text first (NFC), and llama.cpp does not: "
            "text in decomposed form gets other tokens"
        )
    if vocabulary.joins_space:
        notes.append(
            "llama.cpp puts a space before a text that begins with one too, and this tokenizer does not: "
            "such a text has one space more there"
        )
    return _compare(request, model_folder, prompts, written, notes)


def _modelfile(model_folder: ModelFolder) -> str:
    adds_bos = gguf_vocabulary(model_folder.tokenizer, model_folder.rows).adds_bos
    stops = model_folder.stop_token_ids
    return modelfile_of(
        model_folder.tokenizer, model_folder.defaults, file=GGUF_NAME, stop_token_ids=stops, adds_bos=adds_bos
    )


def _compare(
    request: _Request,
    model_folder: ModelFolder,
    prompts: list[list[int]],
    written: list[torch.Tensor],
    notes: list[str] | None = None,
) -> ExportReport:
    """Compare logits [T, V] with the source's own. Raises CheckpointError beyond the tolerance."""
    source = model_folder.logits(prompts)
    quantized, quantization = request.quantized_type, None
    if quantized is not None:
        # A quantized file differs from its source as much as its type does. So that a wrong byte is still seen, it is
        # compared with the source's own weights, rounded in memory.
        quantization = compare_logits(source, written)
        source = model_folder.logits(
            prompts, {name: place.round for name, place in places_of(model_folder, quantized).items()}
        )
    dtypes = {model_folder.dtype(name, request.torch_dtype) for name in model_folder.names}
    report = ExportReport(
        source=request.source,
        format=request.file_format,
        dtype=request.described_type,
        difference=compare_logits(source, written),
        tolerance=limit_for(source, is_float32=quantized is not None or dtypes == {torch.float32}),
        quantization=quantization,
        notes=notes or [],
        usage=[] if model_folder.labels else usage(request.result(model_folder)),
    )
    refuse_if_different(
        report.difference,
        report.tolerance,
        problem="what was written is not its source",
        where=request.source,
        fix="export with --dtype float32",
    )
    return report


def _kept_weights(model_folder: ModelFolder, quantized: GgufType) -> str:
    """Name the weights that are not quantized."""
    kinds = {name: place.kind.name for name, place in places_of(model_folder, quantized).items()}
    vectors = [name for name in kinds if kinds[name] == "F32"]
    unfit = [name for name in kinds if kinds[name] == "F16"]
    quantized_count, name = len(kinds) - len(vectors) - len(unfit), quantized.name.lower()
    text = f"{quantized_count} matrices are in {name}, {len(vectors)} vectors in f32"
    if unfit:
        reason = f"because their rows are no multiple of {quantized.block}"
        text += f", {len(unfit)} matrices in f16, {reason}: {', '.join(unfit)}"
    return text


_EXPORTS: dict[Format, Callable[[_Request], ExportReport]] = {
    "safetensors": _export_safetensors,
    "gguf": _export_gguf,
    "ollama": _export_ollama,
}
