"""What to change where a run does not fit, each change with its predicted effect.

And how much more would fit where it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmtune.config.schema import Config
from llmtune.plan.forecast import Forecaster
from llmtune.plan.memory import MemoryPlan

__all__ = ["KEEPING_OVERRIDES", "Change", "changes", "largest_batch"]

MOST_SEQUENCES = 4096


@dataclass(frozen=True)
class Change:
    """One way to need less."""

    overrides: str
    """What to add to the command."""
    peak_bytes: int
    fits: bool


def changes(forecaster: Forecaster) -> list[Change]:
    """Every change that applies and needs less than the run as it is, each by itself.

    Those that keep the result also together.

    Together they are named only where that is better still: cutting a step into more micro-batches keeps its gradients
    in memory longer.
    """
    now = forecaster.memory().peak_bytes
    config = forecaster.config
    tried: list[tuple[str, Config]] = []
    together = config
    texts: dict[str, str] = {}  # by the key that each begins with: a later one about the same key replaces it
    for change in CHANGES:
        found = change(config, forecaster)
        if found is None:
            continue
        tried.append(found)
        if change in KEEPING:
            again = change(together, forecaster)
            if again is not None:
                together, texts = again[1], {**texts, again[0].partition("=")[0]: again[0]}
    budget = forecaster.target.budget_bytes
    effects = [Change(text, forecaster.memory(wanted).peak_bytes, False) for text, wanted in tried]
    if len(texts) > 1:
        both = Change(" ".join(texts.values()), forecaster.memory(together).peak_bytes, False)
        effects += (
            [both]
            if all(both.peak_bytes < one.peak_bytes for one in effects if one.overrides in texts.values())
            else []
        )
    return [replace(one, fits=one.peak_bytes <= budget) for one in effects if one.peak_bytes < now]


def largest_batch(forecaster: Forecaster, memory: MemoryPlan) -> int | None:
    """The most sequences of a micro-batch that fit, one update a micro-batch; None when not even one does.

    Memory is taken to grow on the straight line through a micro-batch of one sequence and the run's own (or one of
    two).
    """
    config = forecaster.config
    budget = forecaster.target.budget_bytes
    size = config.training.batch_size
    assert isinstance(size, int)
    one = forecaster.memory(_sized(config, 1))
    other = memory if size > 1 else forecaster.memory(_sized(config, 2))
    more = other.batch.tokens - one.batch.tokens
    slope = max(0.0, (other.peak_bytes - one.peak_bytes) / more) if more > 0 else 0.0

    def fits(sequences: int) -> bool:
        tokens = forecaster.largest(_sized(config, sequences))[0].tokens
        return one.peak_bytes + slope * (tokens - one.batch.tokens) <= budget

    most = min(MOST_SEQUENCES, forecaster.batches(config).num_packs)
    if not fits(1):
        return None
    low = 1
    while low * 2 <= most and fits(low * 2):
        low *= 2
    high = min(low * 2, most + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low < most or not fits(most) else most


def _sized(config: Config, sequences: int) -> Config:
    return replace(config, training=replace(config.training, batch_size=sequences, gradient_accumulation_steps=1))


def _plain_weights(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.model.weights_prepack is not True:
        return None
    return "model.weights_prepack=false", replace(config, model=replace(config.model, weights_prepack=False))


def _recompute(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.model.recomputes:
        return None
    return "model.gradient_checkpointing=true", replace(
        config, model=replace(config.model, gradient_checkpointing=True)
    )


def _offload(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    """Only where recomputing alone is not enough: it takes the same work and more."""
    if config.model.gradient_checkpointing == "offload" or config.training.compile or forecaster.target.kind != "cuda":
        return None
    recomputed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    if forecaster.memory(recomputed).peak_bytes <= forecaster.target.budget_bytes:
        return None
    return "model.gradient_checkpointing=offload", replace(
        config, model=replace(config.model, gradient_checkpointing="offload")
    )


def _smaller_batch(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    size = config.training.batch_size
    if not isinstance(size, int) or size == 1:
        return None
    count = size * config.training.gradient_accumulation_steps
    training = replace(config.training, batch_size=1, gradient_accumulation_steps=count)
    return f"training.batch_size=1 training.gradient_accumulation_steps={count}", replace(config, training=training)


def _quantize(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    if (
        config.adapter.method == "none"
        or config.model.quantization != "none"
        or forecaster.prepared.source.kind == "scratch"
    ):
        return None
    return "model.quantization=4bit", replace(config, model=replace(config.model, quantization="4bit"))


def _adapter(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.adapter.method != "none" or forecaster.prepared.source.kind == "scratch":
        return None
    return "adapter.method=lora", replace(config, adapter=replace(config.adapter, method="lora"))


def _small_optimizer(config: Config, _forecaster: Forecaster) -> tuple[str, Config] | None:
    if config.training.optimizer != "adamw":
        return None
    return "training.optimizer=adamw_8bit", replace(config, training=replace(config.training, optimizer="adamw_8bit"))


def _step_in_backward(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    """Drop each gradient once its weight has moved.

    Where windows are one micro-batch that leaves one gradient instead of all.
    """
    training = config.training
    allowed = forecaster.world_size == 1 and forecaster.precision != "fp16" and not config.tracking.watch
    if training.step_in_backward or config.adapter.method != "none" or not allowed:
        return None
    unclipped = " training.max_grad_norm=null" if training.max_grad_norm is not None else ""
    changed = replace(training, step_in_backward=True, max_grad_norm=None)
    return f"training.step_in_backward=true{unclipped}", replace(config, training=changed)


def _shorter(config: Config, forecaster: Forecaster) -> tuple[str, Config] | None:
    longest = min(int(max(forecaster.prepared.data.train.lengths)), config.data.max_length)
    if longest < 2:
        return None
    shorter = replace(config, data=replace(config.data, max_length=longest // 2))
    return f"data.max_length={longest // 2} data.overlong=truncate_right", shorter


CHANGES: tuple[Callable[[Config, Forecaster], tuple[str, Config] | None], ...] = (
    _plain_weights,
    _recompute,
    _offload,
    _smaller_batch,
    _quantize,
    _small_optimizer,
    _step_in_backward,
    _adapter,
    _shorter,
)
KEEPING = (_plain_weights, _recompute, _offload, _smaller_batch)
"""Changes that keep the result as it was, but for rounding."""

KEEPING_OVERRIDES = ("model.weights_prepack=", "model.gradient_checkpointing=", "training.batch_size=")
"""How the overrides of those begin."""
