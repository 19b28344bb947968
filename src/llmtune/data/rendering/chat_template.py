"""Chat templates, rendered as transformers renders them, with the origin of every character."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import jinja2
import jinja2.meta

from llmtune.data.rendering.limits import DEFAULT_LIMITS, Budget, Limits, TemplateRefusal
from llmtune.data.rendering.sandbox import SandboxEnvironment
from llmtune.errors import TokenizerError

__all__ = ["ChatTemplate", "RenderedPrefix"]

RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors that a template can cause with the operations it has."""

_PLAIN_TYPES = {
    "Traced": "str",
    "SizedLoop": "list",
    "MessageLoop": "list",
    "LimitedLoop": "iterator",
    "_Namespace": "namespace",
    "_DictMaker": "dict",
}
"""Types that stand in for Python's own -> their names in the words of a template's author."""


class RenderedPrefix(NamedTuple):
    """The rendering of the first messages of a conversation: the complete text up to `length`, and then `tail`."""

    length: int
    tail: str


class ChatTemplate:
    """A compiled chat template.

    `variables` are the special tokens of the tokenizer, `now` is the date for templates that write it. Raises
    `TokenizerError` for a text that does not compile.
    """

    def __init__(
        self, source: str, *, variables: Mapping[str, str], now: datetime, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.source = source
        self._variables = dict(variables)
        self._limits = limits
        self._prompt_tail: str | None = None
        self._environment = SandboxEnvironment(now, variables)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise _does_not_compile(f"{error.message} (line {error.lineno})") from error
        except (RecursionError, SyntaxError, MemoryError, OverflowError, ValueError, TypeError) as error:
            # A template made to break the compiler (nested a thousand deep, say) ends here.
            raise _does_not_compile(f"{type(error).__name__}: {error}") from error

    @functools.cached_property
    def variables_read(self) -> frozenset[str]:
        """Names of the variables that the template reads and does not set itself."""
        return frozenset(jinja2.meta.find_undeclared_variables(self._environment.parse(self.source)))

    @property
    def uses_the_date(self) -> bool:
        """Whether the rendered text depends on the day."""
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        arguments: Mapping[str, object] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Render messages, with further `arguments` of the template.

        The result is `Traced` where messages, tools or arguments hold traced strings. Raises `TemplateRefusal` when the
        template refuses the conversation, fails on it, or goes over a limit.
        """
        return self._render(messages, tools, add_generation_prompt, arguments)[0]

    def render_with_prefixes(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        arguments: Mapping[str, object] | None = None,
    ) -> tuple[str, dict[tuple[int, bool], RenderedPrefix]]:
        """Render messages without the generation prompt, and give the renderings of their first k messages.

        The second part maps (k, `add_generation_prompt`) to what `render` would give for the first k messages. It is
        empty for a template that does not render message by message (see `incremental`). Raises `TemplateRefusal` as
        `render` does.
        """
        text, budget = self._render(messages, tools, False, arguments)
        incremental, starts = self._environment.incremental, budget.message_starts
        if incremental is None or len(messages) not in starts or len(messages) < incremental.least_messages:
            return text, {}
        if self._prompt_tail is None:
            # The text after the loop depends on constants only: one rendering gives it for all conversations.
            prompt, prompt_budget = self._render(messages, tools, True)
            self._prompt_tail = prompt[prompt_budget.message_starts[len(messages)] :]
        tails = {False: text[starts[len(messages)] :], True: self._prompt_tail}
        # A shorter conversation would not have the message that the template takes by its number.
        counts = [count for count in starts if count >= incremental.least_messages]
        return text, {
            (count, generate): RenderedPrefix(starts[count], tail)
            for count in counts
            for generate, tail in tails.items()
        }

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        add_generation_prompt: bool,
        arguments: Mapping[str, object] | None = None,
    ) -> tuple[str, Budget]:
        size = sum(len(str(message.get("content", ""))) for message in messages)
        message_list = list(messages)
        budget = self._environment.budget = Budget(self._limits, size, message_list)
        context = self._template.new_context(
            {
                **(arguments or {}),
                "messages": message_list,
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._variables,
            }
        )
        try:
            # Not `Template.render`: the output has to be counted while it is written.
            return self._environment.join_output(self._template.root_render_func(context)), budget
        except RecursionError as error:
            raise TemplateRefusal("the chat template calls itself without end", is_limit=True) from error
        except RENDER_ERRORS as error:
            raise TemplateRefusal(
                f"the chat template fails: {type(error).__name__}: {_in_plain_types(error)}"
            ) from error


def _in_plain_types(error: BaseException) -> str:
    """The text of an error with the types that its template was written for."""
    text = re.sub(rf"\b({'|'.join(_PLAIN_TYPES)})\b", lambda match: _PLAIN_TYPES[match[1]], str(error))
    # Jinja2 writes the module before types that are not Python's own.
    return re.sub(r"\bllmtune(\.\w+)*\.(?=\w)", "", text)


def _does_not_compile(reason: str) -> TokenizerError:
    return TokenizerError(
        f"the chat template does not compile: {reason}",
        where="model.chat_template",
        fix="give a working template with `model.chat_template=FILE`",
    )
