"""Count the held-out answers that the model gives exactly; prompts and references come from the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmtune.data.example import Example, ExampleSet
from llmtune.evaluation.generate import continue_ids

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["ExactCount", "count_exact_answers", "split_at_answer"]


class ExactCount(NamedTuple):
    """The number of answers that equal their reference character by character, of all answers."""

    exact: int
    answers: int


def split_at_answer(example: Example) -> tuple[list[int], list[int]] | None:
    """Return (prompt, reference): the ids before the last run of trained tokens, and that run itself.

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
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: ExampleSet,
    *,
    stop_token_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int = 20,
) -> ExactCount:
    """Answer every held-out prompt greedily and count the answers whose text equals the reference.

    stop_token_ids: end an answer, and are left out of the comparison. max_new_tokens: raised to the longest reference,
    so that no right answer is cut short. Weights and random state stay as they were (N12).

    Raises DataError for a prompt that fills the model's context.
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
        return str(tokenizer.decode([token for token in ids if token not in stops], skip_special_tokens=False))

    exact = sum(text(answer) == text(reference) for answer, (_, reference) in zip(answers, pairs, strict=True))
    return ExactCount(exact, len(pairs))
