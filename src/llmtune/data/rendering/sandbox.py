"""The jinja2 environment of chat templates: a sandbox with limits, in which texts keep the origin of every character.

A chat template is a program that came with a model. It runs in jinja2's immutable sandbox with exactly the globals and
filters that transformers gives it and, which the sandbox alone does not do, within a time limit, a size limit and a
limit on absurd numbers. Every loop turn and call counts against a budget, so the limits hold in any thread and process,
without signals.
"""

from __future__ import annotations

import functools
import json
import threading
import types
from collections.abc import Callable, Iterable, Sequence, Sized
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
from jinja2.compiler import CodeGenerator, Frame

from llmtune.data.rendering.incremental import IncrementalTemplate, find_incremental
from llmtune.data.rendering.limits import Budget, LimitedLoop, MessageLoop, SizedLoop, TemplateRefusal
from llmtune.data.rendering.provenance import (
    PRECISE_METHODS,
    TEMPLATE,
    Traced,
    call_with_origins,
    concat,
    contains_traced,
    label_as_content,
)

__all__ = ["SandboxEnvironment"]

LARGEST_NUMBER = 1_000_000
"""Largest integer a template may give to a function or filter, or multiply a text by."""

UNCHECKED_CHARACTERS = 65_536
"""Sums of texts up to this length are not checked one by one: they are counted as output."""

PRECISE_FILTERS = frozenset(
    {"attr", "capitalize", "d", "default", "first", "join", "last", "list", "lower", "replace", "trim", "upper"}
)
"""Filters whose results have the right origins; all others are called by `call_with_origins`."""


