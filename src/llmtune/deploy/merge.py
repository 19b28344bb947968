"""Fold an adapter into its base: weight by weight, rounded once, reloaded, compared, and only then given its name
(promise N8).

Memory: one weight of the base, its merged form and some 100 MB of float64 at a time while the files are written,
whatever the model's size; the comparison afterwards loads base and result in float32, one after the other.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from llmtune import durable
from llmtune.adapters.load import load_adapter
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
from llmtune.deploy.merge_inputs import MergeInputs, find_merge_inputs
from llmtune.deploy.merge_plan import MergePlan, plan_merge
from llmtune.deploy.write_merged import Written, write_merged
from llmtune.errors import AdapterError, UsageError
from llmtune.models.load import load_model, resize_for_tokenizer
from llmtune.models.quantization import quantize_dequantize
from llmtune.models.weights import digest_tensors

__all__ = ["MergeReport", "merge_lora"]


@dataclass(frozen=True)
class MergeReport:
    """What merge_report.json says."""

    adapter: str
    base: str
    base_digest: str
    adapter_digest: str
    merged_digest: str
    merged_into: str
    """`the base`, or `the 4bit base it was trained on, dequantized`."""
    dtype: str
    """Type of the written weights; `as in the base` when none was asked for."""
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
    """The result against the adapter on the base the other way round (dequantized or not); None for an adapter of a
    plain base.
    """
    notes: list[str] = field(default_factory=list)


def merge_lora(
    source: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    print_line: PrintLine = silent,
) -> MergeReport:
    """Write `output`, a model folder that `AutoModelForCausalLM.from_pretrained` loads, from the adapter in `source` (a
    run or an adapter).

    base: another place of the same base; an adapter trained on a quantized base then goes into the unquantized weights.
    dtype: float32, bfloat16 or float16; each weight keeps its stored type when None.

    Raises AdapterError for an adapter of another base, UsageError when `output` exists, CheckpointError when the
    reloaded result differs from base + adapter by more than the tolerance; `output` then does not exist.
    """
    if output.exists():
        raise UsageError(f"`{output}` already exists", where="--output", fix="name a folder that does not")
    origin = find_merge_inputs(source, base, offline=offline)
    print_line(f"merging {origin.adapter} into {origin.base_name}")
    plan = plan_merge(origin, dtype=None if dtype is None else torch_dtype(dtype), dequantize=base is None)
    digest = _checked_digest(origin, plan)
    durable.prepare_target(output, print_line)
    with durable.commit_folder(output, replace=False) as staging:
        written = write_merged(plan, origin, staging)
        print_line(f"comparing the result with base + adapter on {len(_prompts(origin, plan))} prompts")
        report = _report(origin, plan, written, staging, digest, dtype)
        refuse_if_different(
            report.difference,
            report.tolerance,
            problem="the merged model is not the tuned one",
            where=report.adapter,
            fix="merge with --dtype float32, or use the adapter on its base",
        )
        durable.write_json(staging / "merge_report.json", asdict(report))
    return report


def _checked_digest(origin: MergeInputs, plan: MergePlan) -> str:
    """Return the digest of the base's weights; refuse an adapter that was trained on others."""
    digest = digest_tensors(plan.base.stored())
    if origin.recorded_digest is not None and digest != origin.recorded_digest:
        raise AdapterError(
            f"the adapter was trained on other weights (digest {origin.recorded_digest[:12]}) than this base has ({digest[:12]})",
            where=str(origin.base_folder),
            fix="name the base it was trained on with --base",
        )
    return digest


def _report(
    origin: MergeInputs, plan: MergePlan, written: Written, staging: Path, digest: str, dtype: str | None
) -> MergeReport:
    prompts = _prompts(origin, plan)
    merged = reloaded_logits(staging, prompts)
    tuned = _tuned_logits(origin, plan, prompts, dequantized=plan.quantization is not None)
    other = None
    if origin.quantization is not None:
        other = compare_logits(_tuned_logits(origin, plan, prompts, dequantized=plan.quantization is None), merged)
    limit = limit_for(tuned, is_float32=written.dtypes == {torch.float32})
    return MergeReport(
        adapter=str(origin.adapter),
        base=origin.base_name,
        base_digest=digest,
        adapter_digest=plan.adapter_digest,
        merged_digest=written.digest,
        merged_into="the base"
        if plan.quantization is None
        else f"the {plan.quantization} base it was trained on, dequantized",
        dtype=dtype or "as in the base",
        weights_changed=written.weights_changed,
        entries_changed=written.entries_changed,
        entries_unchanged_by_rounding=written.entries_unchanged_by_rounding,
        peak_memory_bytes=written.peak_memory_bytes,
        difference=compare_logits(tuned, merged),
        tolerance=limit,
        other_base=other,
        notes=list(plan.notes),
    )


def _prompts(origin: MergeInputs, plan: MergePlan) -> list[list[int]]:
    return probe_prompts(
        origin.tokenizer, plan.rows, sorted({row for update in plan.all_updates for row in update.rows})
    )


def _tuned_logits(
    origin: MergeInputs, plan: MergePlan, prompts: list[list[int]], *, dequantized: bool
) -> list[torch.Tensor]:
    """Return the logits of base + adapter as peft computes them.

    The base as it was held in training when `dequantized`.
    """
    from llmtune.config.schema import ModelConfig

    loaded = load_model(
        origin.base,
        ModelConfig(name=origin.base_name, dtype="float32"),
        tokenizer=origin.tokenizer,
        device=torch.device("cpu"),
        trained="adapter",
        precision="fp32",
        seed=0,
    )
    model = loaded.model
    resize_for_tokenizer(model, origin.tokenizer)
    if dequantized:
        assert origin.quantization is not None
        held = torch_dtype(origin.held_dtype or "float32")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(parameter.to(held))
                if plan.is_quantized(name):
                    stored = parameter.T if plan.is_transposed(name) else parameter
                    seen = quantize_dequantize(stored.data, origin.quantization, held)
                    parameter.copy_(seen.T if plan.is_transposed(name) else seen)
    logits = logits_of(load_adapter(model, origin.adapter), prompts)
    del model, loaded
    gc.collect()
    return logits
