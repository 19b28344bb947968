"""From a micro-batch to its loss, by the fastest way that is proven equal on the model at hand.

The flat engine gives the library's own decoder one row of documents without padding, attention by segments, and a loss
over trained rows only; the plain engine gives the library's own forward padded batches. Which one runs is decided once:
the flat one must repeat the plain one's loss on a small batch, and a document's loss must not move by one bit when its
neighbour changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from llmtune.common.decisions import Decision
from llmtune.config.schema import Config
from llmtune.data.dataset.micro_batch import Layout, MicroBatch, make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.flat_forward import flat_nll_sum
from llmtune.engine.objective import plain_nll_sum
from llmtune.errors import ConfigError, ModelError, in_one_line
from llmtune.kernels.activation_offload import offload_inputs, run_in_tiles
from llmtune.kernels.attention import use_attention, use_segment_attention
from llmtune.kernels.head_loss import find_head
from llmtune.kernels.patch_model import patch_model, undo_patches
from llmtune.models.eval_mode import eval_mode
from llmtune.models.load import ATTENTION_IMPLEMENTATIONS
from llmtune.models.parameters import base_model_of

__all__ = [
    "Engine",
    "attention_ways",
    "build_engine",
    "checkpoint_blocks",
    "group_tokens",
]

GROUP_TOKENS = 2048
"""Tokens that a flat micro-batch is cut to on a CPU (whole documents; a longer one goes alone): twice as many gain 3 to
6 %, for 2 GB.
"""

NARROW, NARROW_GROUP_TOKENS = 256, 4096
"""The same for a model of at most that width, whose products are too small otherwise: custom-tiny trains 8 % faster."""


class Arithmetic(Protocol):
    """What the engine needs of `training.precision`: the context in which forward passes run."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        ...


@dataclass(frozen=True)
class Engine:
    """How this run turns micro-batches into losses."""

    nll_sum: Callable[[MicroBatch], Tensor]
    """Sum of weighted negative log-likelihoods of a micro-batch in nats, 0-d float32, joined to the graph unless under
    `no_grad`.
    """

    layout: Layout
    """`flat` (one row, no padding, `segments` given) or `padded`: how micro-batches must be laid out for `nll_sum`."""

    max_group_tokens: int | None = None
    """Flat micro-batches with more tokens than this may be cut further, between documents."""

    decisions: tuple[Decision, ...] = field(default=())
    """What was chosen, and why."""


def build_engine(model: Any, *, config: Config, device: torch.device, precision: Arithmetic) -> Engine:
    """Choose the engine for `model` (a transformers causal LM, bare or inside peft's wrapper, already on `device`).

    Raises ConfigError when `model.attention` asks for something this device does not have, ModelError when the model
    refuses it.
    """
    engine = _choose(model, config, device, precision)
    if config.model.gradient_checkpointing != "offload":
        return engine
    return replace(engine, decisions=(*engine.decisions, run_in_tiles(base_model_of(model))))


def _choose(model: Any, config: Config, device: torch.device, precision: Arithmetic) -> Engine:
    asked = config.model.attention
    if asked in ("flash", "flex") and device.type != "cuda":
        raise ConfigError(
            f"model.attention is `{asked}`, which trains only on a CUDA device, not on `{device.type}`",
            fix="use model.attention: auto",
        )
    compiled = config.training.compile
    more = _recompute(base_model_of(model), config.model.gradient_checkpointing, device)
    refusal = _refusal(model, config)
    tried: list[str] = [] if refusal is None else [refusal]
    if refusal is None:
        for backend in _backends(asked, device, precision):
            # The compiler fuses the library's own operations, so it gets the modules as they are.
            lora_layers = 0 if compiled else patch_model(base_model_of(model), device.type)["LoRA"]
            reason = _try_flat(model, backend, device, precision)
            if reason is None:
                more = (
                    _adapter_decision(lora_layers) + more + (compile_blocks(base_model_of(model)) if compiled else ())
                )
                return _flat_engine(model, backend, device, asked, more)
            undo_patches(base_model_of(model))
            tried.append(f"{backend}: {reason}")
    more += compile_blocks(base_model_of(model)) if compiled else ()
    return _plain_engine(model, asked, "; ".join(tried), more)


def _refusal(model: Any, config: Config) -> str | None:
    """Say why the flat engine is not even tried, or None."""
    if config.training.engine == "plain":
        return "asked for by training.engine"
    if config.distributed.strategy in ("fsdp", "deepspeed"):
        return f"distributed.strategy {config.distributed.strategy} must see every call of the whole model"
    base = base_model_of(model)
    if find_head(base) is None or base.get_decoder() is base:
        return f"{type(base).__name__} has no decoder and output head that can be called apart"
    return None


def _adapter_decision(layers: int) -> tuple[Decision, ...]:
    if not layers:
        return ()
    return (
        Decision(
            "adapter.engine",
            "fused",
            f"{layers} LoRA layers add their update inside the frozen product and keep only their input",
        ),
    )


def checkpoint_blocks(base: Any) -> tuple[Decision, ...]:
    """Recompute each decoder block in the backward pass. Raises ModelError when the model has no such blocks."""
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


def _recompute(base: Any, asked: bool | str, device: torch.device) -> tuple[Decision, ...]:
    if asked == "offload":
        checkpoint_blocks(base)
        return (offload_inputs(base, device),)
    return checkpoint_blocks(base) if asked is True else ()


