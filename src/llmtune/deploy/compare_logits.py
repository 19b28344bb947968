"""Is a written model the one it was made from? Logits of both on the same prompts, computed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import CheckpointError
from llmtune.models.quiet_libraries import quiet_libraries

__all__ = [
    "FP32_TOLERANCE",
    "KL_TOLERANCE",
    "Difference",
    "compare_logits",
    "limit_for",
    "logits_of",
    "probe_prompts",
    "refuse_if_different",
    "reloaded_logits",
]

FP32_TOLERANCE = 1e-5
"""Largest difference of a logit, in units of the largest logit where that is above 1: float32 carries 24 bits, and no
more can agree.
"""

KL_TOLERANCE = 1e-3
"""Largest mean divergence of a result rounded to 16 bits, nats."""

PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "Write a short poem about the sea.\n\nThe waves",
    'def add(a, b):\n    """Return the sum of two numbers."""\n    return',
    '{"name": "Ada", "born": 1815, "city": "London"}',
)
PROBE_TOKENS = 48
"""Longest probe, in tokens; keeps the logits of all probes together below 200 MB for a vocabulary of 256,000."""


@dataclass(frozen=True)
class Difference:
    """How far apart two models' logits are, over every position of every probe."""

    max_abs_logit: float
    """Largest absolute difference of a logit."""

    mean_kl: float
    """Mean Kullback-Leibler divergence of the next-token distributions, nats: KL(tuned || merged)."""

    same_top_token: float
    """Fraction of positions where both find the same token most likely."""


def probe_prompts(tokenizer: Any, rows: int, also: Sequence[int] = ()) -> list[list[int]]:
    """Return token ids to compare on: a few texts, tokens spread over all `rows` of the embedding, and those in `also`."""
    texts = [tokenizer(text, add_special_tokens=True)["input_ids"][:PROBE_TOKENS] for text in PROBES]
    spread = [round(place * (rows - 1) / (PROBE_TOKENS // 2 - 1)) for place in range(PROBE_TOKENS // 2)]
    further = [
        list(also)[start : start + PROBE_TOKENS] for start in range(0, min(len(also), 2 * PROBE_TOKENS), PROBE_TOKENS)
    ]
    return [prompt for prompt in (*texts, spread, *further) if prompt]


def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits of each prompt alone, float32 [T, V]."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0].float() for prompt in prompts]


def compare_logits(tuned: Sequence[Tensor], merged: Sequence[Tensor]) -> Difference:
    """Compare two models' logits (each a list of [T, V]); a value that is not a number counts as infinitely far.

    >>> one = [torch.tensor([[0.0, 1.0]])]
    >>> compare_logits(one, [torch.tensor([[0.5, 1.5]])])  # a shift changes every logit and no probability
    Difference(max_abs_logit=0.5, mean_kl=0.0, same_top_token=1.0)
    """
    largest = divergence = agreeing = 0.0
    positions = 0
    for one, other in zip(tuned, merged, strict=True):
        largest = max(largest, _or_inf(float((one - other).abs().max())))
        log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence += _or_inf(float((log_p.exp() * (log_p - log_q)).sum()))
        agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
        positions += len(one)
    return Difference(largest, max(divergence, 0.0) / positions, agreeing / positions)


def limit_for(logits: Sequence[Tensor], *, is_float32: bool) -> str:
    """Say how close a result must be to the model with these logits: `measure <= limit`, the measure a field of
    `Difference`.

    >>> limit_for([torch.tensor([[0.5, 38.0]])], is_float32=True), limit_for([], is_float32=False)
    ('max_abs_logit <= 0.00038', 'mean_kl <= 0.001')
    """
    if not is_float32:
        return f"mean_kl <= {KL_TOLERANCE:g}"
    scale = max(1.0, *(float(one.abs().max()) for one in logits))
    return f"max_abs_logit <= {FP32_TOLERANCE * scale:.3g}"


def refuse_if_different(found: Difference, limit: str, *, problem: str, where: str, fix: str) -> None:
    """Raise CheckpointError, beginning with `problem`, for a result that is further away than `limit` (see
    `limit_for`).
    """
    measure, _, most = limit.partition(" <= ")
    value = getattr(found, measure)
    if not value <= float(most):
        raise CheckpointError(
            f"{problem}: {measure} is {value:.3g}, and {most} is allowed; nothing was written", where=where, fix=fix
        )


def reloaded_logits(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Reload what was written with plain transformers, in float32.

    Raises CheckpointError for a missing or unexpected weight.
    """
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        read: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
        model, info = read(
            str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"the written model does not load as it was written: `{wrong[0]}`", where=str(folder), fix="report this"
        )
    return logits_of(model.eval(), prompts)


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
