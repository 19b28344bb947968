"""Chat templates rendered as transformers renders them, in a sandbox, with limits, and with the origin of every
character.

A chat template is a program that came with a model: it runs in jinja2's immutable sandbox with exactly the globals and
filters that transformers gives it, and, which the sandbox alone does not do, within a time limit, a size limit and a
limit on absurd numbers. Every loop turn and call passes through a budget, so the limits hold in any thread and process,
with no signals.
"""

from __future__ import annotations

import functools
import json
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
from jinja2.compiler import CodeGenerator, Frame

from llmtune.data.rendering.incremental import Walk, find_walk
from llmtune.data.rendering.limits import (
    DEFAULT_LIMITS,
    Budget,
    Limits,
    RenderLimit,
    SizedTicking,
    TemplateRefusal,
    Walking,
)
from llmtune.data.rendering.provenance import PRECISE_METHODS, TEMPLATE, Traced, concat, holds_traced, label, lift
from llmtune.errors import TokenizerError

__all__ = ["Beginning", "ChatTemplate", "Limits", "TemplateRefusal"]

LARGEST_NUMBER = 1_000_000
"""Largest integer a template may hand to a function or filter, or multiply a text with."""

PRECISE_FILTERS = frozenset(
    {"attr", "capitalize", "d", "default", "first", "join", "last", "list", "lower", "replace", "trim", "upper"}
)
"""Filters whose text results carry right origins by themselves; the results of all others are checked by `lift`."""

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


