"""The text of an answer while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["AnswerStream"]

UNFINISHED = "\ufffd"
"""Stands at the end of a text whose last character still lacks bytes."""


class AnswerStream(BaseStreamer):
    """Hands on the text of one answer piece by piece; the pieces add up to the answer's text.

    Text that may be the beginning of one of `stop_texts` is held back until more is known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop_token_ids: Collection[int],
        stop_texts: Sequence[str],
        show: Callable[[str], None],
    ) -> None:
        self._tokenizer, self._stop_ids, self._stop_texts, self._show = tokenizer, stop_token_ids, stop_texts, show
        self._ids: list[int] = []
        self._shown = ""
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids first, then each new id, shape [1] or [1, T]."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._stop_ids]
        # Decoded from the start each time: a piece alone would lose the space before it, or half a character.
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        self._show_up_to(self._certain(text))

    def end(self) -> None:
        """Called after the last id; `finish` shows what was held back."""

    def finish(self, text: str) -> None:
        """Show what the whole answer has beyond what was shown."""
        self._show_up_to(text)

    def _certain(self, text: str) -> str:
        """The part of `text` that no further token can change, and that no stop text can begin in."""
        text = text.rstrip(UNFINISHED)
        for stop in self._stop_texts:
            text = text.partition(stop)[0]
            held = max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
            text = text[: len(text) - held]
        return text

    def _show_up_to(self, text: str) -> None:
        if text.startswith(self._shown) and len(text) > len(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text
