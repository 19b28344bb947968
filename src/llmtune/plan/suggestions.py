"""Changes for a run that does not fit, each with its planned memory; and the largest micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmtune.config.schema import Config
from llmtune.plan.forecast import Forecaster
from llmtune.plan.memory import MemoryPlan

__all__ = ["Suggestion", "largest_batch", "suggest"]

MOST_SEQUENCES = 4096
"""The largest micro-batch that is tried."""


@dataclass(frozen=True)
class Suggestion:
    """A change with which the run needs less memory."""

    overrides: str
    """What to add to the command."""
    peak_bytes: int
    """Planned with the change."""
    fits: bool
    keeps_result: bool
    """The result stays as it was, but for rounding."""


def suggest(forecaster: Forecaster) -> list[Suggestion]:
    """Every change that applies and needs less memory than the run as it is: each by itself, and some combined.

    Those that keep the result are also combined into one, which is listed only where it needs less than each of them:
    cutting a step into more micro-batches keeps its gradients in memory longer.
    """
    peak, budget = forecaster.memory().peak_bytes, forecaster.target.budget_bytes
    combined = config = forecaster.config
    singles: list[Suggestion] = []
    combined_texts: dict[str, str] = {}  # by the key that each begins with: a later change of a key replaces an earlier

    def suggestion(text: str, changed: Config, keeps_result: bool) -> Suggestion:
        planned = forecaster.memory(changed).peak_bytes
        return Suggestion(text, planned, planned <= budget, keeps_result)

    for change in CHANGES:
        result = change(config, forecaster)
        if result is None:
            continue
        singles.append(suggestion(*result, change in SAME_RESULT))
        if change in SAME_RESULT and (result := change(combined, forecaster)) is not None:
            text, combined = result
            combined_texts[text.partition("=")[0]] = text
    suggestions = list(singles)
    if len(combined_texts) > 1:
        both = suggestion(" ".join(combined_texts.values()), combined, True)
        parts = [single for single in singles if single.overrides in combined_texts.values()]
        if all(both.peak_bytes < part.peak_bytes for part in parts):
            suggestions.append(both)
    return [suggestion for suggestion in suggestions if suggestion.peak_bytes < peak]


def largest_batch(forecaster: Forecaster, memory: MemoryPlan) -> int | None:
    """The most sequences of a micro-batch that fit, one update a micro-batch; None when not even one does.

    Memory is taken to grow on the straight line through a micro-batch of one sequence and the run's own (or of two
    sequences): peak(n) = peak(1) + slope (tokens(n) - tokens(1)), tokens of the largest micro-batch of n sequences.
    """
    config, budget = forecaster.config, forecaster.target.budget_bytes
    size = config.training.batch_size
    assert isinstance(size, int)
    smallest = forecaster.memory(_with_batch_size(config, 1))
    larger = memory if size > 1 else forecaster.memory(_with_batch_size(config, 2))
    tokens = larger.batch.tokens - smallest.batch.tokens
    slope = max(0.0, (larger.peak_bytes - smallest.peak_bytes) / tokens) if tokens > 0 else 0.0

    def fits(sequences: int) -> bool:
        tokens = forecaster.largest_micro_batch(_with_batch_size(config, sequences))[0].tokens
        return smallest.peak_bytes + slope * (tokens - smallest.batch.tokens) <= budget

    most = min(MOST_SEQUENCES, forecaster.batches(config).num_packs)
    if not fits(1):
        return None
    low = 1  # fits; `high` does not, or is more than there is
    while low * 2 <= most and fits(low * 2):
        low *= 2
    high = min(low * 2, most + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_batch_size(config: Config, sequences: int) -> Config:
    return replace(config, training=replace(config.training, batch_size=sequences, gradient_accumulation_steps=1))


Change = Callable[[Config, Forecaster], tuple[str, Config] | None]
"""Returns overrides for the command and the config with them; None where the change does not apply."""


def _recompute(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.model.recomputes:
        return None
    model = replace(config.model, gradient_checkpointing=True)
    return "model.gradient_checkpointing=true", replace(config, model=model)


def _offload(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    """Only where recomputing alone is not enough: it takes the same work and more."""
    if config.model.gradient_checkpointing == "offload" or config.training.compile or forecaster.target.kind != "cuda":
        return None
    recomputed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    if forecaster.memory(recomputed).peak_bytes <= forecaster.target.budget_bytes:
        return None
    model = replace(config.model, gradient_checkpointing="offload")
    return "model.gradient_checkpointing=offload", replace(config, model=model)


def _offload_weights(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    """Only on a GPU where a quantized base does not fit either: all blocks cross the bus twice in a micro-batch."""
    allowed = config.adapter.method != "none" and not config.training.compile and config.model.quantization != "8bit"
    if config.model.offload_weights or not allowed or forecaster.target.kind != "cuda" or _shards(config, forecaster):
        return None
    model = replace(config.model, gradient_checkpointing=config.model.gradient_checkpointing or True)
    small = replace(model, quantization="4bit") if _quantize(config, forecaster) else model
    if forecaster.memory(replace(config, model=small)).peak_bytes <= forecaster.target.budget_bytes:
        return None
    recomputed = "" if config.model.recomputes else " model.gradient_checkpointing=true"
    return f"model.offload_weights=true{recomputed}", replace(config, model=replace(model, offload_weights=True))


def _shards(config: Config, forecaster: Forecaster) -> bool:
    return forecaster.world_size > 1 and config.distributed.strategy != "ddp"


def _smaller_batch(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    size = config.training.batch_size
    if not isinstance(size, int) or size == 1:
        return None
    count = size * config.training.gradient_accumulation_steps
    training = replace(config.training, batch_size=1, gradient_accumulation_steps=count)
    return f"training.batch_size=1 training.gradient_accumulation_steps={count}", replace(config, training=training)


def _quantize(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    is_frozen = config.adapter.method != "none" and forecaster.prepared.source.kind != "scratch"
    if not is_frozen or config.model.quantization != "none":
        return None
    return "model.quantization=4bit", replace(config, model=replace(config.model, quantization="4bit"))


def _small_optimizer(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.training.optimizer != "adamw":
        return None
    return "training.optimizer=adamw_8bit", replace(config, training=replace(config.training, optimizer="adamw_8bit"))


def _step_in_backward(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    """Drop each gradient once its weight has moved: of all gradients one is left, where a window is one micro-batch."""
    training = config.training
    allowed = forecaster.world_size == 1 and forecaster.precision != "fp16" and not config.tracking.watch
    if training.step_in_backward or config.adapter.method != "none" or not allowed:
        return None
    # Clipping needs the norm of all gradients before the first weight moves.
    unclipped = " training.max_grad_norm=null" if training.max_grad_norm is not None else ""
    # Masters move together, after the backward pass.
    without = " training.master_weights=false" if training.master_weights is True else ""
    changed = replace(training, step_in_backward=True, max_grad_norm=None, master_weights=False)
    return f"training.step_in_backward=true{unclipped}{without}", replace(config, training=changed)


def _without_masters(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    """Masters take two bytes a weight more than a model in float32, and save half of what blocks keep in float32."""
    if config.training.master_weights is not True:
        return None
    return "training.master_weights=false", replace(config, training=replace(config.training, master_weights=False))


def _adapter(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.adapter.method != "none" or forecaster.prepared.source.kind == "scratch":
        return None
    training = replace(config.training, master_weights=False)  # `auto` for an adapter
    return "adapter.method=lora", replace(config, adapter=replace(config.adapter, method="lora"), training=training)


def _shorter_rows(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.objective.method == "grpo":  # its prompts are never cut
        tokens = config.objective.max_new_tokens // 2
        objective = replace(config.objective, max_new_tokens=tokens)
        return (f"objective.max_new_tokens={tokens}", replace(config, objective=objective)) if tokens else None
    longest = min(int(max(forecaster.prepared.data.train.lengths)), config.data.max_length)
    if longest < 2:
        return None
    shorter = replace(config, data=replace(config.data, max_length=longest // 2))
    return f"data.max_length={longest // 2} data.overlong=truncate_right", shorter


CHANGES: tuple[Change, ...] = (
    _recompute,
    _offload,
    _offload_weights,
    _smaller_batch,
    _quantize,
    _small_optimizer,
    _step_in_backward,
    _without_masters,
    _adapter,
    _shorter_rows,
)
"""In the order in which they are listed."""

SAME_RESULT = (_recompute, _offload, _offload_weights, _smaller_batch)
"""Changes that keep the result as it was, but for rounding."""
