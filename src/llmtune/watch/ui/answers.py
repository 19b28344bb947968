"""Chat with a finished run beside its base: its model is loaded at the first question; one answer at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.example import Message
from llmtune.errors import ModelError, UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmtune.evaluation.inference_model import InferenceModel

__all__ = ["SIDES", "Chat"]

SIDES = ("base", "tuned")
MOST_NEW_TOKENS = 256
MOST_MESSAGES = 100


class Chat:
    """Answers of a run and of its base; the model of the last run asked stays loaded."""

    def __init__(self, *, offline: bool, no_cuda: bool) -> None:
        self._offline, self._no_cuda = offline, no_cuda
        self._lock = threading.Lock()
        self._loaded: tuple[Path, InferenceModel] | None = None

    def answer(self, folder: Path, conversations: Mapping[str, object]) -> dict[str, str]:
        """The next answer of each side to its own conversation: `[{"role": ..., "content": ...}, ...]`.

        Raises UsageError for a conversation of another shape; ModelError, AdapterError or TokenizerError for a model
        that cannot be loaded.
        """
        given = {side: _messages(conversations.get(side)) for side in SIDES}
        # A second question waits: two models at work need not fit into memory.
        with self._lock:
            loaded = self._model(folder)
            tuned = self._one(loaded, loaded.model, given["tuned"])
            try:
                with loaded.as_before_tuning() as base:
                    return {"base": self._one(loaded, base, given["base"]), "tuned": tuned}
            except ModelError as error:  # trained from scratch: the tuned side is worth its answer all the same
                return {"base": f"({error.problems[0].problem})", "tuned": tuned}

    def _model(self, folder: Path) -> InferenceModel:
        if self._loaded is None or self._loaded[0] != folder:
            from llmtune.evaluation.inference_model import load_inference_model

            self._loaded = None  # the one before makes room first
            model = load_inference_model(str(folder), offline=self._offline, no_cuda=self._no_cuda)
            self._loaded = (folder, model)
        return self._loaded[1]

    def _one(self, loaded: InferenceModel, model: PreTrainedModel | PeftModel, messages: list[dict[str, str]]) -> str:
        from llmtune.evaluation.generate import TextPrompt, generate

        prompt: Any = [Message(message["role"], message["content"]) for message in messages]
        if loaded.answers_text:
            prompt = TextPrompt(messages[-1]["content"])
        (answer,) = generate(model, loaded.tokenizer, loaded.renderer, [prompt], max_new_tokens=MOST_NEW_TOKENS)
        return answer.text


def _messages(value: object) -> list[dict[str, str]]:
    def is_message(item: object) -> bool:
        return (
            isinstance(item, dict)
            and item.get("role") in ("system", "user", "assistant")
            and isinstance(item.get("content"), str)
        )

    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES or not all(map(is_message, value)):
        raise UsageError(
            "a conversation is a list of messages with `role` and `content`", "the chat", "reload the page"
        )
    return value