class _TracingCode(CodeGenerator):
    """Compiles output and `~` so that origins survive; everything else as jinja2 does."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:  # noqa: N802 - the name jinja2 looks for
        """Write the code of `a ~ b`: each part as a text that knows its origin."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("environment.as_text(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def _output_child_pre(self, *_: Any) -> None:
        self.write("environment.as_text(")

    def _output_child_post(self, *_: Any) -> None:
        self.write(")")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` blocks of newer templates: rendered, and otherwise ignored; masks do not need them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it this way

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        """Read the block and keep its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body)
        block.set_lineno(line)
        return block

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, with origins and a budget."""

    code_generator_class = _TracingCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: datetime, constants: Iterable[str]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self._local = threading.local()
        self._constants = frozenset({*constants, "strftime_now"})
        self.walk: Walk | None = None
        """The walk of the template compiled last."""
        self.filters = {name: self._guarded_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._guarded_filter("tojson", _tojson)
        self.filters["join"] = self._guarded_filter("join", self._join_filter)
        self.filters["replace"] = self._guarded_filter("replace", self._replace_filter)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = now.strftime
        self.globals["dict"] = _DictMaker()
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    @property
    def budget(self) -> Budget:
        """What is left of the limits for the rendering of this thread."""
        return self._local.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._local.budget = budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        self.walk = find_walk(tree, self._constants)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            line = loop.iter.lineno
            kind = "walking" if self.walk is not None and loop is self.walk.loop else "ticking"
            ticking = jinja2.nodes.EnvironmentAttribute(kind, lineno=line)
            loop.iter = jinja2.nodes.Call(ticking, [loop.iter], [], None, None, lineno=line)
        tree.set_environment(self)
        return tree

    def ticking(self, items: Any) -> Any:
        """Wrap what a loop runs over, so that its turns are counted."""
        self.budget.spend()
        if isinstance(items, jinja2.Undefined) or items is None:
            return items
        return SizedTicking(items, self.budget) if hasattr(items, "__len__") else RenderLimit(items, self.budget)

    def walking(self, items: Any) -> Any:
        """Wrap the loop over the messages of a template that only walks through them."""
        return Walking(items, self.budget) if isinstance(items, list) else self.ticking(items)

    def written(self, pieces: Iterable[str]) -> str:
        """Join what the template itself writes, keeping origins, within the size limit, and count it as it comes."""
        parts: list[str] = []
        budget = self.budget
        for piece in pieces:
            budget.written += len(piece)
            budget.check_size(budget.written)
            parts.append(piece)
        return concat(parts)

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """Join output pieces, keeping origins, within the size limit."""
        parts: list[str] = []
        budget = self.budget
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > budget.characters:
                budget.check_size(size)
            parts.append(piece)
        return concat(parts)

    def as_text(self, value: Any) -> str:
        """Turn an output value into text as jinja2 does; a printed list or mapping of the row is content."""
        if isinstance(value, str):
            return value
        text = str(value)
        return label(text, value) if holds_traced(value) else text

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Run `+ * ** %` within the limits and with origins."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            if len(left) + len(right) > 65536:  # what is smaller is counted when it is put out
                self.budget.check_size(len(left) + len(right))
            return left + right
        if operator in ("*", "**"):
            self._check_numbers((left, right))
        if operator == "*" and any(isinstance(side, (str, list, tuple)) for side in (left, right)):
            self.budget.check_size(max(len(left), 1) * right if isinstance(right, int) else max(len(right), 1) * left)
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            return lift(
                lambda form, given: form % (tuple(given) if isinstance(given, tuple) else given), (left, right), {}
            )
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (str, list, tuple)):
            self.budget.check_size(len(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Sandbox `str.format` as jinja2 does, and keep the origins of what is filled in."""
        plain = super().wrap_str_format(value)
        if plain is None:
            return None
        form = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_widths(form)
            if isinstance(form, Traced):
                return label(str.__str__(plain(*args, **kwargs)), (form, args, kwargs))
            return lift(plain, args, kwargs)

        return formatted

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call from the template: paid for, with sane numbers, and with origins kept by methods of texts."""
        self.budget.spend()
        self._check_numbers(args)
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if not isinstance(owner, str) or not isinstance(function, (types.BuiltinMethodType, types.MethodType)):
            return super().call(context, function, *args, **kwargs)
        if not isinstance(owner, Traced) and name in PRECISE_METHODS and holds_traced((args, kwargs)):
            function = getattr(Traced(owner, [(len(owner), TEMPLATE)]), name)
        if name == "replace" and len(args) > 1:
            self._check_replacement(owner, *args[:2])
        if name == "join" and args:
            args = (list(args[0]),)
            self.budget.check_size(sum(len(item) + len(owner) for item in args[0] if isinstance(item, str)))
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            self.budget.check_size(len(result))
            if name not in PRECISE_METHODS and holds_traced((owner, args, kwargs)):
                return label(str.__str__(result), (owner, args, kwargs))
        return result

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend()
            self._check_numbers((*args, *kwargs.values()))
            if name not in PRECISE_FILTERS and holds_traced((args, kwargs)):
                result = lift(function, args, kwargs)
            else:
                result = function(*args, **kwargs)
            if isinstance(result, str):
                self.budget.check_size(len(result))
            return result

        return guarded

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        glue = d if isinstance(d, Traced) else Traced(d, ((len(d), TEMPLATE),))
        return glue.join([self.as_text(item) for item in value])

    def _replace_filter(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text, old, new = self.as_text(text), self.as_text(old), self.as_text(new)
        self._check_replacement(text, old, new)
        source = text if isinstance(text, Traced) else Traced(text, ((len(text), TEMPLATE),))
        return source.replace(old, new, -1 if count is None else count)

    def _check_replacement(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.budget.check_size(len(text) + text.count(old) * len(new))

    def _check_numbers(self, values: Iterable[Any]) -> None:
        for value in values:
            if type(value) is int and abs(value) > LARGEST_NUMBER:
                raise TemplateRefusal(f"the chat template asks for {value:,} of something", is_limit=True)


class _DictMaker:
    """`dict(...)` for templates, without access to the class itself (as in transformers)."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` for templates, refusing underscore names (as in transformers)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store the private name {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_widths(form: str) -> None:
    digits = 0
    for character in form:
        digits = digits + 1 if character.isdigit() else 0
        if digits > 6:
            raise TemplateRefusal("the chat template asks for a field of more than a million characters", is_limit=True)


class Beginning(NamedTuple):
    """What a template makes of the first messages of a conversation: the whole text up to `length`, and then `tail`."""

    length: int
    tail: str


class ChatTemplate:
    """A compiled chat template.

    Raises `TokenizerError` where the text is not a template at all.
    """

    def __init__(
        self, source: str, *, variables: Mapping[str, str], now: datetime, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.source = source
        self._variables = dict(variables)
        self._limits = limits
        self._prompt_tail: str | None = None
        self._environment = _Environment(now, variables)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template does not compile: {error.message} (line {error.lineno})",
                where="model.chat_template",
                fix="give a working template with `model.chat_template=FILE`",
            ) from error
        except (RecursionError, SyntaxError, MemoryError, OverflowError, ValueError, TypeError) as error:
            raise TokenizerError(
                f"the chat template does not compile: {type(error).__name__}: {error}",
                where="model.chat_template",
                fix="give a working template with `model.chat_template=FILE`",
            ) from error

    @property
    def uses_the_date(self) -> bool:
        """Whether the text rendered depends on the day it is rendered."""
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Render messages; the result is `Traced` where messages or tools hold traced strings.

        Raises `TemplateRefusal` when the template refuses the conversation, fails on it, or goes over a limit.
        """
        return self._render(messages, tools, add_generation_prompt)[0]

    def render_walked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str, dict[tuple[int, bool], Beginning]]:
        """Render messages without the generation prompt, as `render` does, and tell what it has written of each
        beginning of them.

        The second part maps (first messages, `add_generation_prompt`) to what `render` would give for those; it holds
        those that are known without rendering again, and is empty for a template that may look ahead.
        """
        text, budget = self._render(messages, tools, False)
        walk, marks = self._environment.walk, budget.marks
        if walk is None or len(messages) not in marks or len(messages) < walk.needs:
            return text, {}
        end = marks[len(messages)]
        if self._prompt_tail is None:
            prompt, again = self._render(messages, tools, True)
            self._prompt_tail = prompt[again.marks[len(messages)] :]
        tails = {False: text[end:], True: self._prompt_tail}
        counts = [count for count in marks if count >= walk.needs]
        return text, {
            (count, generate): Beginning(marks[count], tail) for count in counts for generate, tail in tails.items()
        }

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> tuple[str, Budget]:
        size = sum(len(str(message.get("content", ""))) for message in messages)
        budget = self._environment.budget = Budget(self._limits, size)
        budget.messages = given = list(messages)
        context = self._template.new_context(
            {
                "messages": given,
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._variables,
            }
        )
        try:
            return self._environment.written(self._template.root_render_func(context)), budget
        except RecursionError as error:
            raise TemplateRefusal("the chat template calls itself without end", is_limit=True) from error
        except RENDER_ERRORS as error:
            raise TemplateRefusal(f"the chat template fails: {type(error).__name__}: {error}") from error
