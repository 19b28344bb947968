"""Compare a written model with its source: logits of both on the same prompts, computed in float32.

Legend: T tokens of a prompt, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from llmtune.errors import CheckpointError
from llmtune.models.read_config import auto_class, quiet_libraries
from llmtune.models.scan import read_json_file
from llmtune.models.score_head import labels_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "FP32_TOLERANCE",
    "KL_TOLERANCE",
    "Difference",
    "compare_logits",
    "float32_noise",
    "limit_for",
    "logits_of",
    "probe_prompts",
    "refuse_if_different",
    "reloaded_logits",
]

FP32_TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit where that is above 1: float32 carries 24 bits."""

NOISE_FACTOR = 8
"""A right merge was at most 2.5 times as far as `float32_noise`, one whose scale is wrong by 1 % at least 80 times
(models of 2 layers, adapters from weak to so strong that rounding alone moves a logit by 4e-4)."""

KL_TOLERANCE = 1e-3
"""Largest mean divergence of a result rounded to 16 bits, nats."""

PART_ENTRIES = 2_000_000
"""Entries of a weight that are moved at once."""

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
    """The distance of two models' logits over every position of every probe."""

    max_abs_logit: float
    """Largest absolute difference of a logit."""

    mean_kl: float
    """Mean Kullback-Leibler divergence of the next-token distributions, nats: KL(tuned || merged)."""

    same_top_token: float
    """Fraction of positions where both give the highest probability to the same token."""


def probe_prompts(tokenizer: PreTrainedTokenizerFast, rows: int, trained_ids: Sequence[int] = ()) -> list[list[int]]:
    """Return the token ids to compare on: a few texts, tokens spread over the embedding, and trained tokens.

    rows: rows of the embedding. trained_ids: tokens whose rows were trained; the first 96 are used.
    """
    texts = [tokenizer(text, add_special_tokens=True)["input_ids"][:PROBE_TOKENS] for text in PROBES]
    count = PROBE_TOKENS // 2
    spread = [round(index * (rows - 1) / (count - 1)) for index in range(count)]
    starts = range(0, min(len(trained_ids), 2 * PROBE_TOKENS), PROBE_TOKENS)
    trained = [list(trained_ids)[start : start + PROBE_TOKENS] for start in starts]
    return [prompt for prompt in (*texts, spread, *trained) if prompt]


def logits_of(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits of each prompt alone, float32 [T, V]: logits_t = head(hidden(ids_0..t)), without a cache.

    Of a model that gives scores those of the last token, [1, L]; a single score s as [s, 0], the logits of winning
    against a score of 0.
    """
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits.float() for prompt in prompts]
    if found and found[0].dim() == 2:
        return [functional.pad(scores, (0, 1)) if scores.shape[1] == 1 else scores for scores in found]
    return [logits[0] for logits in found]


def float32_noise(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], logits: Sequence[Tensor]
) -> float:
    """Return how far the logits of a model move when each of its weights moves to a neighbouring float32.

    Up or down by chance, the same in every call: max |logits(w + ulp) - logits(w)|. A written weight is rounded, which
    moves it by half of that at most, and no two orders of the sums agree better (Higham 2002, "Accuracy and Stability
    of Numerical Algorithms", section 3.1). `model` keeps the moved weights.

    logits: of `model` on the prompts, each float32 [T, V].
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in map(torch.atleast_1d, model.parameters()):
            # A part at a time: the embedding of a large model takes gigabytes.
            for part in parameter.split(max(1, PART_ENTRIES * len(parameter) // max(1, parameter.numel()))):
                up = torch.rand(part.shape, generator=generator) < 0.5
                part.copy_(torch.nextafter(part, torch.where(up, math.inf, -math.inf)))
    return compare_logits(logits, logits_of(model, prompts)).max_abs_logit


def compare_logits(tuned: Sequence[Tensor], merged: Sequence[Tensor]) -> Difference:
    """Compare two models' logits, each a list of [T, V]; a value that is not a number counts as infinitely far.

    mean_kl = mean over positions of sum_v p_v (ln p_v - ln q_v), with p of `tuned` and q of `merged`, in float64.

    >>> logits = [torch.tensor([[0.0, 1.0]])]
    >>> compare_logits(logits, [torch.tensor([[0.5, 1.5]])])  # a shift changes every logit and no probability
    Difference(max_abs_logit=0.5, mean_kl=0.0, same_top_token=1.0)
    """
    largest = divergence = agreeing = 0.0
    positions = 0
    for tuned_TV, merged_TV in zip(tuned, merged, strict=True):
        largest = max(largest, _or_inf(float((tuned_TV - merged_TV).abs().max())))
        log_p_TV, log_q_TV = tuned_TV.double().log_softmax(-1), merged_TV.double().log_softmax(-1)
        divergence += _or_inf(float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum()))
        agreeing += int((tuned_TV.argmax(-1) == merged_TV.argmax(-1)).sum())
        positions += len(tuned_TV)
    # Rounding can bring the divergence of equal distributions slightly below 0.
    return Difference(largest, max(divergence, 0.0) / positions, agreeing / positions)


def limit_for(logits: Sequence[Tensor], *, is_float32: bool, noise: float = 0.0) -> str:
    """Return the allowed difference from a model with these logits [T, V] as `measure <= limit`.

    The measure is a field of `Difference`. In float32 limit = max(1e-5 * max(1, largest |logit|), 8 * noise), with the
    noise of `float32_noise`, otherwise 1e-3 nats.

    >>> limit_for([torch.tensor([[0.5, 38.0]])], is_float32=True), limit_for([], is_float32=False)
    ('max_abs_logit <= 0.00038', 'mean_kl <= 0.001')
    """
    if not is_float32:
        return f"mean_kl <= {KL_TOLERANCE:g}"
    scale = max(1.0, *(float(logits_TV.abs().max()) for logits_TV in logits))
    return f"max_abs_logit <= {max(FP32_TOLERANCE * scale, NOISE_FACTOR * noise):.3g}"


def refuse_if_different(difference: Difference, limit: str, *, problem: str, where: str, fix: str) -> None:
    """Raise CheckpointError, beginning with `problem`, for a difference above `limit` (see `limit_for`)."""
    measure, _, largest = limit.partition(" <= ")
    value = getattr(difference, measure)
    if not value <= float(largest):  # so written, a NaN is refused too
        raise CheckpointError(
            f"{problem}: {measure} is {value:.3g}, and {largest} is allowed; nothing was written", where=where, fix=fix
        )


def reloaded_logits(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits [T, V] of a written model, reloaded with plain transformers in float32.

    Raises CheckpointError for a missing or unexpected weight.
    """
    labels = labels_of(read_json_file(folder / "config.json"))
    from_pretrained: Callable[..., Any] = auto_class(labels).from_pretrained
    with quiet_libraries():
        model, info = from_pretrained(
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
