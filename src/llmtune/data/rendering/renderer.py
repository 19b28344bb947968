"""Turn a conversation into token ids and weights, the heart of `data/` (promises Q5 and Q6).

The chat template is rendered once with strings that carry their origin (`provenance`, `sandbox`), encoded so that
content stays content (`encoding`), and the trained part of each message is found from the template itself (`spans`).
The ids are those of `tokenizer.apply_chat_template`.

Shapes: T tokens of one example; `weights[i]` is the weight of *predicting* `input_ids[i]`, so `weights[0]` is always 0.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple, get_args

from llmtune.common.decisions import Decision
from llmtune.config.schema import DataConfig, TrainOn
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.encoding import SafeEncoder, Vocabulary
from llmtune.data.rendering.limits import DEFAULT_LIMITS, Limits
from llmtune.data.rendering.messages import SELECTIONS, by_turn, message_fields, with_system
from llmtune.data.rendering.plain_text import TextRows
from llmtune.data.rendering.provenance import Traced, runs_of
from llmtune.data.rendering.rendering import Rendering
from llmtune.data.rendering.row_warnings import RowWarning, lost_content, text_warnings
from llmtune.data.rendering.spans import Span, find_span
from llmtune.data.rendering.template_set import TemplateSet
from llmtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_NOW", "Rendered", "Renderer", "RowWarning", "message_fields"]

RENDER_VERSION = 3
"""Version of rendering and masking; raise it when the same row becomes other tokens.

