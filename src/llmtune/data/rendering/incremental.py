"""Find templates that render a conversation message by message, so that one rendering holds those of all its prefixes.

Most chat templates are one loop over the messages, with the opening of the conversation before it and the generation
prompt after it. The rendering of the first k messages is then the text up to where the loop turns to message k, and the
text after the loop. Whether a template is of this kind is decided from its syntax tree, without guessing: any use of
the messages, of the loop, or of `add_generation_prompt` that could depend on later messages makes the answer no. For
other templates every trained answer takes a rendering of its own, quadratic in the length of conversations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jinja2 import nodes

__all__ = ["IncrementalTemplate", "find_incremental"]

_MESSAGES = "messages"
_GENERATE = "add_generation_prompt"
_BACKWARD_ATTRIBUTES = frozenset({"first", "index", "index0", "previtem"})
"""Attributes of `loop` that do not depend on later items; `last`, `length`, `nextitem` and `revindex` do."""
_REFUSED_NODES = (
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
    nodes.Block,
    nodes.Break,
    nodes.ContextReference,
    nodes.DerivedContextReference,
)


class IncrementalTemplate:
    """The loop over the messages (a node of the syntax tree) of a template that renders message by message.

    This holds for conversations of at least `least_messages`, because the template uses that many by their number.
    """

    def __init__(self, loop: nodes.For, least_messages: int) -> None:
        self.loop, self.least_messages = loop, least_messages


def find_incremental(tree: nodes.Template, constants: Iterable[str]) -> IncrementalTemplate | None:
    """The message loop of a template, or None if its output may depend on later messages.

    `constants` are the variables that never change between conversations.
    """
    root = list(_root_nodes(tree))
    names = _names_of_messages(tree)
    loops = [node for node in root if isinstance(node, nodes.For) and _is_messages(node.iter, names)]
    # With two loops the first k messages are two pieces of the text.
    if len(loops) != 1:
        return None
    (loop,) = loops
    position = root.index(loop)
    checker = _Checker(names)
    is_incremental = (
        next(tree.find_all(_REFUSED_NODES), None) is None
        and not any(node.name == "random" for node in tree.find_all(nodes.Filter))
        and loop.test is None
        and not loop.else_
        and not loop.recursive
        and isinstance(loop.target, nodes.Name)
        and loop.target.name not in names
        and all(checker.is_incremental(node) for node in root[:position])
        and all(checker.is_incremental(node, in_loop=True) for node in loop.body)
        and all(_is_constant(node, {*constants, _GENERATE}) for node in root[position + 1 :])
        and all(checker.is_alias(node) for node in tree.find_all(nodes.Assign))
    )
    # Messages left out by slices count too: a shorter conversation would leave out other ones.
    left_out = sum(_whole_number(node.start) or 0 for node in tree.find_all(nodes.Slice) if node.start is not None)
    return IncrementalTemplate(loop, checker.highest_index + left_out + 1) if is_incremental else None


def _names_of_messages(tree: nodes.Template) -> set[str]:
    """`messages`, and every name that is set to it or to a slice of it from a fixed message on."""
    names: set[str] = set()
    candidates = {_MESSAGES}
    while candidates - names:  # an alias may be set from another alias
        names |= candidates
        for node in tree.find_all(nodes.Assign):
            if isinstance(node.target, nodes.Name) and _is_messages(node.node, names):
                candidates.add(node.target.name)
    return names


def _root_nodes(tree: nodes.Template) -> Iterator[nodes.Node]:
    """The nodes at the top of a template, except the default for `add_generation_prompt`, which is always given."""
    for node in tree.body:
        if isinstance(node, nodes.If) and _tests_if_undefined(node.test) and not node.elif_ and not node.else_:
            continue
        yield node


def _tests_if_undefined(test: nodes.Node) -> bool:
    defined = test.node if isinstance(test, nodes.Not) else None
    return isinstance(defined, nodes.Test) and defined.name == "defined" and _is_name(defined.node, _GENERATE)


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _is_messages(node: nodes.Node, names: set[str]) -> bool:
    """Whether this is the list of messages, or all of them from a fixed one on."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start, rest = node.arg.start, (node.arg.stop, node.arg.step)
        return (
            _is_messages(node.node, names)
            and rest == (None, None)
            and (start is None or _whole_number(start) is not None)
        )
    return isinstance(node, nodes.Name) and node.name in names


def _whole_number(node: nodes.Node) -> int | None:
    return node.value if isinstance(node, nodes.Const) and type(node.value) is int and node.value >= 0 else None


def _is_constant(node: nodes.Node, names: set[str]) -> bool:
    """Whether the output of a node depends on `names` alone."""
    used = [*([node] if isinstance(node, nodes.Name) else []), *node.find_all(nodes.Name)]
    return all(name.name in names and name.ctx == "load" for name in used)


class _Checker:
    """Looks for nodes whose value could depend on later messages.

    `highest_index` is the highest message used by its number, from 0.
    """

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self.highest_index = 0

    def is_alias(self, node: nodes.Assign) -> bool:
        """Whether the names of the messages still name all of them, from a fixed one on, after an assignment."""
        targets = [*([node.target] if isinstance(node.target, nodes.Name) else []), *node.target.find_all(nodes.Name)]
        return not {target.name for target in targets} & self._names or (
            isinstance(node.target, nodes.Name) and _is_messages(node.node, self._names)
        )

    def is_incremental(self, node: nodes.Node, *, in_loop: bool = False) -> bool:
        """Whether the value of a node, before or `in_loop` over the messages, depends on earlier messages only."""
        if isinstance(node, nodes.Assign) and _is_messages(node.node, self._names):
            return not in_loop
        if isinstance(node, nodes.Getitem) and _is_messages(node.node, self._names):
            index = _whole_number(node.arg)
            if index is None:
                return False
            self.highest_index = max(self.highest_index, index)
            return True
        # `loop.last` of a shorter conversation is true at another message; `loop.first` is not.
        if in_loop and isinstance(node, nodes.Getattr) and _is_name(node.node, "loop"):
            return node.attr in _BACKWARD_ATTRIBUTES
        if isinstance(node, nodes.Name):
            # Any other use of the list, such as its length, would differ in a shorter conversation.
            return node.name not in {*self._names, _GENERATE} and not (in_loop and node.name == "loop")
        if isinstance(node, nodes.For):  # its body sees a `loop` of its own
            parts = [node.iter, *([node.test] if node.test is not None else []), node.target, *node.else_]
            return all(self.is_incremental(part, in_loop=in_loop) for part in parts) and all(
                self.is_incremental(part) for part in node.body
            )
        return all(self.is_incremental(child, in_loop=in_loop) for child in node.iter_child_nodes())
