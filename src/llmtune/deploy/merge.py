"""Merge an adapter into its base: weight by weight, rounded once, reloaded and compared before it gets its name (N8).

Memory: while the files are written, one weight of the base, its merged form and some 100 MB of float64 at a time,
whatever the model's size. The comparison afterwards loads base and result in float32, one after the other.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from llmtune import durable
from llmtune.adapters.load import load_adapter
from llmtune.common.dtypes import torch_dtype
from llmtune.common.text import PrintLine, silent
from llmtune.config.schema import ModelConfig
from llmtune.deploy.compare_logits import (
    Difference,
    compare_logits,
    float32_noise,
    limit_for,
    logits_of,
    probe_prompts,
    refuse_if_different,
    reloaded_logits,
)
from llmtune.deploy.merge_inputs import MergeInputs, find_merge_inputs
from llmtune.deploy.merge_plan import MergePlan, plan_merge
from llmtune.deploy.usage import folder_result, usage
from llmtune.deploy.write_merged import MergeStatistics, write_merged
from llmtune.errors import AdapterError, UsageError
from llmtune.models.load import load_model
from llmtune.models.weights import digest_tensors

__all__ = ["MergeReport", "merge_lora"]


@dataclass(frozen=True)
class MergeReport:
    """The contents of merge_report.json."""

    adapter: str
    base: str
    base_digest: str
    adapter_digest: str
    merged_digest: str
    merged_into: str
    """`the base`, or `the 4bit base it was trained on, dequantized`."""
    dtype: str
    """Type of the written weights; `as in the base` when none was requested."""
    weights_changed: int
    entries_changed: int
    entries_unchanged_by_rounding: int
    """Entries the adapter moves by less than the written type can express."""
    peak_memory_bytes: int
    """Growth of this process while the files were written."""
    difference: Difference
    """Result against base + adapter, both in float32 arithmetic."""
    tolerance: str
    other_base: Difference | None
    """Result against the adapter on the other form of its base (dequantized, or as published); None where there is one
    form.
    """
    notes: list[str] = field(default_factory=list)
    usage: list[str] = field(default_factory=list)
    """Command lines that serve the result."""


def merge_lora(
    source: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    print_line: PrintLine = silent,
) -> MergeReport:
    """Write `output`, a folder that transformers' `from_pretrained` loads, from a run or an adapter.

    base: another copy of the same base; an adapter trained on a quantized base is then merged into the unquantized
    weights. dtype: float32, bfloat16 or float16; each weight keeps its stored type when None.

    Raises AdapterError or ModelError for an adapter or base that cannot be found, read or joined, UsageError when
    `output` exists, CheckpointError when the reloaded result differs from base + adapter by more than the tolerance,
    MachineError when the system refuses to write; `output` then does not exist.
    """
    if output.exists():
        raise UsageError(f"`{output}` already exists", where="--output", fix="name a folder that does not")
    inputs = find_merge_inputs(source, base, offline=offline)
    print_line(f"merging {inputs.adapter} into {inputs.base_name}")
    plan = plan_merge(inputs, dtype=None if dtype is None else torch_dtype(dtype), dequantize=base is None)
    # Before anything is written: an adapter on another base gives a model that answers nonsense fluently.
    base_digest = _checked_digest(inputs, plan)
    durable.prepare_target(output, print_line)
    with durable.commit_folder(output, replace=False) as staging:
        statistics = write_merged(plan, inputs, staging)
        prompts = probe_prompts(inputs.tokenizer, plan.rows, plan.trained_rows)
        print_line(f"comparing the result with base + adapter on {len(prompts)} prompts")
        # From the files and by plain transformers, as a user will load it.
        merged = reloaded_logits(staging, prompts)
        answering = folder_result(str(output), plan.config, inputs.tokenizer, inputs.defaults)
        served = [] if inputs.labels else usage(answering)
        report = _report(inputs, plan, statistics, prompts, merged, base_digest=base_digest, dtype=dtype, usage=served)
        is_float32 = statistics.dtypes == {torch.float32}
        refuse_if_different(
            report.difference,
            report.tolerance,
            problem="the merged model is not the tuned one",
            where=report.adapter,
            # Of a large update the order of sums alone can go beyond the limit of float32; that of 16 bits is in nats.
            fix=f"merge with --dtype {'bfloat16' if is_float32 else 'float32'}, or use the adapter on its base",
        )
        durable.write_json(staging / "merge_report.json", asdict(report))
    return report


def _checked_digest(inputs: MergeInputs, plan: MergePlan) -> str:
    """Return the digest of the base's weights. Raises AdapterError for an adapter that was trained on others."""
    digest = digest_tensors(plan.base.stored())
    recorded = inputs.recorded_digest
    if recorded is not None and digest != recorded:
        raise AdapterError(
            f"the adapter was trained on other weights (digest {recorded[:12]}) than this base has ({digest[:12]})",
            where=str(inputs.base_folder),
            fix="name the base it was trained on with --base",
        )
    return digest


def _report(
    inputs: MergeInputs,
    plan: MergePlan,
    statistics: MergeStatistics,
    prompts: list[list[int]],
    merged: list[torch.Tensor],
    *,
    base_digest: str,
    dtype: str | None,
    usage: list[str],
) -> MergeReport:
    is_dequantized = plan.quantization is not None
    is_float32 = statistics.dtypes == {torch.float32}
    tuned, noise = _tuned_logits(inputs, plan, prompts, dequantized=is_dequantized, with_noise=is_float32)
    other_base = None
    if inputs.quantization is not None:
        other_base = compare_logits(_tuned_logits(inputs, plan, prompts, dequantized=not is_dequantized)[0], merged)
    return MergeReport(
        adapter=str(inputs.adapter),
        base=inputs.base_name,
        base_digest=base_digest,
        adapter_digest=plan.adapter_digest,
        merged_digest=statistics.digest,
        merged_into=f"the {plan.quantization} base it was trained on, dequantized" if is_dequantized else "the base",
        dtype=dtype or "as in the base",
        weights_changed=statistics.weights_changed,
        entries_changed=statistics.entries_changed,
        entries_unchanged_by_rounding=statistics.entries_unchanged_by_rounding,
        peak_memory_bytes=statistics.peak_memory_bytes,
        difference=compare_logits(tuned, merged),
        tolerance=limit_for(tuned, is_float32=is_float32, noise=noise),
        other_base=other_base,
        notes=list(plan.notes),
        usage=usage,
    )


def _tuned_logits(
    inputs: MergeInputs, plan: MergePlan, prompts: list[list[int]], *, dequantized: bool, with_noise: bool = False
) -> tuple[list[torch.Tensor], float]:
    """Return the logits of base + adapter as peft computes them, float32 [T, V], and their `float32_noise` or 0.

    dequantized: with the base as it was held in training, else as it was published.
    """
    model = load_model(
        inputs.base,
        ModelConfig(name=inputs.base_name, dtype="float32"),
        tokenizer=inputs.tokenizer,
        device=torch.device("cpu"),
        trained="adapter",
        precision="fp32",
        seed=0,
        labels=inputs.labels,
    ).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in plan.embeddings:  # loading added the mean of rows in float32
                parameter.copy_(plan.with_added_rows(name, plan.base.read(name)))
            if dequantized:
                parameter.copy_(plan.as_held_in_training(name, parameter.data))
    tuned = load_adapter(model, inputs.adapter)
    logits = logits_of(tuned, prompts)
    noise = float32_noise(tuned, prompts, logits) if with_noise else 0.0
    del model, tuned
    gc.collect()  # peft's wrapper and the model refer to each other; the next model needs the memory
    return logits, noise
