"""The chat templates of a tokenizer: which one a row uses, how its turns begin and end, and what was decided."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from llmtune.common.decisions import Decision
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.chat_template import ChatTemplate
from llmtune.data.rendering.encoding import SafeEncoder, Vocabulary
from llmtune.data.rendering.limits import Limits, TemplateRefusal
from llmtune.data.rendering.messages import render_with_arguments, traced_fields
from llmtune.data.rendering.provenance import DATA, runs_of, with_origin
from llmtune.data.rendering.rendering import Rendering
from llmtune.data.rendering.spans import TurnShape, find_span, learn_turn_shape
from llmtune.errors import DataError, TokenizerError

__all__ = ["PLAIN_TEMPLATE", "TemplateSet"]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template for tokenizers that have none: one line a message, answers closed by the end token.

It needs no new token.
"""

_EXAMPLE_TOOL: Mapping[str, object] = {
    "type": "function",
    "function": {"name": "Kupuka", "description": "Sidaru", "parameters": {"type": "object", "properties": {}}},
}
"""A tool to learn the turns of templates with; its words occur in no template."""

_NO_ARGUMENTS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of templates that no argument can set."""

Tools = Sequence[Mapping[str, object]]


class TemplateSet:
    """The chat templates of a tokenizer: `default` and, for rows with tools, `tool_use` if there is one.

    `chat_template` replaces the tokenizer's own, `template_args` are further arguments of every template. Raises
    `TokenizerError` for templates that cannot be used at all.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: SafeEncoder,
        *,
        chat_template: str | None,
        template_args: Mapping[str, object],
        now: datetime,
        limits: Limits,
    ) -> None:
        self._arguments = template_args
        self._encoder = encoder
        self._eos_id = vocabulary.eos_id
        self._now = now
        self._is_given = chat_template is not None or bool(vocabulary.chat_template)
        self.sources = _template_sources(chat_template if chat_template is not None else vocabulary.chat_template)
        """Text of each template by its name."""
        variables = {key: value for key, value in vocabulary.special_tokens.items() if isinstance(value, str)}
        self._templates = {
            name: ChatTemplate(source, variables=variables, now=now, limits=limits)
            for name, source in self.sources.items()
        }

    @property
    def uses_the_date(self) -> bool:
        """Whether any template writes the date."""
        return any(template.uses_the_date for template in self._templates.values())

    def _name_for(self, tools: Tools | None) -> str:
        return "tool_use" if tools and "tool_use" in self._templates else "default"

    # --- conversations

    def render(self, conversation: Conversation) -> Rendering:
        """Render and encode a conversation.

        Raises `DataError` when the template refuses it, `TokenizerError` when the template goes over a limit.
        """
        tools = list(conversation.tools) or None
        template = self._templates[self._name_for(tools)]
        arguments = {**self._arguments, **conversation.template_args}

        def render_traced(fields: Sequence[Mapping[str, object]]) -> str:
            # Arguments come from the row as well: their text must not become a control token.
            messages = [traced_fields(message, index) for index, message in enumerate(fields)]
            traced_tools, traced_arguments = with_origin(tools, DATA), _traced(arguments)
            return template.render(messages, traced_tools, traced_arguments, add_generation_prompt=False)

        try:
            fields, text = render_with_arguments(conversation.messages, render_traced)
            plain, prefixes = template.render_with_prefixes(fields, tools, arguments)
        except TemplateRefusal as refusal:
            raise _refused(refusal, conversation.source) from refusal
        # Prefixes are of plain strings; a template that can tell traced strings from them would spoil the mask.
        if plain != str.__str__(text):
            raise TokenizerError(
                "the chat template renders this conversation in two ways",
                where=conversation.source,
                fix="set `model.chat_template` to a template that depends on its messages only",
            )
        runs = runs_of(text)
        roles = tuple(message.role for message in conversation.messages)
        return Rendering(
            plain,
            runs,
            self._encoder.encode(plain, runs),
            roles,
            lambda count, generate: template.render(fields[:count], tools, arguments, add_generation_prompt=generate),
            prefixes,
            lambda count: render_traced(fields[:count]),
            lambda: template.render([*fields, _QUESTION], tools, arguments, add_generation_prompt=False),
        )

    def prompt_ids(self, messages: Sequence[Message], tools: Tools, template_args: Mapping[str, object]) -> list[int]:
        """The ids of messages and the generation prompt; `template_args` are above the template's own arguments.

        Raises `DataError` when the template refuses the messages.
        """
        arguments = {**self._arguments, **template_args}
        shape = self.shape("prompt", tools)
        template = self._templates[self._name_for(tools)]
        traced_tools = with_origin(list(tools), DATA) or None

        def render(fields: Sequence[Mapping[str, object]]) -> str:
            traced = [traced_fields(message, index) for index, message in enumerate(fields)]
            return template.render(traced, traced_tools, _traced(arguments), add_generation_prompt=True)

        try:
            _, text = render_with_arguments(messages, render)
        except TemplateRefusal as refusal:
            raise _refused(refusal, "prompt") from refusal
        # Where the template has no generation prompt, the words with which its answers begin stand for it.
        text = text + shape.header
        return self._encoder.encode(text, runs_of(text)).ids

    def unread(self, arguments: Iterable[str], tools: Tools | None = None) -> Iterator[str]:
        """Say of each of the arguments that the template for rows with these tools does not read, what it reads."""
        read = self._templates[self._name_for(tools)].variables_read - _NO_ARGUMENTS
        for name in arguments:
            if name not in read:
                near = difflib.get_close_matches(name, read, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                yield f"the chat template does not read the argument `{name[:60]}`{hint}"

    # --- the turns of the templates

    @functools.cached_property
    def _shapes(self) -> dict[str, TurnShape | TemplateRefusal]:
        return {
            name: self._learn(template, [_EXAMPLE_TOOL] if name == "tool_use" else None)
            for name, template in self._templates.items()
        }

    def _learn(self, template: ChatTemplate, tools: Tools | None) -> TurnShape | TemplateRefusal:
        return learn_turn_shape(
            lambda messages, generate: template.render(
                messages, tools, self._arguments, add_generation_prompt=generate
            ),
            self._encoder.encode,
        )

    def shape(self, source: str, tools: Tools) -> TurnShape:
        """The turns of the template for rows with these tools; `source` names the row.

        Raises `TokenizerError` where answers could not be ended or the template renders no question and answer.
        """
        if not self._is_given and self._eos_id is None:
            raise TokenizerError(
                "the tokenizer has neither a chat template nor an end token, so answers could not be ended",
                where=source,
                fix="set `model.chat_template`, or use a tokenizer with an eos_token",
            )
        name = self._name_for(tools)
        shape = self._shapes[name]
        if isinstance(shape, TemplateRefusal):
            which = " for rows with tools" if name == "tool_use" else ""
            raise TokenizerError(
                f"the chat template{which} cannot render a question and an answer: {shape}",
                where="model.chat_template",
                fix="give a working template with `model.chat_template=FILE`",
            )
        return shape

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: those with which templates close turns, and the tokenizer's end token."""
        # The tokenizer's end token too, though the template may close turns with another: models write both.
        ids: set[int] = set() if self._eos_id is None else {self._eos_id}
        for shape in self._shapes.values():
            if not isinstance(shape, TemplateRefusal):
                ids |= shape.end_ids
        return tuple(sorted(ids | self._tool_call_end_ids()))

    def _tool_call_end_ids(self) -> set[int]:
        """Ids of the tokens that end an answer which calls a tool: some templates have another token for them."""
        shape = self._shapes[self._name_for([_EXAMPLE_TOOL])]
        if isinstance(shape, TemplateRefusal):
            return set()
        function = {"name": "Kupuka", "arguments": {"Lomina": "Tarevo"}}
        call = {"type": "function", "id": "call00001", "function": function}
        messages = (Message("user", "Sidaru"), Message("assistant", "", extra={"tool_calls": [call]}))
        try:
            rendering = self.render(Conversation("tool call", messages, tools=(_EXAMPLE_TOOL,)))
        except (DataError, TokenizerError):
            return set()
        span = find_span(rendering, 1, shape)
        # Only where the template writes the call at all.
        if span.problem is not None or not span.ended or "Tarevo" not in rendering.text[span.start : span.stop]:
            return set()
        return {control.token_id for control in rendering.encoded.controls if control.stop == span.stop}

    # --- decisions

    @functools.cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """The choices about the template that the config did not make, each with its reason."""
        choices = [Decision("model.chat_template", choice, reason) for choice, reason in self._choices()]
        unread = [Decision("data.template_args", "not used", line) for line in self.unread(self._arguments)]
        return (*choices, *unread)

    def _choices(self) -> Iterator[tuple[str, str]]:
        if not self._is_given:
            reason = "this tokenizer has no chat template; the form needs no new tokens"
            yield "User: ... / Assistant: ...", reason
        if self.uses_the_date:
            yield (
                f"date fixed at {self._now:%Y-%m-%d}",
                "the template writes the date, and a run must not change overnight",
            )
        shape = self._shapes["default"]
        if isinstance(shape, TemplateRefusal):
            return
        if shape.header:
            yield f"prompts end with {shape.header!r}", "the template knows no generation prompt"
        if not shape.end_ids:
            reason = "the template closes answers with no control token; the model will not learn to stop"
            yield "no end-of-turn token", reason


def _traced(arguments: Mapping[str, object]) -> dict[str, object]:
    """Arguments with the origin of their texts: data, of which nothing may become a control token."""
    return {name: with_origin(value, DATA) for name, value in arguments.items()}


def _template_sources(templates: str | dict[str, str] | list[dict[str, str]] | None) -> dict[str, str]:
    if not templates:
        return {"default": PLAIN_TEMPLATE}
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, (list, tuple)):
        templates = {entry["name"]: entry["template"] for entry in templates}
    if "default" not in templates:
        names = ", ".join(sorted(templates))
        raise TokenizerError(
            f"the tokenizer has several chat templates ({names}) and none is called `default`",
            where="model.chat_template",
            fix="name the file of the one to use with `model.chat_template=FILE`",
        )
    return {name: source for name, source in templates.items() if name in ("default", "tool_use")}


_QUESTION = {"role": "user", "content": "Kupuka"}  # a word that no template contains


def _refused(refusal: TemplateRefusal, source: str) -> DataError | TokenizerError:
    if refusal.is_limit:
        return TokenizerError(str(refusal), where=source, fix="give another template with `model.chat_template=FILE`")
    return DataError(
        f"the chat template refuses this conversation: {refusal}",
        where=source,
        fix="change the row to what the template takes, or set `model.chat_template`",
    )
