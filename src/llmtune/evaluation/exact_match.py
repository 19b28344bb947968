"""How many held-out answers the model gives exactly: prompt and reference are read from the held-out examples
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llmtune.data.example import Example, ExampleSet
from llmtune.evaluation.generate import continue_ids

__all__ = ["ExactCount", "count_exact_answers", "split_at_answer"]


class ExactCount(NamedTuple):
    """`exact` of `answers` references were given character by character."""

    exact: int
    answers: int


def split_at_answer(example: Example) -> tuple[list[int], list[int]] | None:
    """Return (prompt, reference): what stands before the last run of trained tokens, and that run itself.

    None where either is empty.

    >>> from llmtune.data.example import Example
    >>> split_at_answer(Example("a:1", np.array([5, 6, 7, 8], np.int32), np.array([0, 0, 1, 1], np.float32)))
    ([5, 6], [7, 8])
    """
    trained = np.flatnonzero(example.weights > 0)
    if not len(trained):
        return None
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
    end = int(trained[-1]) + 1
    return (example.input_ids[:start].tolist(), example.input_ids[start:end].tolist()) if start > 0 else None


def count_exact_answers(
    model: Any,
    tokenizer: Any,
    examples: ExampleSet,
    *,
    stop_token_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int = 20,
) -> ExactCount:
    """Answer every held-out prompt greedily and count the answers whose text equals the reference's.

    Stop tokens are no part of either.

    `max_new_tokens` is raised to the longest reference, so that no right answer is cut short. Weights and random state
    stay as they were (N12).
    """
    pairs = [pair for index in range(len(examples)) if (pair := split_at_answer(examples[index])) is not None]
    if not pairs:
        return ExactCount(0, 0)
    longest = max(len(reference) for _, reference in pairs)
    answers = continue_ids(
        model,
        [prompt for prompt, _ in pairs],
        stop_token_ids=stop_token_ids,
        pad_id=pad_id,
        max_new_tokens=max(max_new_tokens, longest),
        batch_size=batch_size,
    )
    stops = set(stop_token_ids)

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode([one for one in ids if one not in stops], skip_special_tokens=False))

    exact = sum(text(answer) == text(reference) for answer, (_, reference) in zip(answers, pairs, strict=True))
    return ExactCount(exact, len(pairs))
