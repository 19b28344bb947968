"""The forward pass of a training: from a micro-batch to its loss sum, by the fastest way that is equal on this model.

The flat engine gives the library's own decoder one row of documents without padding, attention by segments, and a loss
over trained rows only. The plain engine gives the library's own forward padded batches. A probe (`probe.py`) decides
once which one runs.

Shapes: T tokens of a row, N trained tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llmtune.common.decisions import Decision
from llmtune.config.schema import Config
from llmtune.data.dataset.micro_batch import Layout, MicroBatch
from llmtune.engine.devices import Devices
from llmtune.engine.objective import (
    WHOLE_ROW,
    RowPart,
    flat_log_probs,
    flat_nll_sum,
    flat_token_log_probs,
    plain_log_probs,
    plain_nll_sum,
    plain_token_log_probs,
)
from llmtune.engine.precision import Precision
from llmtune.engine.probe import Probe
from llmtune.engine.scoring import Scores, flat_scores, plain_scores
from llmtune.engine.sequence_parallel import SharedRows
from llmtune.engine.sharding import Strategy, Whole
from llmtune.errors import ConfigError, ModelError
from llmtune.kernels.activation_offload import offload_inputs
from llmtune.kernels.attention import use_attention
from llmtune.kernels.liger import LIGER
from llmtune.kernels.linear_cross_entropy import Head, find_head
from llmtune.kernels.patch_model import NO_LIBRARIES, kernel_libraries, patch_model, undo_patches
from llmtune.kernels.tiled_mlp import run_in_tiles
from llmtune.models.load import ATTENTION_IMPLEMENTATIONS
from llmtune.models.parameters import base_model_of, checkpointable_blocks, find_score_head

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "Engine",
    "attention_ways",
    "build_engine",
    "checkpoint_blocks",
    "group_tokens",
]

GROUP_TOKENS = 2048
"""Tokens to which a flat micro-batch is cut on a CPU (between documents; a longer document is alone): twice as many
gain 3 to 6 %, for 2 GB.
"""

NARROW_WIDTH, NARROW_GROUP_TOKENS = 256, 4096
"""The same for a model of at most that width, whose products are too small otherwise: custom-tiny trains 8 % faster."""


@dataclass(frozen=True)
class Engine:
    """The forward pass that a training runs, and the layout of micro-batches that it takes."""

    nll_sum: Callable[[MicroBatch], Tensor]
    """Sum of weighted negative log-likelihoods of a micro-batch in nats, 0-d float32, joined to the graph unless under
    `no_grad`.
    """

    log_probs: Callable[[MicroBatch], Tensor]
    """Log-probability of the trained tokens of each example in nats, float32 [S], joined to the graph likewise."""

    token_log_probs: Callable[[MicroBatch, float], Tensor]
    """Log-probability of each trained token at a temperature, in nats, float32 [N], example after example, joined to
    the graph likewise.
    """

    scores: Scores
    """Scores of each example by a model that gives scores, float32 [S, L], joined to the graph likewise."""

    layout: Layout
    """`flat` (one row, no padding, `segments` given) or `padded`: how micro-batches must be laid out for `nll_sum`."""

    max_group_tokens: int | None = None
    """Flat micro-batches with more tokens than this may be cut further, between documents."""

    equal_counts: bool = False
    """Whether every process must run the same number of micro-batches, because their weights are sharded."""

    decisions: tuple[Decision, ...] = field(default=())
    """The choices made, with their reasons."""


def build_engine(
    model: PreTrainedModel | PeftModel,
    *,
    config: Config,
    device: torch.device,
    precision: Precision,
    strategy: Strategy | None = None,
    rows: SharedRows | None = None,
) -> Engine:
    """Choose the engine for `model` (a transformers causal LM, bare or inside peft's wrapper, already on `device`).

    strategy: how its weights are held, where several processes train it; all of them call this then. rows: the part of
    this process in rows that several share.

    Raises ConfigError when `model.attention` names a way that this device does not have or the model's heads cannot be
    shared, ModelError when the model refuses it, or needs whole rows where several processes share them.
    """
    strategy = strategy or Whole(Devices(device))
    shared = (rows.check_heads(base_model_of(model).config),) if rows else ()
    engine = _choose_engine(model, config, device, precision, strategy, rows)
    nll_sum, log_probs, token_log_probs = engine.nll_sum, engine.log_probs, engine.token_log_probs
    scores = engine.scores
    engine = replace(
        engine,
        nll_sum=lambda batch: strategy.run(nll_sum, batch),
        log_probs=lambda batch: strategy.run(log_probs, batch),
        token_log_probs=lambda batch, temperature: strategy.run(token_log_probs, batch, temperature),
        scores=lambda batch: strategy.run(scores, batch),
        equal_counts=strategy.is_sharded,
        decisions=(*shared, *engine.decisions),
    )
    if config.model.gradient_checkpointing != "offload":
        return engine
    return replace(engine, decisions=(*engine.decisions, run_in_tiles(base_model_of(model), whole=strategy.whole)))


def _choose_engine(
    model: PreTrainedModel | PeftModel,
    config: Config,
    device: torch.device,
    precision: Precision,
    strategy: Strategy,
    rows: SharedRows | None,
) -> Engine:
    attention = config.model.attention
    if attention in ("flash", "flex") and device.type != "cuda":
        raise ConfigError(
            f"model.attention is `{attention}`, which trains only on a CUDA device, not on `{device.type}`",
            fix="use model.attention: auto",
        )
    base, is_compiled = base_model_of(model), config.training.compile
    decisions = _recompute_blocks(base, config.model.gradient_checkpointing, device)
    reason_against = _reason_for_plain_engine(model, config)
    failures: list[str] = [] if reason_against is None else [reason_against]
    backends = () if failures else _backends(attention, device, precision)
    if backends:
        probe = Probe(model, device, precision, strategy, rows)
        backends, failures = ((), [probe.failure]) if probe.failure else (backends, failures)
    # The compiler fuses the library's own operations, so it gets the modules as they are.
    libraries = (NO_LIBRARIES,) if is_compiled else _fewer_and_fewer(kernel_libraries(device.type))
    tried: tuple[Counter[str], Head | None] | None = None
    for backend, chosen in product(backends, libraries):
        counts = Counter() if is_compiled else patch_model(base, device.type, chosen)
        head = find_head(base, chosen)
        if chosen != libraries[0] and (counts, head) == tried:
            undo_patches(base)
            continue  # the model has no part with such a kernel
        tried = counts, head
        failure = probe.failure_of(backend, head)
        if failure is None:
            decisions = _patch_decisions(counts, head, device) + decisions
            decisions += compile_blocks(base) if is_compiled else ()
            part = rows.part if rows else WHOLE_ROW
            return _flat_engine(model, backend, head, device, part, attention, decisions, failures)
        undo_patches(base)
        failures.append(f"{backend}{_words(chosen, device)}: {failure}")
    if rows:
        raise ModelError(
            f"{type(base).__name__} needs whole rows: {'; '.join(failures)}",
            where="distributed.sequence_parallel",
            fix="set it to 1; `distributed.strategy: fsdp` and `model.gradient_checkpointing: offload` save memory too",
        )
    decisions += compile_blocks(base) if is_compiled else ()
    return _plain_engine(model, attention, "; ".join(failures), decisions)


def _fewer_and_fewer(libraries: frozenset[str]) -> tuple[frozenset[str], ...]:
    """The libraries whose kernels are tried: all of them, without Liger, none."""
    return tuple(dict.fromkeys((libraries, libraries - {LIGER}, NO_LIBRARIES)))


def _words(libraries: frozenset[str], device: torch.device) -> str:
    if LIGER in libraries:
        return " with Liger's kernels"
    return "" if libraries or device.type != "cuda" else " without kernels"


def _reason_for_plain_engine(model: PreTrainedModel | PeftModel, config: Config) -> str | None:
    """Give the reason why the flat engine is not even tried, or None."""
    if config.training.engine == "plain":
        return "asked for by training.engine"
    base = base_model_of(model)
    has_head = find_head(base) is not None or find_score_head(base) is not None
    if not has_head or base.get_decoder() is base:
        return f"{type(base).__name__} has no decoder and output head that can be called apart"
    return None


def _patch_decisions(counts: Counter[str], head: Head | None, device: torch.device) -> tuple[Decision, ...]:
    decisions = []
    if layers := counts["LoRA"]:
        reason = f"{layers} LoRA layers add their update inside the frozen product and keep only their input"
        decisions.append(Decision("adapter.engine", "fused", reason))
    if device.type != "cuda":
        return tuple(decisions)
    reasons = {name: KERNEL_REASONS[name].format(counts[name]) for name in KERNEL_REASONS if counts[name]}
    if head is not None and head.in_place:
        reasons["cross-entropy by Liger"] = "the loss writes its gradient over the logits"
    if reasons:
        if LIGER not in kernel_libraries(device.type):
            reasons[""] = "Liger's kernels, for more parts, are not installed (pip install 'llmtune[gpu]')"
        names = ", ".join(filter(None, reasons))
        decisions.append(Decision("training.kernels", names, "; ".join(reasons.values())))
    return tuple(decisions)


def checkpoint_blocks(base: PreTrainedModel) -> tuple[Decision, ...]:
    """Recompute each decoder block in the backward pass (activation checkpointing, arXiv:1604.06174).

    Raises ModelError when the model has no such blocks.
    """
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(base).__name__} cannot recompute its blocks", fix="set model.gradient_checkpointing: false"
        )
    # transformers renamed the method in 5.23; the older name warns there
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    # Only re-entrant checkpoints need a gradient at the first input, and it costs the first block twice.
    base.disable_input_require_grads()
    return (
        Decision("model.gradient_checkpointing", True, "asked for: each block is computed again in the backward pass"),
    )


def _recompute_blocks(base: PreTrainedModel, mode: bool | str, device: torch.device) -> tuple[Decision, ...]:
    if mode == "offload":
        checkpoint_blocks(base)
        return (offload_inputs(base, device),)
    return checkpoint_blocks(base) if mode is True else ()


def compile_blocks(base: PreTrainedModel) -> tuple[Decision, ...]:
    """Compile each decoder block for any length; attention by segments stays outside.

    Raises ModelError when the model has no such blocks.
    """
    blocks = checkpointable_blocks(base)
    if not blocks:
        raise ModelError(
            f"{type(base).__name__} has no blocks to compile one by one", fix="set training.compile: false"
        )
    for block in blocks:
        block.compile(dynamic=True)
    return (
        Decision(
            "training.compile",
            True,
            f"asked for: {len(blocks)} blocks, compiled once for all lengths at their first use",
        ),
    )


def _backends(attention: str, device: torch.device, precision: Precision) -> tuple[str, ...]:
    with precision.autocast():
        half = device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return attention_ways(attention, device.type, half=half)


def attention_ways(attention: str, device_type: str, *, half: bool) -> tuple[str, ...]:
    """Name the attention backends that the flat engine tries, best first.

    attention: the value of `model.attention`. half: the arithmetic has 16 bits.
    """
    if attention != "auto":
        return {"sdpa": ("sdpa",), "flash": ("varlen",), "flex": ("flex",), "eager": ("eager",)}[attention]
    if device_type == "cuda":
        return ("varlen", "flex", "sdpa", "tiles") if half else ("flex", "sdpa", "tiles")
    return ("tiles", "sdpa")


def group_tokens(shape: PreTrainedConfig) -> int:
    """Tokens to which a flat micro-batch is cut on a CPU, for a model of that shape."""
    return NARROW_GROUP_TOKENS if shape.get_text_config().hidden_size <= NARROW_WIDTH else GROUP_TOKENS


def _flat_engine(
    model: PreTrainedModel | PeftModel,
    backend: str,
    found_head: Head | None,
    device: torch.device,
    part: RowPart,
    attention: str,
    decisions: tuple[Decision, ...],
    failures: Sequence[str],
) -> Engine:
    # None of a model that gives scores, of which nobody asks tokens.
    head = cast("Head", found_head)
    reason = f"asked for ({attention})" if attention != "auto" else BACKEND_REASONS[backend]
    if failures:
        reason += f"; what is faster failed: {'; '.join(failures)}"
    return Engine(
        nll_sum=lambda batch: flat_nll_sum(model, batch, head=head, device=device, part=part),
        log_probs=lambda batch: flat_log_probs(model, batch, head=head, device=device),
        token_log_probs=lambda batch, temperature: flat_token_log_probs(
            model, batch, temperature, head=head, device=device
        ),
        scores=lambda batch: flat_scores(model, batch, device=device),
        layout="flat",
        max_group_tokens=group_tokens(base_model_of(model).config) if device.type == "cpu" else None,
        decisions=(
            Decision(
                "training.engine",
                "flat",
                "no padding, loss on trained rows only; equal to the plain forward on a probe of this model",
            ),
            Decision("model.attention", backend, reason),
            *decisions,
        ),
    )


def _plain_engine(
    model: PreTrainedModel | PeftModel, attention: str, reason: str, decisions: tuple[Decision, ...]
) -> Engine:
    all_decisions = [Decision("training.engine", "plain", reason), *decisions]
    if attention != "auto":
        implementation = ATTENTION_IMPLEMENTATIONS[attention]
        use_attention(base_model_of(model), implementation)
        all_decisions.append(Decision("model.attention", implementation, f"asked for ({attention})"))
    return Engine(
        nll_sum=lambda batch: plain_nll_sum(model, batch),
        log_probs=lambda batch: plain_log_probs(model, batch),
        token_log_probs=lambda batch, temperature: plain_token_log_probs(model, batch, temperature),
        scores=lambda batch: plain_scores(model, batch),
        layout="padded",
        decisions=tuple(all_decisions),
    )


BACKEND_REASONS = {
    "tiles": "explicit matrix products by document: the fastest exact attention on a CPU",
    "sdpa": "scaled_dot_product_attention by document",
    "varlen": "torch's variable-length flash attention: no padding, no mask, no extra package",
    "flex": "flex attention with a document mask",
    "eager": "all scores written out",
}

KERNEL_REASONS = {
    "RMS norm": "{} norms in torch's fused kernel, one pass over memory each way; rounded once, not twice",
    "SwiGLU by Liger": "{} feed-forward products in one pass each way, gradients written over their inputs",
    "rotary positions by Liger": "queries and keys of {} attention layers rotated in place",
}
"""What is said of the parts of a model that run in a kernel of the device."""
