"""The answers that will be drawn to prompts, as examples of their greatest length, for plans made beforehand.

Shapes: P prompts, G answers to each; answer g of prompt p has number p G + g.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmtune.data.dataset.packing import Indices
from llmtune.data.example import Example, ExampleSet

__all__ = ["PlannedAnswers"]


@dataclass(frozen=True)
class PlannedAnswers:
    """P x G examples: a prompt, and after it as many trained tokens as an answer may have."""

    prompts: ExampleSet
    num_generations: int
    """Answers to each prompt."""
    max_new_tokens: int
    """Tokens of each answer."""

    def __len__(self) -> int:
        return len(self.prompts) * self.num_generations

    def __getitem__(self, index: int) -> Example:
        prompt = self.prompts[index // self.num_generations]
        answer = np.zeros(self.max_new_tokens, dtype=np.int32)
        return Example(
            prompt.source,
            np.concatenate([prompt.input_ids, answer]),
            np.concatenate([np.zeros(len(prompt), np.float32), np.ones(self.max_new_tokens, np.float32)]),
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt with its longest answer, int64 [P G]: length = prompt + max_new_tokens."""
        return np.repeat(np.asarray(self.prompts.lengths, np.int64) + self.max_new_tokens, self.num_generations)

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Trained tokens of each longest answer, float64 [P G]."""
        return np.full(len(self), self.max_new_tokens, dtype=np.float64)

    @property
    def sides(self) -> npt.NDArray[np.int8]:
        """No example has a side: all -1, int8 [P G]."""
        return np.full(len(self), -1, dtype=np.int8)

    @property
    def digest(self) -> str:
        """sha256 of the prompts."""
        return self.prompts.digest

    def packs(self) -> list[Indices]:
        """The answers of each prompt, which one step takes together."""
        numbers = np.arange(len(self), dtype=np.int64).reshape(-1, self.num_generations)
        return list(numbers)
