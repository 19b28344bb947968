"""Tokenize rows without a chat template: plain texts, and prompts with their completion as one text."""

from __future__ import annotations

import bisect

from llmtune.config.schema import TrainOn
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.encoding import Encoded, SafeEncoder, Vocabulary
from llmtune.data.rendering.provenance import DATA
from llmtune.data.rendering.row_warnings import RowWarning, text_warnings
from llmtune.errors import DataError

__all__ = ["TextRows"]


class TextRows:
    """Makes ids, weights and warnings of rows without a template.

    All of such a row is content, so none of it can become a control token.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: SafeEncoder, train_on: TrainOn) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._train_on = train_on

    def text_row(self, text: str) -> tuple[list[int], list[float], list[RowWarning]]:
        """Tokenize a text row: all of it and its end token are trained."""
        encoded = self._encode(text)
        before, after = self._vocabulary.before, self._vocabulary.after
        ids = [*before, *encoded.ids, *after]
        return ids, [1.0] * len(ids), text_warnings(encoded, None, self._vocabulary.bos_id)

    def completion_row(self, conversation: Conversation) -> tuple[list[int], list[float], list[RowWarning]]:
        """Tokenize a prompt-completion row; its first ids are exactly those of `prompt_ids` of its prompt.

        Raises DataError unless the conversation has two messages.
        """
        if len(conversation.messages) != 2:
            raise DataError(
                "a prompt-completion row is one prompt and one completion",
                where=conversation.source,
                fix="use `messages` for more",
            )
        prompt, completion = conversation.messages
        head, both = self._encode(prompt.content), self._encode(prompt.content + completion.content)
        warnings = text_warnings(both, None, self._vocabulary.bos_id)
        ids, cut = both.ids, len(head.ids)
        if ids[:cut] != head.ids:
            # The last token of the prompt and the first of the completion would become one. Keep the prompt's tokens as
            # generation will see them, if that is the same text.
            apart = [*head.ids, *self._encode(completion.content).ids]
            if self._vocabulary.decode(apart) == self._vocabulary.decode(ids):
                ids = apart
            else:
                cut = bisect.bisect_left(both.starts, len(prompt.content))
                warnings.append(
                    RowWarning(
                        "joined-token",
                        "prompt and completion share a token: the prompt's own last token differs from training",
                    )
                )
        before, after = self._vocabulary.before, self._vocabulary.after
        weights = [self._weight(prompt)] * (len(before) + cut) + [self._weight(completion)] * (
            len(ids) - cut + len(after)
        )
        return [*before, *ids, *after], weights, warnings

    def prompt_ids(self, text: str) -> list[int]:
        """Tokenize a text to be continued."""
        return [*self._vocabulary.before, *self._encode(text).ids]

    def _weight(self, message: Message) -> float:
        if self._train_on == "customized":
            return message.weight or 0.0
        if message.weight == 0:
            return 0.0
        is_trained = {"all_tokens": True, "all_messages": True, "all_user_and_system_messages": message.role == "user"}
        return float(is_trained.get(self._train_on, message.role == "assistant"))

    def _encode(self, text: str) -> Encoded:
        return self._encoder.encode(text, ((len(text), DATA),) if text else ())