def compile_blocks(base: Any) -> tuple[Decision, ...]:
    """Compile each decoder block for any length; attention by segments stays outside.

    Raises ModelError when it has no such blocks.
    """
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
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


def _backends(asked: str, device: torch.device, precision: Arithmetic) -> tuple[str, ...]:
    with precision.autocast():
        half = device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return attention_ways(asked, device.type, half=half)


def attention_ways(asked: str, device_type: str, *, half: bool) -> tuple[str, ...]:
    """The ways of attention that the flat engine tries, best first.

    asked: `model.attention`. half: the arithmetic has 16 bits.
    """
    if asked != "auto":
        return {"sdpa": ("sdpa",), "flash": ("varlen",), "flex": ("flex",), "eager": ("eager",)}[asked]
    if device_type == "cuda":
        return ("varlen", "flex", "sdpa") if half else ("flex", "sdpa")
    return ("tiles", "sdpa")


def group_tokens(shape: Any) -> int:
    """Tokens that a flat micro-batch is cut to on a CPU, for a model of that shape (its transformers config)."""
    return NARROW_GROUP_TOKENS if shape.get_text_config().hidden_size <= NARROW else GROUP_TOKENS


def _flat_engine(model: Any, backend: str, device: torch.device, asked: str, more: tuple[Decision, ...]) -> Engine:
    head = find_head(base_model_of(model))
    assert head is not None
    why = f"asked for ({asked})" if asked != "auto" else BACKEND_REASONS[backend]
    return Engine(
        nll_sum=lambda batch: flat_nll_sum(model, batch, head=head, device=device),
        layout="flat",
        max_group_tokens=group_tokens(base_model_of(model).config) if device.type == "cpu" else None,
        decisions=(
            Decision(
                "training.engine",
                "flat",
                "no padding, loss on trained rows only; equal to the plain forward on a probe of this model",
            ),
            Decision("model.attention", backend, why),
            *more,
        ),
    )


def _plain_engine(model: Any, asked: str, reason: str, more: tuple[Decision, ...]) -> Engine:
    decisions = [Decision("training.engine", "plain", reason), *more]
    if asked != "auto":
        use_attention(base_model_of(model), ATTENTION_IMPLEMENTATIONS[asked])
        decisions.append(Decision("model.attention", ATTENTION_IMPLEMENTATIONS[asked], f"asked for ({asked})"))
    return Engine(nll_sum=lambda batch: plain_nll_sum(model, batch), layout="padded", decisions=tuple(decisions))


# ---- proof on the model at hand ----

PROBE_LENGTHS = (7, 12, 5)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
PROBE_ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError, KeyError)


def _try_flat(model: Any, backend: str, device: torch.device, precision: Arithmetic) -> str | None:
    """Switch `model` to a backend and prove it; on failure switch back and say what differed."""
    base = base_model_of(model)
    before = str(base.config._attn_implementation)
    try:
        use_segment_attention(base, backend)
        difference = _probe(model, device, precision)
    except ModelError as error:
        difference = error.problems[0].problem
    except PROBE_ERRORS as error:
        difference = f"{type(error).__name__}: {in_one_line(error)}"
    if difference is not None and base.config._attn_implementation != before:
        use_attention(base, before)
    return difference


def _probe(model: Any, device: torch.device, precision: Arithmetic) -> str | None:
    """Compare the flat loss with the plain one, and a document's loss before and after its neighbour changes.

    None when both hold.
    """
    head = find_head(base_model_of(model))
    assert head is not None
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    documents, changed = _documents(vocabulary, 0), _documents(vocabulary, 1)

    def flat(examples: list[Example]) -> float:
        return float(flat_nll_sum(model, make_micro_batch(examples, "flat", 0), head=head, device=device))

    with eval_mode(model), precision.autocast():
        fast, plain = flat(documents), float(plain_nll_sum(model, make_micro_batch(documents, "padded", 0)))
        one, other = flat(_quiet_first(documents)), flat(_quiet_first(changed))
        dtype = _compute_dtype(model, device)
    if not abs(fast - plain) <= TOLERANCE[dtype] * abs(plain):
        return f"its loss on a probe is {fast:.6g}, the plain forward's {plain:.6g}"
    if one != other:
        return f"a document's loss moved from {one:.8g} to {other:.8g} when its neighbour changed"
    return None


def _compute_dtype(model: Any, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]


def _documents(vocabulary: int, shift: int) -> list[Example]:
    """Three short documents of arbitrary, fixed tokens; `shift` changes the first one only."""
    documents = []
    for number, length in enumerate(PROBE_LENGTHS):
        ids = (7919 * (100 * number + np.arange(length)) + 13 + (shift if number == 0 else 0)) % vocabulary
        weights = np.ones(length, dtype=np.float32)
        weights[0] = 0
        documents.append(Example(source=f"probe:{number}", input_ids=ids.astype(np.int32), weights=weights))
    return documents


def _quiet_first(documents: list[Example]) -> list[Example]:
    return [replace(documents[0], weights=np.zeros_like(documents[0].weights)), *documents[1:]]


BACKEND_REASONS = {
    "tiles": "explicit matrix products by document: the fastest exact attention on a CPU",
    "sdpa": "scaled_dot_product_attention by document: the fastest exact attention this model takes here",
    "varlen": "torch's variable-length flash attention: no padding, no mask, no extra package",
    "flex": "flex attention with a document mask",
    "eager": "all scores written out",
}
