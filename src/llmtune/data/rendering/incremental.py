"""Templates that only walk through their messages: what they have written before a message does not depend on what
follows.

Most chat templates are one loop over the messages, with what opens the conversation before it and the generation prompt
after it. For such a template one rendering of the whole conversation holds the rendering of every beginning of it: the
text up to where the loop turns to the next message, and what the template writes after the loop. Whether a template is
one is read off its syntax tree, with no guess: any use of the messages, of the loop, or of `add_generation_prompt` that
could look ahead makes the answer no.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jinja2 import nodes

__all__ = ["Walk", "find_walk"]

_MESSAGES = "messages"
_GENERATE = "add_generation_prompt"
_LOOKING_BACK = frozenset({"first", "index", "index0", "previtem"})
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


class Walk:
    """The loop of a template over its messages: `loop` is its node, and `needs` messages from the beginning are looked
    at by number.

    What holds of the beginnings of a conversation holds of those with at least `needs` messages.
    """

    def __init__(self, loop: nodes.For, needs: int) -> None:
        self.loop, self.needs = loop, needs


def find_walk(tree: nodes.Template, variables: Iterable[str]) -> Walk | None:
    """The walk of a template, or None where it may look ahead.

    `variables` are the names that never change between conversations.
    """
    root = list(_root_nodes(tree))
    names = _names_of_messages(tree)
    loops = [node for node in root if isinstance(node, nodes.For) and _beginning_kept(node.iter, names)]
    if len(loops) != 1:
        return None
    (loop,) = loops
    place = root.index(loop)
    checker = _Checker(names, loop)
    sound = (
        next(tree.find_all(_REFUSED_NODES), None) is None
        and not any(one.name == "random" for one in tree.find_all(nodes.Filter))
        and loop.test is None
        and not loop.else_
        and not loop.recursive
        and isinstance(loop.target, nodes.Name)
        and loop.target.name not in names
        and all(checker.looks_back(node) for node in root[:place])
        and all(checker.looks_back(node, inside=True) for node in loop.body)
        and all(_is_constant(node, {*variables, _GENERATE}) for node in root[place + 1 :])
        and all(checker.is_alias(node) for node in tree.find_all(nodes.Assign))
    )
    # Messages left out by slices count too: a shorter conversation would leave out other ones.
    left_out = sum(_counted(node.start) or 0 for node in tree.find_all(nodes.Slice) if node.start is not None)
    return Walk(loop, checker.highest + left_out + 1) if sound else None


def _names_of_messages(tree: nodes.Template) -> set[str]:
    """`messages`, and every name that is set to them, or to all of them from a fixed one on."""
    names: set[str] = set()
    found = {_MESSAGES}
    while found - names:
        names |= found
        for node in tree.find_all(nodes.Assign):
            if isinstance(node.target, nodes.Name) and _beginning_kept(node.node, names):
                found.add(node.target.name)
    return names


def _root_nodes(tree: nodes.Template) -> Iterator[nodes.Node]:
    """What stands at the top of a template, without the setting of a default for `add_generation_prompt`, which is
    always given.
    """
    for node in tree.body:
        if isinstance(node, nodes.If) and _asks_whether_given(node.test) and not node.elif_ and not node.else_:
            continue
        yield node


def _asks_whether_given(test: nodes.Node) -> bool:
    given = test.node if isinstance(test, nodes.Not) else None
    return (
        isinstance(given, nodes.Test)
        and given.name == "defined"
        and isinstance(given.node, nodes.Name)
        and given.node.name == _GENERATE
    )


def _beginning_kept(node: nodes.Node, names: set[str]) -> bool:
    """Whether this is the messages, or all of them from a fixed one on."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start, rest = node.arg.start, (node.arg.stop, node.arg.step)
        return (
            _beginning_kept(node.node, names)
            and rest == (None, None)
            and (start is None or _counted(start) is not None)
        )
    return isinstance(node, nodes.Name) and node.name in names


def _counted(node: nodes.Node) -> int | None:
    return node.value if isinstance(node, nodes.Const) and type(node.value) is int and node.value >= 0 else None


def _is_constant(node: nodes.Node, names: set[str]) -> bool:
    """Whether what a node writes depends on `names` alone."""
    found = [node] if isinstance(node, nodes.Name) else []
    return all(one.name in names and one.ctx == "load" for one in (*found, *node.find_all(nodes.Name)))


class _Checker:
    """Looks for anything that could depend on messages to come.

    `highest` is the last message looked at by its number, from 0.
    """

    def __init__(self, names: set[str], loop: nodes.For) -> None:
        self._names = names
        self._loop = loop
        self.highest = 0

    def is_alias(self, node: nodes.Assign) -> bool:
        """Whether an assignment leaves the names of the messages what they are: other names for messages from a fixed
        one on.
        """
        targets = {one.name for one in (node.target, *node.target.find_all(nodes.Name)) if isinstance(one, nodes.Name)}
        return not targets & self._names or (
            isinstance(node.target, nodes.Name) and _beginning_kept(node.node, self._names)
        )

    def looks_back(self, node: nodes.Node, *, inside: bool = False) -> bool:
        """Whether a node (in the body of the loop: `inside`) depends only on messages that have been walked through
        already.
        """
        if isinstance(node, nodes.Assign) and _beginning_kept(node.node, self._names):
            return not inside
        if isinstance(node, nodes.Getitem) and _beginning_kept(node.node, self._names):
            number = _counted(node.arg)
            if number is None:
                return False
            self.highest = max(self.highest, number)
            return True
        if (
            inside
            and isinstance(node, nodes.Getattr)
            and isinstance(node.node, nodes.Name)
            and node.node.name == "loop"
        ):
            return node.attr in _LOOKING_BACK
        if isinstance(node, nodes.Name):
            return node.name not in {*self._names, _GENERATE} and not (inside and node.name == "loop")
        if isinstance(node, nodes.For):  # it has a `loop` of its own
            parts = [node.iter, *([node.test] if node.test is not None else []), node.target, *node.else_]
            return all(self.looks_back(one, inside=inside) for one in parts) and all(
                self.looks_back(one) for one in node.body
            )
        return all(self.looks_back(one, inside=inside) for one in node.iter_child_nodes())
