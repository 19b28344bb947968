"""A conversation -> token ids and weights: the heart of the data rooms (promises Q5 and Q6).

The chat template is rendered once with text that knows its origin (`traced`, `sandbox`), encoded so that content stays
content (`encoding`), and the trained part of each message is found from the template itself (`spans`). The ids are
those of `tokenizer.apply_chat_template`.

Shapes: T tokens of one example; `weights[i]` is the weight of *predicting* `input_ids[i]`, so `weights[0]` is always 0.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from llmtune.common.decisions import Decision
from llmtune.config.schema import TrainOn
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.encoding import SafeEncoder
from llmtune.data.rendering.messages import SELECTIONS, message_fields, traced_fields
from llmtune.data.rendering.plain_text import TextRows
from llmtune.data.rendering.provenance import DATA, Traced, runs_of, trace
from llmtune.data.rendering.row_warnings import RowWarning, lost_content, text_notes
from llmtune.data.rendering.sandbox import ChatTemplate, Limits, TemplateRefusal
from llmtune.data.rendering.spans import Rendering, Span, TurnShape, find_span, learn_turn_shape
from llmtune.data.rendering.vocabulary import Vocabulary
from llmtune.errors import DataError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_NOW", "PLAIN_TEMPLATE", "Rendered", "Renderer", "RowWarning", "message_fields"]

RENDER_VERSION = 1
"""Raised whenever rendering or masking changes what it makes of the same row: cached tokens of an older version are
then not used.
"""

DEFAULT_NOW = datetime(2025, 1, 1, 12, 0, 0)
"""The day templates see that write the date: fixed, so that the same command makes the same tokens tomorrow."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token if message['role'] == 'assistant' }}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template for tokenizers that have none: one line a message, answers closed by the end token.