Cached tokens of another version are not used.
"""

DEFAULT_NOW = datetime(2025, 1, 1, 12, 0, 0)
"""The date for templates that write it: fixed, so that the same command makes the same tokens tomorrow."""

_CACHED_CHARACTERS = 80
_CACHED_TEXTS = 1000


class Rendered(NamedTuple):
    """The ids and weights [T] of a row, and warnings about it."""

    input_ids: list[int]
    weights: list[float]
    warnings: tuple[RowWarning, ...] = ()
    answers: int = 0
    """Messages of the assistant."""
    trained_answers: int = 0
    """Of these, the ones with a trained token."""


class Renderer:
    """Turns conversations and text rows into ids and weights; picklable, and free of state that a row could change.

    `train_on` is the mask rule. `chat_template` replaces the tokenizer's own. `now` is the date for templates.
    `parse_control_tokens` lets content match control tokens, as the libraries do. `system` is the system prompt of
    conversations without one, `template_args` are further arguments of the chat template, below those of a row. With
    `one_example_per_turn` each turn of the assistant is an example, in which it is the last one.

    Raises `TokenizerError` for a tokenizer or template that cannot be used at all, `ValueError` for an unknown rule.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Vocabulary,
        *,
        train_on: TrainOn = "all_assistant_messages",
        parse_control_tokens: bool = False,
        chat_template: str | None = None,
        system: str | None = None,
        template_args: Mapping[str, object] | None = None,
        one_example_per_turn: bool = False,
        now: datetime = DEFAULT_NOW,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if train_on not in get_args(TrainOn):
            raise ValueError(f"unknown mask rule {train_on!r}")
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary.of(tokenizer)
        self.train_on: TrainOn = train_on
        self._system = system
        self._template_args = dict(template_args or {})
        self._one_example_per_turn = one_example_per_turn
        self._now = now
        self._parse_control_tokens = parse_control_tokens
        self._encoder = SafeEncoder(vocabulary, parse_control_tokens=parse_control_tokens)
        self._templates = TemplateSet(
            vocabulary,
            self._encoder,
            chat_template=chat_template,
            template_args=self._template_args,
            now=now,
            limits=limits,
        )
        self._encoded_ends: dict[str, list[int]] = {}
        self._by_rule: dict[TrainOn, Renderer] = {}
        # A renderer is sent to other processes as its arguments: compiled templates cannot be pickled.
        self._make: Callable[[Vocabulary], Renderer] = functools.partial(
            Renderer,
            train_on=train_on,
            parse_control_tokens=parse_control_tokens,
            chat_template=chat_template,
            system=system,
            template_args=template_args,
            one_example_per_turn=one_example_per_turn,
            now=now,
            limits=limits,
        )

    @classmethod
    def of_config(cls, tokenizer: PreTrainedTokenizerBase | Vocabulary, data: DataConfig) -> Renderer:
        """The renderer that a config asks for, in training and in every use of what was trained."""
        return cls(
            tokenizer,
            train_on=data.train_on,
            parse_control_tokens=data.parse_control_tokens,
            system=data.system,
            template_args=data.template_args,
            one_example_per_turn=data.one_example_per_turn,
        )

    def __reduce__(self) -> tuple[Callable[[Vocabulary], Renderer], tuple[Vocabulary]]:
        return self._make, (self.vocabulary,)

    def with_rule(self, train_on: TrainOn) -> Renderer:
        """The same renderer with another mask rule; templates, encoder and what they have kept are shared."""
        if train_on == self.train_on:
            return self
        if train_on not in self._by_rule:
            # A shallow copy shares the compiled templates and the caches.
            other = copy.copy(self)
            other.train_on = train_on
            self._by_rule[train_on] = other
        return self._by_rule[train_on]

    @property
    def _texts(self) -> TextRows:
        return TextRows(self.vocabulary, self._encoder, self.train_on)

    def render_examples(self, conversation: Conversation) -> list[Rendered]:
        """Render the examples of one row: one, or with `one_example_per_turn` one for each turn of the assistant.

        Raises `DataError` for a row that cannot be rendered.
        """
        if not self._one_example_per_turn or conversation.prompt_is_text or not conversation.messages:
            return [self.render(conversation)]
        rest = self.train_on in ("all_messages", "all_user_and_system_messages", "customized")
        turns = by_turn(conversation.messages, with_rest=rest)
        return [
            self.render(dataclasses.replace(conversation, messages=messages), first_new=first)
            for first, messages in turns
        ]

    def render(self, conversation: Conversation, *, first_new: int = 0) -> Rendered:
        """Render one row as one example; warnings are about its messages from `first_new` on.

        Raises `DataError` when the row cannot be rendered (the template refuses it, a weight is no weight),
        `TokenizerError` when the template cannot render at all. A row without a trained token is returned with a
        warning.
        """
        if not math.isfinite(conversation.loss_weight) or conversation.loss_weight < 0:
            problem = f"the weight {conversation.loss_weight} is not a weight"
            raise DataError(problem, where=conversation.source, fix="use 0 or more")
        trained_answers = 0
        is_text = conversation.text is not None or conversation.prompt_is_text
        if conversation.text is not None:
            ids, weights, warnings = self._texts.text_row(conversation.text)
        elif conversation.prompt_is_text:
            ids, weights, warnings = self._texts.completion_row(conversation)
            trained_answers = int(bool(weights) and weights[-1] > 0)
        else:
            ids, weights, warnings, trained_answers = self._chat_row(conversation, first_new)
        if is_text and self._system is not None:
            warnings.append(
                RowWarning("system-unused", "`data.system` is not used: the row is text, not a conversation")
            )
        if weights:
            weights[0] = 0.0  # nothing precedes the first token to predict it from
        if not any(weights):
            text = f"`data.train_on: {self.train_on}` trains nothing in this row"
            warnings.append(RowWarning("no-trained-token", text))
        # Multiplying by 1 would copy the list of nearly every row.
        if conversation.loss_weight != 1:
            weights = [weight * conversation.loss_weight for weight in weights]
        answers = sum(message.role == "assistant" for message in conversation.messages)
        trained_answers = trained_answers if conversation.loss_weight else 0
        return Rendered(ids, weights, tuple(warnings), answers, trained_answers)

    # --- conversations

    def _chat_row(
        self, conversation: Conversation, first_new: int
    ) -> tuple[list[int], list[float], list[RowWarning], int]:
        """Return ids, weights, warnings, and the number of trained answers."""
        messages = tuple(with_system(conversation.messages, self._system))
        first_new += len(messages) - len(conversation.messages)
        conversation = dataclasses.replace(conversation, messages=messages)
        if not conversation.messages:
            raise DataError("the conversation has no messages", where=conversation.source, fix="remove the row")
        shape = self._templates.shape(conversation.source, conversation.tools)
        rendering = self._templates.render(conversation)
        ids = rendering.encoded.ids
        warnings = text_warnings(rendering.encoded, self.vocabulary.eos_id, self.vocabulary.bos_id)
        weights = [1.0 if self.train_on == "all_tokens" else 0.0] * len(ids)
        trained = dict.fromkeys(
            (index for index, role in enumerate(rendering.roles) if role == "assistant"), self.train_on == "all_tokens"
        )
        for index, weight in self._message_weights(conversation, warnings):
            span = find_span(rendering, index, shape)
            name = f"message {index + 1} ({conversation.messages[index].role})"
            if span.problem is not None:
                if weight or self.train_on == "all_tokens":
                    warnings.append(RowWarning("unstable", f"{name} is not trained: {span.problem}"))
                continue
            if weight and not span.ended:
                text = f"{name} has no end-of-turn token: a model trained on it does not learn to stop"
                warnings.append(RowWarning("no-end-of-turn", text))
            low, high, is_joined = self._token_range(rendering, span, is_answer=rendering.roles[index] == "assistant")
            if is_joined:
                problem = "the prompt's own last token differs from training"
                text = f"{name} begins inside a token that its prompt shares: {problem}"
                warnings.append(RowWarning("joined-token", text))
            weights[low:high] = [weight] * (high - low)
            trained[index] = weight > 0 and high > low
        warnings.extend(lost_content(conversation, rendering, first_new))
        unread = self._templates.unread(conversation.template_args, conversation.tools)
        warnings.extend(RowWarning("argument-unread", line) for line in unread)
        return ids, weights, warnings, sum(trained[index] for index in trained if rendering.roles[index] == "assistant")

    def _message_weights(self, conversation: Conversation, warnings: list[RowWarning]) -> list[tuple[int, float]]:
        """Return (message, weight) for every message to whose tokens the mask rule gives a weight."""
        messages = conversation.messages
        for index, message in enumerate(messages):
            if message.weight is not None and not (math.isfinite(message.weight) and message.weight >= 0):
                problem = f"messages[{index}].weight: {message.weight} is not a weight"
                raise DataError(problem, where=conversation.source, fix="use 0 or more")
        if self.train_on == "customized":
            return [(index, message.weight) for index, message in enumerate(messages) if message.weight]
        if any(message.weight not in (None, 0, 1) for message in messages):
            text = "weights other than 0 count only under `data.train_on: customized`"
            warnings.append(RowWarning("weight-ignored", text))
        if self.train_on == "all_tokens":
            return [(index, 0.0) for index, message in enumerate(messages) if message.weight == 0]
        chosen = SELECTIONS[self.train_on](messages)
        asked = [index for index, message in enumerate(messages) if message.weight and index not in chosen]
        if asked:
            name = f"message {asked[0] + 1} ({messages[asked[0]].role})"
            text = f"{name} is marked to be trained, and `data.train_on: {self.train_on}` leaves it out"
            warnings.append(RowWarning("weight-ignored", text))
        return [(index, 1.0) for index in chosen if messages[index].weight != 0]

    def _token_range(self, rendering: Rendering, span: Span, *, is_answer: bool) -> tuple[int, int, bool]:
        """Return the tokens [low, high) of a span, and whether an answer begins inside a token of its prompt.

        A token that also holds part of a header is trained only if it holds visible text of the answer.
        """
        encoded = rendering.encoded
        # Starts never decrease, so the tokens of a span are found by bisection.
        low = bisect.bisect_left(encoded.starts, span.start)
        high = bisect.bisect_left(encoded.starts, span.stop)
        is_shared = (
            low > 0 and encoded.stops[low - 1] > span.start and encoded.ids[low - 1] not in self._encoder.control_tokens
        )
        # White space that a header token takes in is no reason to train the header.
        if is_shared and rendering.text[span.start : encoded.stops[low - 1]].strip():
            low -= 1
        prompt_stop, prompt_low = span.start, low
        if span.prompt_stop is not None:
            prompt_stop, prompt_low = span.prompt_stop, bisect.bisect_left(encoded.starts, span.prompt_stop)
            is_shared = prompt_low > 0 and encoded.stops[prompt_low - 1] > prompt_stop
        is_joined = is_answer and (is_shared or not self._prompt_is_prefix(rendering, prompt_stop, prompt_low))
        return low, max(low, high), is_joined

    def _prompt_is_prefix(self, rendering: Rendering, start: int, low: int) -> bool:
        """Whether the ids of the prompt by itself, text [0, start), are the first `low` ids of the conversation."""
        # Tokens do not cross control tokens, so only the text after the last one has to be encoded again.
        encoded = rendering.encoded
        before = bisect.bisect_right(encoded.controls, start, key=lambda control: control.stop) - 1
        first = encoded.controls[before].position if before >= 0 else 0
        end_start = encoded.controls[before].start if before >= 0 else 0
        end = rendering.text[end_start:start]
        expected = self._encoded_ends.get(end)
        if expected is None:
            runs = runs_of(Traced(rendering.text, rendering.runs)[end_start:start])
            expected = self._encoder.encode(end, runs).ids
            # Nearly all answers follow the same few header texts.
            if len(end) < _CACHED_CHARACTERS and len(self._encoded_ends) < _CACHED_TEXTS:
                self._encoded_ends[end] = expected
        return encoded.ids[first:low] == expected

    # --- prompts

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] = (),
        template_args: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Return the ids of a prompt: messages and the generation prompt, content encoded as safely as in training.

        template_args: arguments of the template above those of the renderer. Raises `DataError` when the template
        refuses the messages.
        """
        return self._templates.prompt_ids(with_system(messages, self._system), tools, template_args or {})

    def text_prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a text to be continued, begun as text rows are."""
        return self._texts.prompt_ids(text)

    # --- facts for the run

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: those with which templates close turns, and the tokenizer's end token.

        `generation_config` must list them all, so that a tuned model stops by itself.
        """
        return self._templates.stop_token_ids

    def unread_arguments(self) -> list[str]:
        """A line for each of the template arguments that the chat template does not read."""
        return list(self._templates.unread(self._template_args))

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The choices about the template that the config did not make, each with its reason."""
        return self._templates.decisions

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the tokens of a row.

        Tokenizer, templates, mask rule, version of this code, and the date where a template writes it.
        """
        parts = {
            "version": RENDER_VERSION,
            "tokenizer": hashlib.sha256(self._encoder.definition.encode()).hexdigest(),
            "special_tokens": {key: str(value) for key, value in self.vocabulary.special_tokens.items()},
            "templates": self._templates.sources,
            "train_on": self.train_on,
            "parse_control_tokens": self._parse_control_tokens,
            "now": self._now.isoformat() if self._templates.uses_the_date else None,
        }
        # Without them the digest is that of earlier versions, which rendered the same.
        chosen = {"system": self._system, "template_args": self._template_args, "by_turn": self._one_example_per_turn}
        parts |= {name: value for name, value in chosen.items() if value}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
