"""Answer held-out prompts and lay the answers beside their references; both come from the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.example import Example, ExampleSet
from llmtune.evaluation.generate import continue_ids
from llmtune.evaluation.sampling import GREEDY, Sampling, through_stop_text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Prediction", "predict_answers", "split_at_answer"]


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one example, beside the answer in the data."""

    source: str
    """The row, as `file:line`."""

    prompt: str
    """Everything before the answer as the model sees it, control tokens included."""

    reference: str
    answer: str
    """Both without the tokens that end an answer; other control tokens stay."""

    num_tokens: int
    """Tokens of the answer, the stop token included."""

    @property
    def is_exact(self) -> bool:
        """Whether the answer equals its reference character by character."""
        return self.answer == self.reference


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


def predict_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: ExampleSet,
    *,
    stop_token_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    fits_references: bool = True,
    sampling: Sampling = GREEDY,
    batch_size: int = 20,
) -> list[Prediction]:
    """Answer the prompt of every example that has one, in the order of the examples.

    The answer is the last one of an example; those before it stand in the prompt. stop_token_ids: end an answer, and
    are left out of the comparison. max_new_tokens: with `fits_references` raised to the longest reference, so that no
    right answer is cut short. Weights and random state stay as they were (N12).

    Raises DataError for a prompt that fills the model's context.
    """
    pairs = [
        (examples[index].source, *pair)
        for index in range(len(examples))
        if (pair := split_at_answer(examples[index])) is not None
    ]
    if not pairs:
        return []
    longest = max(len(reference) for _, _, reference in pairs)
    answers = continue_ids(
        model,
        [prompt for _, prompt, _ in pairs],
        stop_token_ids=stop_token_ids,
        pad_id=pad_id,
        max_new_tokens=max(max_new_tokens, longest) if fits_references else max_new_tokens,
        sampling=sampling,
        tokenizer=tokenizer,
        batch_size=batch_size,
    )
    stops = set(stop_token_ids)

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode([token for token in ids if token not in stops], skip_special_tokens=False))

    def answer_text(ids: Sequence[int]) -> str:
        _, stop_text = through_stop_text(ids, sampling.stop, tokenizer)
        return text(ids) if stop_text is None else text(ids).partition(stop_text)[0]

    return [
        Prediction(source, str(tokenizer.decode(prompt)), text(reference), answer_text(ids), len(ids))
        for (source, prompt, reference), ids in zip(pairs, answers, strict=True)
    ]
