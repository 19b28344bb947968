"""Is a merged model the tuned one? Logits of both on the same prompts, computed in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Difference", "logits_of", "probe_prompts", "tell_apart"]

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
    further = [list(also)[start : start + PROBE_TOKENS] for start in range(0, min(len(also), 2 * PROBE_TOKENS), PROBE_TOKENS)]
    return [prompt for prompt in (*texts, spread, *further) if prompt]


def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits of each prompt alone, float32 [T, V]."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0].float() for prompt in prompts]


def tell_apart(tuned: Sequence[Tensor], merged: Sequence[Tensor]) -> Difference:
    """Compare two models' logits (each a list of [T, V]); a value that is not a number counts as infinitely far.

    >>> one = [torch.tensor([[0.0, 1.0]])]
    >>> tell_apart(one, [torch.tensor([[0.5, 1.5]])])  # a shift changes every logit and no probability
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


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
