"""Rows to train on, made of a model's own answers: pairs with the right answer, or answers with a label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.messages import message_fields
from llmtune.evaluation.predictions import Prediction

__all__ = ["judged_rows"]


def judged_rows(
    predictions: Iterable[Prediction], conversations: Mapping[str, Conversation], kind: Literal["pairs", "labels"]
) -> Iterator[dict[str, object] | None]:
    """Yield a row for each prediction, of `pairs` for each wrong one, and None where it cannot be used.

    That is where the answer is empty, or where the right one has tool calls or reasoning beside its text: as a text it
    would be another answer. conversations: the rows that were answered, by their source.
    """
    for prediction in predictions:
        conversation = conversations[prediction.source]
        prompt, right = _split_at_last_answer(conversation)
        is_text = right is not None and right.content.strip() == prediction.reference.strip()
        if right is None or not is_text or not prediction.answer.strip():
            yield None
        elif kind == "labels" or not prediction.is_exact:
            yield _row(conversation, prompt, right, prediction, kind)


def _split_at_last_answer(conversation: Conversation) -> tuple[Sequence[Message], Message | None]:
    messages = conversation.messages
    last = max((place for place, message in enumerate(messages) if message.role == "assistant"), default=None)
    return (messages, None) if last is None else (messages[:last], messages[last])


def _row(
    conversation: Conversation, prompt: Sequence[Message], right: Message, prediction: Prediction, kind: str
) -> dict[str, object]:
    answers = {"completion": prediction.answer}
    if kind == "pairs":
        answers = {"chosen": right.content, "rejected": prediction.answer}
    label = {"label": prediction.is_exact} if kind == "labels" else {}
    if conversation.prompt_is_text:
        return {"prompt": prompt[0].content, **answers, **label}
    sides = {name: [message_fields(Message("assistant", text))] for name, text in answers.items()}
    beside = {"tools": list(conversation.tools)} if conversation.tools else {}
    if conversation.template_args:
        beside["chat_template_kwargs"] = dict(conversation.template_args)  # type: ignore[assignment]
    return {"prompt": [message_fields(message) for message in prompt], **sides, **label, **beside}
