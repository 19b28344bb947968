"""The probe of the model at hand: whether the flat engine's fast forms compute what the library's own forward does.

The flat loss must be the plain one on a small batch, and a document's loss must not change by one bit when its
neighbour changes (promises N5 and N15). On a CUDA device the backward pass is probed too, on a document that is longer
than 128 tokens: there forward and backward are other kernels, and torch chooses them by the length and by whether
gradients are wanted.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmtune.common.memory_errors import is_out_of_memory
from llmtune.data.dataset.micro_batch import make_micro_batch
from llmtune.data.example import Example
from llmtune.engine.objective import WHOLE_ROW, flat_nll_sum, plain_nll_sum
from llmtune.engine.precision import Precision
from llmtune.engine.sequence_parallel import SharedRows
from llmtune.engine.sharding import Strategy
from llmtune.errors import ModelError, in_one_line
from llmtune.kernels.attention import BACKENDS, use_attention, use_segment_attention
from llmtune.kernels.linear_cross_entropy import find_head
from llmtune.models.parameters import base_model_of, eval_mode

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["MODEL_ERRORS", "PROBE_ERRORS", "try_backend"]

LENGTHS = {"cpu": (7, 12, 5), "cuda": (7, 300, 5)}
"""Tokens of the probe's documents: of different lengths, so that a shifted position or boundary changes the loss."""

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative difference of the probe's two losses, some ten roundings of the arithmetic's type."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest ||g - g'|| / ||g'|| of the two gradients: each block rounds again, and a wrong factor is far above it."""

COMPARED_WEIGHTS, LARGEST_WEIGHT = 16, 1 << 26
"""Trained weights whose gradients are compared, the model's first of at most that many entries: a gradient there has
come through every block, and holding those of all weights twice would take memory that no plan counts."""

MODEL_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    IndexError,
    KeyError,
    ArithmeticError,
    AssertionError,
)
"""Errors of a model's own code on an input it was not written for."""

PROBE_ERRORS = (*MODEL_ERRORS, MemoryError, ImportError, OSError, subprocess.SubprocessError)
"""Errors of a model that does not take flat rows, or of a kernel that cannot be built or started here."""


def _probe_errors() -> tuple[type[Exception], ...]:
    """Return PROBE_ERRORS, and that of Triton where it is installed: its errors have a base class of their own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return PROBE_ERRORS
    return (*PROBE_ERRORS, TritonError)


def try_backend(
    model: PreTrainedModel | PeftModel,
    backend: str,
    device: torch.device,
    precision: Precision,
    strategy: Strategy,
    rows: SharedRows | None = None,
) -> str | None:
    """Switch `model` to a backend and probe it; when that fails, switch back and return the reason.

    rows: the part of this process in rows that several share; those then compute the probe's flat loss together. Raises
    the error of memory that runs out, which says nothing of the backend.
    """
    base = base_model_of(model)
    before = str(base.config._attn_implementation)
    try:
        use_segment_attention(base, backend, rows.attention(BACKENDS[backend]) if rows else None)
        failure = strategy.run(_probe, model, device, precision, rows, with_gradients=not strategy.is_sharded)
    except ModelError as error:
        failure = error.problems[0].problem
    except _probe_errors() as error:
        if is_out_of_memory(error):
            raise
        failure = f"{type(error).__name__}: {in_one_line(error)}"
    if failure is not None and base.config._attn_implementation != before:
        use_attention(base, before)
    return failure


@dataclass(frozen=True)
class _Losses:
    """The two ways to the loss of the probe's documents."""

    flat: Callable[[Sequence[Example]], Tensor]
    plain: Callable[[Sequence[Example]], Tensor]
    together: Callable[[Tensor], Tensor]
    """Adds what a flat loss and its gradient are on each of the processes that share a row."""


