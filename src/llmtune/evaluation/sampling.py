"""How the next token is chosen, and which text ends an answer: settings, and what transformers is given for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig

from llmtune.errors import Problem, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["GREEDY", "RepetitionPenalty", "Sampling", "StopTexts", "generation_config", "through_stop_text"]


@dataclass(frozen=True)
class Sampling:
    """The choice of each next token, in the order in which the settings act."""

    repetition_penalty: float = 1.0
    """Divides the logits (multiplies those below 0) of every token that stands before, in the prompt too; 1 is none
    (Keskar et al. 2019, arXiv:1909.05858).
    """

    temperature: float = 0.0
    """0 takes the most likely token; above 0 tokens are drawn, and logits are divided by it first."""

    top_k: int = 0
    """Draw from so many most likely tokens (Fan et al. 2018, arXiv:1805.04833); 0 from all."""

    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability (Holtzman et al. 2020, arXiv:1904.09751)."""

    seed: int = 0
    """Seed of drawn tokens."""

    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are no part of it."""

    def __post_init__(self) -> None:
        """Raise UsageError for a value that no answer could be drawn with."""
        problems = [
            Problem(f"`{name}` must be {bounds}, not `{getattr(self, name)}`", "sampling", f"leave out `{name}`")
            for name, bounds, is_right in (
                ("repetition_penalty", "above 0", self.repetition_penalty > 0),
                ("temperature", "0 or more", self.temperature >= 0),
                ("top_k", "0 or more", self.top_k >= 0),
                ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            )
            if not is_right
        ]
        if not all(self.stop):
            fix = "leave it out, or name the text that ends an answer"
            problems.append(Problem("an empty stop text would end every answer before its first word", "--stop", fix))
        if problems:
            raise UsageError.all(problems)


GREEDY = Sampling()


def generation_config(
    sampling: Sampling, *, stop_token_ids: Sequence[int], pad_id: int, max_new_tokens: int
) -> GenerationConfig:
    """Return the settings of transformers' `generate`; the repetition penalty is not among them (see below)."""
    # top_k=0 draws from all tokens that top_p leaves; transformers' own default is 50.
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        do_sample=sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
    )


class RepetitionPenalty:
    """The penalty over the tokens of each row, its padding left out.

    transformers' own also penalizes the padding of a batch, so that a prompt's answer would depend on its neighbours.
    """

    def __init__(self, penalty: float, padding_B: Sequence[int]) -> None:
        """`padding_B`: positions on the left of each row that are padding."""
        self._penalty, self._padding_B = penalty, padding_B

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """Return the logits [B, V] with those of the ids [B, T] before them penalized."""
        penalized_BV = logits_BV.clone()
        for row, padding in enumerate(self._padding_B):
            seen = ids_BT[row, padding:].unique()
            logits = logits_BV[row, seen]
            penalized_BV[row, seen] = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
        return penalized_BV


class StopTexts:
    """Ends each row whose answer holds one of the texts."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, prompt_tokens: int) -> None:
        """`prompt_tokens`: positions before the answers, padding included."""
        self._texts, self._tokenizer, self._prompt_tokens = tuple(texts), tokenizer, prompt_tokens

    def __call__(self, ids_BT: Tensor, _scores: object, **_: object) -> Tensor:
        """Return whether each row is at its end, bool [B]; of the prompt no text counts."""
        answers = self._tokenizer.batch_decode(ids_BT[:, self._prompt_tokens :], skip_special_tokens=False)
        is_ended = [any(text in answer for text in self._texts) for answer in answers]
        return torch.tensor(is_ended, device=ids_BT.device)


def through_stop_text(
    ids: Sequence[int], texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], str | None]:
    """Return the ids up to the first that completes one of the texts, and that text; all of them where none does.

    The text that begins first counts where one token completes several.
    """
    if not texts:
        return list(ids), None
    for end in range(1, len(ids) + 1):
        answer = tokenizer.decode(list(ids[:end]), skip_special_tokens=False)
        found = [(answer.index(text), text) for text in texts if text in answer]
        if found:
            return list(ids[:end]), min(found)[1]
    return list(ids), None