It needs no new token.
"""

EXAMPLE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": "Kupuka", "description": "Sidaru", "parameters": {"type": "object", "properties": {}}},
}
"""A tool that templates are tried with."""


class Rendered(NamedTuple):
    """A row as the model sees it: T ids, T weights, and what there is to say about it."""

    input_ids: list[int]
    weights: list[float]
    warnings: tuple[RowWarning, ...] = ()


class Renderer:
    """Turns conversations and text rows into ids and weights, always the same way.

    Picklable, and free of state that a row could change.

    `train_on` names the rule of the mask. `chat_template` replaces the tokenizer's own. `now` is the date that
    templates see. `parse_control_tokens` lets content match control tokens, as the libraries do.

    Raises `TokenizerError` for a tokenizer or template that cannot be used at all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Vocabulary,
        *,
        train_on: TrainOn = "all_assistant_messages",
        parse_control_tokens: bool = False,
        chat_template: str | None = None,
        now: datetime = DEFAULT_NOW,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        if train_on not in get_args(TrainOn):
            raise ValueError(f"unknown mask rule {train_on!r}")
        self._arguments: dict[str, Any] = {
            "train_on": train_on,
            "parse_control_tokens": parse_control_tokens,
            "chat_template": chat_template,
            "now": now,
            "limits": limits,
        }
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary.of(tokenizer)
        self.train_on: TrainOn = train_on
        self._now = now
        self._encoder = SafeEncoder(vocabulary, parse_control_tokens=parse_control_tokens)
        self._sources = _template_sources(vocabulary, chat_template)
        variables = {key: str(value) for key, value in vocabulary.special_tokens.items() if isinstance(value, str)}
        self._templates = {
            name: ChatTemplate(source, variables=variables, now=now, limits=limits)
            for name, source in self._sources.items()
        }
        self._has_own_template = chat_template is not None or bool(vocabulary.chat_template)
        self._eos_id: int | None = vocabulary.eos_id
        self._texts = TextRows(vocabulary, self._encoder, train_on)
        self._tails: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Renderer, **self._arguments), (self.vocabulary,)

    def render(self, conversation: Conversation) -> Rendered:
        """Render one row.

        Raises `DataError` when the row cannot be rendered (the template refuses it, a weight is no weight),
        `TokenizerError` when the template cannot render at all. A row without a single trained token is returned and
        noted, not raised.
        """
        if not math.isfinite(conversation.loss_weight) or conversation.loss_weight < 0:
            raise DataError(
                f"the weight {conversation.loss_weight} is not a weight", where=conversation.source, fix="use 0 or more"
            )
        if conversation.text is not None:
            ids, weights, notes = self._texts.text_row(conversation.text)
        elif conversation.prompt_is_text:
            ids, weights, notes = self._texts.completion_row(conversation)
        else:
            ids, weights, notes = self._chat_row(conversation)
        if weights:
            weights[0] = 0.0
        if not any(weights):
            notes.append(RowWarning("no-trained-token", f"`data.train_on: {self.train_on}` trains nothing in this row"))
        if conversation.loss_weight != 1:
            weights = [weight * conversation.loss_weight for weight in weights]
        return Rendered(ids, weights, tuple(notes))

    # ---- conversations ----

    def _chat_row(self, conversation: Conversation) -> tuple[list[int], list[float], list[RowWarning]]:
        if not conversation.messages:
            raise DataError("the conversation has no messages", where=conversation.source, fix="remove the row")
        shape = self._shape_or_raise(conversation.source, conversation.tools)
        whole = self._rendering(conversation)
        ids = whole.encoded.ids
        notes = text_notes(whole.encoded, self._eos_id, self.vocabulary.bos_id)
        weights = [1.0 if self.train_on == "all_tokens" else 0.0] * len(ids)
        for index, weight in self._message_weights(conversation, notes):
            span = find_span(whole, index, shape)
            name = f"message {index + 1} ({conversation.messages[index].role})"
            if span.problem is not None:
                if weight or self.train_on == "all_tokens":
                    notes.append(RowWarning("unstable", f"{name} is not trained: {span.problem}"))
                continue
            if weight and not span.ended:
                notes.append(
                    RowWarning(
                        "no-end-of-turn",
                        f"{name} has no end-of-turn token: a model trained on it does not learn to stop",
                    )
                )
            low, high = self._token_range(whole, span, notes, name, is_answer=whole.roles[index] == "assistant")
            weights[low:high] = [weight] * (high - low)
        notes.extend(lost_content(conversation, whole))
        return ids, weights, notes

    def _rendering(self, conversation: Conversation) -> Rendering:
        fields = [message_fields(message) for message in conversation.messages]
        tools = list(conversation.tools) or None
        template = self._template_for(tools)
        traced_messages = [traced_fields(message, index) for index, message in enumerate(fields)]

        def render(count: int, add_generation_prompt: bool) -> str:
            return template.render(fields[:count], tools, add_generation_prompt=add_generation_prompt)

        try:
            text = template.render(traced_messages, trace(tools, DATA), add_generation_prompt=False)
            plain, beginnings = template.render_walked(fields, tools)
        except TemplateRefusal as refusal:
            raise _refused(refusal, conversation.source) from refusal
        if plain != str.__str__(text):
            raise TokenizerError(
                "the chat template renders this conversation in two ways",
                where=conversation.source,
                fix="set `model.chat_template` to a template that depends on its messages only",
            )
        runs = runs_of(text)
        roles = tuple(message.role for message in conversation.messages)
        return Rendering(plain, runs, self._encoder.encode(plain, runs), roles, render, beginnings)

    def _message_weights(self, conversation: Conversation, notes: list[RowWarning]) -> list[tuple[int, float]]:
        """Return (message, weight) for every message whose tokens the mask rule speaks about."""
        messages = conversation.messages
        for index, message in enumerate(messages):
            if message.weight is not None and not (math.isfinite(message.weight) and message.weight >= 0):
                raise DataError(
                    f"messages[{index}].weight: {message.weight} is not a weight",
                    where=conversation.source,
                    fix="use 0 or more",
                )
        if self.train_on == "customized":
            return [(index, message.weight) for index, message in enumerate(messages) if message.weight]
        if any(message.weight not in (None, 0, 1) for message in messages):
            notes.append(
                RowWarning("weight-ignored", "weights other than 0 count only under `data.train_on: customized`")
            )
        if self.train_on == "all_tokens":
            return [(index, 0.0) for index, message in enumerate(messages) if message.weight == 0]
        chosen = SELECTIONS[self.train_on](messages)
        return [(index, 1.0) for index in chosen if messages[index].weight != 0]

    def _token_range(
        self, whole: Rendering, span: Span, notes: list[RowWarning], name: str, *, is_answer: bool
    ) -> tuple[int, int]:
        """Return the tokens [low, high) of a span.

        A token that also holds part of a header is trained only if it says something of the answer.
        """
        encoded = whole.encoded
        low = bisect.bisect_left(encoded.starts, span.start)
        high = bisect.bisect_left(encoded.starts, span.stop)
        shared = (
            low > 0 and encoded.stops[low - 1] > span.start and encoded.ids[low - 1] not in self._encoder.control_tokens
        )
        if shared and whole.text[span.start : encoded.stops[low - 1]].strip():
            low -= 1
        if is_answer and (shared or not self._prompt_is_prefix(whole, span.start, low)):
            notes.append(
                RowWarning(
                    "joined-token",
                    f"{name} begins inside a token that its prompt shares: the prompt's own last token differs from training",
                )
            )
        return low, max(low, high)

    def _prompt_is_prefix(self, whole: Rendering, start: int, low: int) -> bool:
        """Tell whether the ids of the prompt alone, text [0, start), are the first `low` ids of the whole."""
        encoded = whole.encoded
        before = bisect.bisect_right(encoded.controls, start, key=lambda one: one.stop) - 1
        first = encoded.controls[before].place if before >= 0 else 0
        tail_start = encoded.controls[before].start if before >= 0 else 0
        tail = whole.text[tail_start:start]
        expected = self._tails.get(tail)
        if expected is None:
            expected = self._encoder.encode(tail, runs_of(Traced(whole.text, whole.runs)[tail_start:start])).ids
            if len(tail) < 80 and len(self._tails) < 1000:
                self._tails[tail] = expected
        return encoded.ids[first:low] == expected

    # ---- prompts ----

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids a model is asked with: `messages` rendered with the generation prompt, content as safe as in
        training.

        Raises `DataError` when the template refuses the messages.
        """
        shape = self._shape_or_raise("prompt", tools)
        traced = [traced_fields(message_fields(message), index) for index, message in enumerate(messages)]
        try:
            text = self._template_for(tools).render(
                traced, trace(list(tools), DATA) or None, add_generation_prompt=True
            )
        except TemplateRefusal as refusal:
            raise _refused(refusal, "prompt") from refusal
        text = text + shape.header
        return self._encoder.encode(text, runs_of(text)).ids

    def text_prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a text to be continued, begun as text rows are."""
        return self._texts.prompt_ids(text)

    # ---- what is known of the template ----

    def _template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        return self._templates[self._name_for(tools)]

    def _name_for(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return "tool_use" if tools and "tool_use" in self._templates else "default"

    @functools.cached_property
    def _shapes(self) -> dict[str, TurnShape | TemplateRefusal]:
        """The turns of each template; that for rows with tools is asked with one."""
        return {
            name: self._learn(template, [EXAMPLE_TOOL] if name == "tool_use" else None)
            for name, template in self._templates.items()
        }

    def _learn(self, template: ChatTemplate, tools: Sequence[Mapping[str, Any]] | None) -> TurnShape | TemplateRefusal:
        return learn_turn_shape(
            lambda messages, generate: template.render(messages, tools, add_generation_prompt=generate),
            self._encoder.encode,
        )

    def _shape_or_raise(self, source: str, tools: Sequence[Mapping[str, Any]]) -> TurnShape:
        if not self._has_own_template and self._eos_id is None:
            raise TokenizerError(
                "the tokenizer has neither a chat template nor an end token, so answers could not be ended",
                where=source,
                fix="set `model.chat_template`, or use a tokenizer with an eos_token",
            )
        shape = self._shapes[self._name_for(tools)]
        if isinstance(shape, TemplateRefusal):
            which = " for rows with tools" if self._name_for(tools) == "tool_use" else ""
            raise TokenizerError(
                f"the chat template{which} cannot render a question and an answer: {shape}",
                where="model.chat_template",
                fix="give a working template with `model.chat_template=FILE`",
            )
        return shape

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: those the template closes turns with, and the tokenizer's end token.

        `generation_config` must list them all, so that a tuned model stops by itself.
        """
        found: set[int] = set() if self._eos_id is None else {self._eos_id}
        for shape in self._shapes.values():
            if not isinstance(shape, TemplateRefusal):
                found |= shape.end_ids
        return tuple(sorted(found | self._tool_call_end_ids()))

    def _tool_call_end_ids(self) -> set[int]:
        """Ids of the tokens that end an answer which calls a tool, where the template writes such calls and ends them
        in their own way.
        """
        shape = self._shapes[self._name_for([EXAMPLE_TOOL])]
        call = {
            "type": "function",
            "id": "call00001",
            "function": {"name": "Kupuka", "arguments": {"Lomina": "Tarevo"}},
        }
        talk = (Message("user", "Sidaru"), Message("assistant", "", extra={"tool_calls": [call]}))
        if isinstance(shape, TemplateRefusal):
            return set()
        try:
            whole = self._rendering(Conversation("tool call", talk, tools=(EXAMPLE_TOOL,)))
        except (DataError, TokenizerError):
            return set()
        span = find_span(whole, 1, shape)
        if span.problem is not None or not span.ended or "Tarevo" not in whole.text[span.start : span.stop]:
            return set()
        return {one.token_id for one in whole.encoded.controls if one.stop == span.stop}

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over all that decides what a row becomes.

        Tokenizer, templates, rule, version of this code, and the date where a template writes it.
        """
        parts = {
            "version": RENDER_VERSION,
            "tokenizer": hashlib.sha256(self._encoder.definition.encode()).hexdigest(),
            "special_tokens": {key: str(value) for key, value in self.vocabulary.special_tokens.items()},
            "templates": self._sources,
            "train_on": self.train_on,
            "parse_control_tokens": self._arguments["parse_control_tokens"],
            "now": self._now.isoformat()
            if any(template.uses_the_date for template in self._templates.values())
            else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """What was chosen about the template without being asked, each with its reason."""
        made = []
        if not self._has_own_template:
            made.append(
                Decision(
                    "model.chat_template",
                    "User: ... / Assistant: ...",
                    "this tokenizer has no chat template; the form needs no new tokens",
                )
            )
        if any(template.uses_the_date for template in self._templates.values()):
            made.append(
                Decision(
                    "model.chat_template",
                    f"date fixed at {self._now:%Y-%m-%d}",
                    "the template writes the date, and a run must not change overnight",
                )
            )
        shape = self._shapes["default"]
        if not isinstance(shape, TemplateRefusal):
            if shape.header:
                made.append(
                    Decision(
                        "model.chat_template",
                        f"prompts end with {shape.header!r}",
                        "the template knows no generation prompt",
                    )
                )
            if not shape.end_ids:
                made.append(
                    Decision(
                        "model.chat_template",
                        "no end-of-turn token",
                        "the template closes answers with no control token; the model will not learn to stop",
                    )
                )
        return tuple(made)


def _template_sources(vocabulary: Vocabulary, chat_template: str | None) -> dict[str, str]:
    found: Any = chat_template if chat_template is not None else vocabulary.chat_template
    if not found:
        return {"default": PLAIN_TEMPLATE}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, (list, tuple)):
        found = {entry["name"]: entry["template"] for entry in found}
    if "default" not in found:
        raise TokenizerError(
            f"the tokenizer has several chat templates ({', '.join(sorted(found))}) and none is called `default`",
            where="model.chat_template",
            fix="name the file of the one to use with `model.chat_template=FILE`",
        )
    return {name: source for name, source in found.items() if name in ("default", "tool_use")}


def _refused(refusal: TemplateRefusal, source: str) -> DataError | TokenizerError:
    if refusal.is_limit:
        return TokenizerError(str(refusal), where=source, fix="give another template with `model.chat_template=FILE`")
    return DataError(
        f"the chat template refuses this conversation: {refusal}",
        where=source,
        fix="change the row to what the template takes, or set `model.chat_template`",
    )
