"""The model answers: prompts rendered exactly as in training, batched, stopping at every stop token.

Nothing that training uses is changed by it (promise N12): modes, random states and the model's own generation settings
are what they were.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from llmtune.data.example import Message
from llmtune.errors import DataError
from llmtune.evaluation.eval_mode import base_model_of, eval_mode

__all__ = ["Answer", "Prompt", "PromptRenderer", "TextPrompt", "continue_ids", "generate"]


class TextPrompt(str):
    """A text to be continued as it is, without a chat template: what a model trained on plain text is asked."""

    __slots__ = ()


Prompt = str | TextPrompt | Sequence[Message]
"""A user's message, a text to continue, or a conversation up to where the assistant speaks."""


class PromptRenderer(Protocol):
    """The part of `data.template.Renderer` that answering needs."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids a model sees before it answers: the prefix of what it was trained on."""
        ...

    def text_prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a text to be continued, begun as text rows are."""
        ...


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    prompt: str
    """The last message before the answer."""

    text: str
    """The answer, without control tokens."""

    num_tokens: int
    """Tokens of the answer, the stop token included."""

    stopped_by: Literal["stop_token", "max_new_tokens", "context"]
    """`max_new_tokens` and `context` (the model's longest sequence) mean that the answer was cut off."""

    ids: tuple[int, ...]
    """Tokens of the answer, the stop token included."""


def generate(
    model: Any,
    tokenizer: Any,
    renderer: PromptRenderer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Answer]:
    """Return the model's answers, in the order of `prompts`.

    model: a transformers causal LM, bare or inside peft's wrapper; left as it was. system: a system message put before
    every prompt that is no text to continue. temperature: 0 takes the most likely token; above 0 tokens are drawn with
    `seed`, from the smallest set of tokens that holds `top_p`.

    Raises DataError for a prompt that leaves no room in the model's longest sequence.
    """
    ids = [
        renderer.text_prompt_ids(prompt)
        if isinstance(prompt, TextPrompt)
        else renderer.prompt_ids(_as_messages(prompt, system))
        for prompt in prompts
    ]
    answers = continue_ids(
        model,
        ids,
        stop_token_ids=renderer.stop_token_ids,
        pad_id=_pad_id(tokenizer, renderer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    )
    stops = set(renderer.stop_token_ids)
    return [
        Answer(
            prompt=prompt if isinstance(prompt, str) else prompt[-1].content,
            text=tokenizer.decode([token for token in new if token not in stops], skip_special_tokens=True),
            num_tokens=len(new),
            stopped_by=_why(new, stops, max_new_tokens),
            ids=tuple(new),
        )
        for prompt, new in zip(prompts, answers, strict=True)
    ]


def continue_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> list[list[int]]:
    """Return the ids the model adds to each prompt: up to and with the first stop token, or `max_new_tokens`, or until
    its context is full.

    Prompts are answered in batches of `batch_size`, padded on the left. Raises DataError for a prompt that is empty or
    fills the model's context.
    """
    base = base_model_of(model)
    allowed = [min(max_new_tokens, room) for room in _room(base, prompts)]
    # Only prompts that may go on equally long share a batch, so that a long neighbour never cuts a short one's answer.
    order = sorted(range(len(prompts)), key=lambda index: (allowed[index], -len(prompts[index])))
    answers: list[list[int]] = [[] for _ in prompts]
    with eval_mode(model), _own_settings(base), _contiguous_rows_for_head(base):
        torch.manual_seed(seed)
        for limit, alike in itertools.groupby(order, key=allowed.__getitem__):
            together = list(alike)
            for start in range(0, len(together), batch_size):
                group = together[start : start + batch_size]
                new = _answer_batch(
                    base, [prompts[index] for index in group], stop_token_ids, pad_id, limit, temperature, top_p
                )
                for index, ids in zip(group, new, strict=True):
                    answers[index] = ids
    return answers


def _answer_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    from transformers import GenerationConfig

    longest = max(len(prompt) for prompt in prompts)
    device = model.get_input_embeddings().weight.device
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **drawing,
    )
    out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    stops = set(stop_token_ids)
    return [_until_stop(row, stops) for row in out[:, longest:].tolist()]


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Return ids through the first stop token.

    >>> _until_stop([5, 6, 2, 0, 0], {2})
    [5, 6, 2]
    """
    end = next((position for position, token in enumerate(ids) if token in stops), None)
    return ids if end is None else ids[: end + 1]


def _room(base: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return how many tokens each prompt leaves free in the model's longest sequence, or far too many where the model
    names none.
    """
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError("the prompt is empty", where=f"prompt {number}")
        if len(prompt) >= longest:
            fix = "shorten it, or use a model with a longer context"
            raise DataError(
                f"the prompt has {len(prompt)} tokens and the model sees {longest}", where=f"prompt {number}", fix=fix
            )
    return [longest - len(prompt) for prompt in prompts]


@contextmanager
def _own_settings(base: Any) -> Iterator[None]:
    """Set aside the model's own generation settings: transformers fills whatever we leave open from them (top_k,
    penalties, ...).
    """
    from transformers import GenerationConfig

    theirs = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = theirs


@contextmanager
def _contiguous_rows_for_head(base: Any) -> Iterator[None]:
    """Hand the head the last token of each prompt as rows side by side.

    transformers cuts them out as a view, and torch multiplies a view of several rows by a copy of the weight for each
    row: 1.1 GB and 0.9 s for 20 prompts and a vocabulary of 49,152, where rows side by side take no copy and 4 ms.
    """
    head = base.get_output_embeddings()
    if head is None:  # a model of its own kind: its rows are its own affair
        yield
        return
    hook = head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _as_messages(prompt: Prompt, system: str | None) -> list[Message]:
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    return [Message("system", system), *messages] if system is not None else messages


def _pad_id(tokenizer: Any, renderer: PromptRenderer) -> int:
    """Return any id for masked positions: the tokenizer's own, or a stop token, or 0; it is never seen."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return renderer.stop_token_ids[0] if renderer.stop_token_ids else 0


def _why(
    new: Sequence[int], stops: set[int], max_new_tokens: int
) -> Literal["stop_token", "max_new_tokens", "context"]:
    if new and new[-1] in stops:
        return "stop_token"
    return "max_new_tokens" if len(new) >= max_new_tokens else "context"