def _probe(
    model: PreTrainedModel | PeftModel,
    device: torch.device,
    precision: Precision,
    rows: SharedRows | None,
    *,
    with_gradients: bool,
) -> str | None:
    """Compare flat and plain losses (and gradients), and a document's loss before and after its neighbour changes.

    None when they are equal, else the difference in words. with_gradients: on a CUDA device. Where weights are sharded
    there is none to compare: a backward pass leaves each process the gradient of its part.
    """
    head = find_head(base_model_of(model))
    assert head is not None
    part = rows.part if rows else WHOLE_ROW
    losses = _Losses(
        lambda examples: flat_nll_sum(
            model, make_micro_batch(examples, "flat", 0), head=head, device=device, part=part
        ),
        lambda examples: plain_nll_sum(model, make_micro_batch(examples, "padded", 0)),
        rows.sum if rows else lambda value: value,
    )
    lengths = _lengths(model, device)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr]
    documents, changed = _documents(vocabulary, lengths, 0), _documents(vocabulary, lengths, 1)
    with eval_mode(model), precision.autocast():
        flat, plain = float(losses.together(losses.flat(documents))), float(losses.plain(documents))
        # The first document changes and carries no loss, so the sums are those of its neighbours alone.
        before, after = (float(losses.together(losses.flat(_untrain_first(some)))) for some in (documents, changed))
        dtype = _compute_dtype(model, device)
    # Written so that a NaN fails as well.
    if not abs(flat - plain) <= LOSS_TOLERANCE[dtype] * abs(plain):
        return f"its loss on a probe is {flat:.6g}, the plain forward's {plain:.6g}"
    if before != after:
        return f"a document's loss moved from {before:.8g} to {after:.8g} when its neighbour changed"
    if not with_gradients or device.type != "cuda" or torch.is_inference_mode_enabled():
        return None
    apart = _gradients_apart(model, losses, documents, precision)
    if not apart <= GRADIENT_TOLERANCE[dtype]:
        return f"its gradient on a probe is {apart:.2g} of its norm away from the plain backward's"
    return None


def _gradients_apart(
    model: PreTrainedModel | PeftModel, losses: _Losses, documents: Sequence[Example], precision: Precision
) -> float:
    """Return ||g - g'|| / ||g'|| of the first trained weights' gradients g (flat) and g' (plain); 0 without any."""
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight.numel() <= LARGEST_WEIGHT]
    weights = weights[:COMPARED_WEIGHTS]
    if not weights:
        return 0.0
    tokens = sum(map(len, documents))

    def gradient(loss: Callable[[Sequence[Example]], Tensor]) -> Tensor:
        with torch.enable_grad(), precision.autocast():
            mean = loss(documents) / tokens * precision.scale
        parts = torch.autograd.grad(mean, weights, allow_unused=True)
        return torch.cat([part.flatten().float() for part in parts if part is not None])

    with eval_mode(model):
        flat, plain = losses.together(gradient(losses.flat)), gradient(losses.plain)
    return float((flat - plain).norm() / plain.norm())


def _compute_dtype(model: PreTrainedModel | PeftModel, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.get_input_embeddings().weight.dtype  # type: ignore[return-value]


def _lengths(model: PreTrainedModel | PeftModel, device: torch.device) -> tuple[int, ...]:
    """The lengths of the documents: at most as many tokens as the model has positions."""
    positions = getattr(base_model_of(model).config.get_text_config(), "max_position_embeddings", None)
    return tuple(min(length, positions or length) for length in LENGTHS.get(device.type, LENGTHS["cpu"]))


def _documents(vocabulary: int, lengths: Sequence[int], shift: int) -> list[Example]:
    """Short documents of arbitrary, fixed tokens; `shift` changes the first one only."""
    documents = []
    for number, length in enumerate(lengths):
        ids = (7919 * (100 * number + np.arange(length)) + 13 + (shift if number == 0 else 0)) % vocabulary
        weights = np.ones(length, dtype=np.float32)
        weights[0] = 0
        documents.append(Example(source=f"probe:{number}", input_ids=ids.astype(np.int32), weights=weights))
    return documents


def _untrain_first(documents: list[Example]) -> list[Example]:
    return [replace(documents[0], weights=np.zeros_like(documents[0].weights)), *documents[1:]]