class _TracingCode(CodeGenerator):
    """Compiles output and `~` so that origins survive, and everything else as jinja2 does."""

    # jinja2's own code calls str() and "".join() there, which return plain strings.

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:  # noqa: N802 - the name jinja2 looks for
        """Write the code of `a ~ b`."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("environment.as_text(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def _output_child_pre(self, *_: object) -> None:
        self.write("environment.as_text(")

    def _output_child_post(self, *_: object) -> None:
        self.write(")")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` blocks of newer templates: rendered and otherwise ignored, because masks do not need them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it this way

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        """Parse the block into a call that returns its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body)
        block.set_lineno(line)
        return block

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class SandboxEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, with origins and a budget."""

    code_generator_class = _TracingCode
    # The operators with which a short template makes a huge text, or a huge number.
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: datetime, constants: Iterable[str]) -> None:
        # The settings and extensions of transformers: others would give other tokens.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        # A budget for each thread: renderings at the same time do not count for each other.
        self._local = threading.local()
        self._constants = frozenset({*constants, "strftime_now"})
        self.incremental: IncrementalTemplate | None = None
        """The message loop of the template that was compiled last, if it renders message by message."""
        # Templates call filters without `call`, so each has its own check.
        self.filters = {name: self._guarded_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._guarded_filter("tojson", _tojson)
        self.filters["join"] = self._guarded_filter("join", self._join_filter)
        self.filters["replace"] = self._guarded_filter("replace", self._replace_filter)
        self.globals["raise_exception"] = _raise_exception
        # The clock of the run and not of the machine: the same row makes the same tokens tomorrow.
        self.globals["strftime_now"] = now.strftime
        self.globals["dict"] = _DictMaker()
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # random text: two renderings of a conversation would differ

    @property
    def budget(self) -> Budget:
        """The budget of the rendering in this thread."""
        return cast("Budget", self._local.budget)

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._local.budget = budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse a template and wrap what each of its loops runs over: `for x in limited_loop(items)`."""
        tree = super()._parse(source, name, filename)
        self.incremental = find_incremental(tree, self._constants)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            line = loop.iter.lineno
            is_message_loop = self.incremental is not None and loop is self.incremental.loop
            wrap = jinja2.nodes.EnvironmentAttribute("message_loop" if is_message_loop else "limited_loop", lineno=line)
            loop.iter = jinja2.nodes.Call(wrap, [loop.iter], [], None, None, lineno=line)
        # The nodes that were added know no environment, and the compiler asks for it.
        tree.set_environment(self)
        return tree

    def limited_loop(self, items: object) -> object:
        """Wrap the items of a loop so that its turns count."""
        self.budget.count_turn()
        # jinja2 decides what a loop over nothing does: an error or no turn.
        if isinstance(items, jinja2.Undefined) or items is None:
            return items
        # Some templates read `loop.length`, for which jinja2 needs a length.
        if isinstance(items, Sized):
            return SizedLoop(cast("Sequence[object]", items), self.budget)
        return LimitedLoop(cast("Iterable[object]", items), self.budget)

    def message_loop(self, items: object) -> object:
        """Wrap the messages in the loop of an incremental template."""
        return MessageLoop(items, self.budget) if isinstance(items, list) else self.limited_loop(items)

    def join_output(self, pieces: Iterable[str]) -> str:
        """Join the output of the template, keeping origins, within the size limit.

        The length is counted as pieces come, because a `MessageLoop` records it between them.
        """
        parts: list[str] = []
        budget = self.budget
        for piece in pieces:
            budget.written += len(piece)
            budget.check_size(budget.written)
            parts.append(piece)
        return concat(parts)

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]  # jinja2 has an attribute of this name
        """Join the output of a block or macro, or the parts of `~`, keeping origins, within the size limit."""
        parts: list[str] = []
        budget = self.budget
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > budget.characters:  # saves a call for each of many small pieces
                budget.check_size(size)
            parts.append(piece)
        return concat(parts)

    def as_text(self, value: object) -> str:
        """Turn an output value into text as jinja2 does; a printed list or mapping of the row is content."""
        if isinstance(value, str):
            return value
        # A printed list or mapping: no character of it can be told apart, so all of it counts as content of the row.
        text = str(value)
        return label_as_content(text, value) if contains_traced(value) else text

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> object:
        """Run `+ * ** %` within the limits and with origins."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            if len(left) + len(right) > UNCHECKED_CHARACTERS:
                self.budget.check_size(len(left) + len(right))  # before the sum is made
            return left + right
        # 2 ** 10 ** 9 would take hours inside one operation, where no budget is asked.
        if operator in ("*", "**"):
            self._check_numbers((left, right))
        if operator == "*" and any(isinstance(side, (str, list, tuple)) for side in (left, right)):
            # Checked beforehand: the product itself could exhaust the memory.
            self.budget.check_size(max(len(left), 1) * right if isinstance(right, int) else max(len(right), 1) * left)
        if operator == "%" and isinstance(left, str):
            # `%` fills in widths that the template names; the sandbox of jinja2 checks only the attributes.
            _check_widths(left)
            return call_with_origins(_format_percent, (left, right), {})
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (str, list, tuple)):
            self.budget.check_size(len(result))
        return result

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """Sandbox `str.format` as jinja2 does, and keep the origins of the values that are filled in."""
        plain = super().wrap_str_format(value)
        if plain is None:
            return None
        # jinja2 hands over the bound method, and the text it is bound to is the format.
        form = cast("str", cast("types.MethodType", value).__self__)

        def formatted(*args: object, **kwargs: object) -> str:
            _check_widths(form)
            # A format that is itself content: everything made from it is content.
            if isinstance(form, Traced):
                return label_as_content(str.__str__(plain(*args, **kwargs)), (form, args, kwargs))
            return call_with_origins(plain, args, kwargs)

        return formatted

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> object:
        """Call a function of the template: counted, with sane numbers, and with origins kept by methods of texts."""
        self.budget.count_turn()
        self._check_numbers(args)
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        # Only methods of texts make texts of other texts; jinja2's own checks are enough for the rest.
        if not isinstance(owner, str) or not isinstance(function, (types.BuiltinMethodType, types.MethodType)):
            return super().call(context, function, *args, **kwargs)
        if not isinstance(owner, Traced) and name in PRECISE_METHODS and contains_traced((args, kwargs)):
            # A text of the template takes in content, as in ", ".join(contents).
            function = getattr(Traced(owner, [(len(owner), TEMPLATE)]), name)
        # A small text replaced many times, or joined many times, grows beyond any input: measured before it is made.
        if name == "replace" and len(args) > 1:
            self._check_replacement(owner, *args[:2])
        if name == "join" and args:
            args = (list(args[0]),)  # an iterator could be measured only once
            self.budget.check_size(sum(len(item) + len(owner) for item in args[0] if isinstance(item, str)))
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            self.budget.check_size(len(result))
            # Such a method (center, zfill, ...) loses track of single characters, so its result is content as a whole.
            if name not in PRECISE_METHODS and contains_traced((owner, args, kwargs)):
                return label_as_content(str.__str__(result), (owner, args, kwargs))
        return result

    def _guarded_filter(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def guarded(*args: object, **kwargs: object) -> object:
            self.budget.count_turn()
            self._check_numbers((*args, *kwargs.values()))
            if name not in PRECISE_FILTERS and contains_traced((args, kwargs)):
                result = call_with_origins(function, args, kwargs)
            else:
                result = function(*args, **kwargs)
            if isinstance(result, str):
                self.budget.check_size(len(result))
            return result

        return guarded

    def _join_filter(self, value: Iterable[object], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        # str.join of a plain text would return a plain text and lose the origins of the items.
        glue = d if isinstance(d, Traced) else Traced(d, ((len(d), TEMPLATE),))
        return glue.join([self.as_text(item) for item in value])

    def _replace_filter(self, text: object, old: str, new: str, count: int | None = None) -> str:
        text, old, new = self.as_text(text), self.as_text(old), self.as_text(new)
        self._check_replacement(text, old, new)
        source = text if isinstance(text, Traced) else Traced(text, ((len(text), TEMPLATE),))
        return source.replace(old, new, -1 if count is None else count)

    def _check_replacement(self, text: str, old: object, new: object) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.budget.check_size(len(text) + text.count(old) * len(new))

    def _check_numbers(self, values: Iterable[object]) -> None:
        """Raise TemplateRefusal for a huge integer: padding to it or a power of it takes time and memory at once."""
        for value in values:
            # Exactly `int`: a bool counts nothing, and floats neither pad nor repeat.
            if type(value) is int and abs(value) > LARGEST_NUMBER:
                raise TemplateRefusal(f"the chat template asks for {value:,} of something", is_limit=True)


class _DictMaker:
    """`dict(...)` for templates, without access to the class itself (as in transformers)."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[object, object]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[object, object]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` for templates, refusing underscore names (as in transformers)."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without a name for self: `namespace(self=1)` is valid
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_private(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store the private name {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(str(message))


def _format_percent(form: str, values: object) -> str:
    return form % (tuple(values) if isinstance(values, tuple) else values)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of transformers; jinja2's own escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_widths(form: str) -> None:
    """Raise TemplateRefusal for a format like `%9999999d`: the sandbox lets it fill the memory with spaces."""
    digits = 0
    for character in form:
        digits = digits + 1 if character.isdigit() else 0
        if digits > 6:
            raise TemplateRefusal("the chat template asks for a field of more than a million characters", is_limit=True)
