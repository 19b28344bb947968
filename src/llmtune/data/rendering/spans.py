"""Where each message's trained part begins and ends in a rendered conversation (promise Q5).

An assistant turn is trained from where the generation prompt ends through its end-of-turn token(s). Both ends come from
the template itself:

* The start is the length of the prompt a model would see there: the earlier messages rendered with
  `add_generation_prompt`. It must be, character for character, a prefix of the whole rendering; a turn for which it is
  not is named and not trained.
* The end is found after the last character that belongs to the message (its content, reasoning or tool calls): the
  control tokens that follow. Which control tokens end a turn is learnt once from a small conversation; a next turn's
  header never counts, because it is not there when the turn stands last.

Other messages (for the rules that train them) go from their first character through their own end-of-turn tokens.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmtune.data.rendering.encoding import Control, Encoded
from llmtune.data.rendering.provenance import Run, runs_of, trace
from llmtune.data.rendering.sandbox import Beginning, TemplateRefusal

__all__ = ["Rendering", "Span", "TurnShape", "find_span", "learn_turn_shape"]

Message = Mapping[str, Any]


class TurnShape(NamedTuple):
    """What a template's turns look like, learnt from a small conversation.

    end_ids: ids of the control tokens that end a plain assistant turn. header: what the template writes between the end
    of its generation prompt and an answer, empty for all templates but those that know no `add_generation_prompt`.
    opening: how it begins an assistant turn, as text, for people.
    """

    end_ids: frozenset[int]
    header: str
    opening: str


class Span(NamedTuple):
    """Trained characters [start, stop) of one message, or why there are none (`problem`).

    `ended` tells whether an end-of-turn token closes it.
    """

    start: int
    stop: int
    ended: bool
    problem: str | None = None


@dataclass(frozen=True)
class Rendering:
    """A rendered and encoded conversation: its text, runs, tokens, and its messages as the template sees them."""

    text: str
    runs: tuple[Run, ...]
    encoded: Encoded
    roles: tuple[str, ...]
    render: Callable[[int, bool], str]
    """`render(count, add_generation_prompt)` renders the first `count` messages as plain text."""
    beginnings: Mapping[tuple[int, bool], Beginning] = field(default_factory=dict)
    """What `render` would give, where that is known from the whole."""

    @functools.cached_property
    def extents(self) -> dict[int, tuple[int, int]]:
        """The first and one past the last character of each origin that shows."""
        found: dict[int, tuple[int, int]] = {}
        place = 0
        for length, owner in self.runs:
            found[owner] = (found.get(owner, (place, 0))[0], place + length)
            place += length
        return found

    @functools.cached_property
    def _of_messages(self) -> tuple[list[int], list[int], list[int]]:
        """Starts, stops and messages of the runs that belong to one."""
        stops = list(itertools.accumulate(length for length, _ in self.runs))
        kept = [
            (stop - length, stop, owner) for stop, (length, owner) in zip(stops, self.runs, strict=True) if owner >= 0
        ]
        return [one[0] for one in kept], [one[1] for one in kept], [one[2] for one in kept]

    def next_foreign(self, index: int, start: int) -> int:
        """The first character at or after `start` that belongs to another message, or the end of the text."""
        starts, stops, owners = self._of_messages
        for place in range(bisect.bisect_right(stops, start), len(owners)):
            if owners[place] != index:
                return max(starts[place], start)
        return len(self.text)

    def controls_between(self, start: int, stop: int) -> list[Control]:
        """The control tokens that lie within these characters."""
        controls = self.encoded.controls
        first = bisect.bisect_left(controls, start, key=lambda one: one.start)
        return list(itertools.takewhile(lambda one: one.stop <= stop, controls[first:]))


def find_span(whole: Rendering, index: int, shape: TurnShape) -> Span:
    """Find the trained part of message `index`.

    Never a guess: where the template gives no clear answer, `problem` says why.
    """
    first, last = whole.extents.get(index, (None, 0))
    if whole.roles[index] != "assistant":
        if first is None:
            return Span(0, 0, False, "the template does not render it")
        return _close(whole, index, first, last, shape)
    start = _known_prompt_end(whole, index)
    if start is None:
        try:
            prompt = whole.render(index, True)
        except TemplateRefusal as refusal:
            return Span(0, 0, False, f"the template gives no prompt for it ({refusal})")
        if not whole.text.startswith(prompt):
            return Span(0, 0, False, _divergence(prompt, whole.text))
        start = len(prompt)
    if shape.header:
        if not whole.text.startswith(shape.header, start):
            return Span(0, 0, False, f"the template does not begin it with {shape.header!r}")
        start += len(shape.header)
    if first is not None and first < start:
        return Span(0, 0, False, "the template puts part of it before the place where the model begins to answer")
    return _close(whole, index, start, max(last, start), shape)


def _known_prompt_end(whole: Rendering, index: int) -> int | None:
    """Where the prompt of message `index` ends, if that can be told from the whole, and the prompt is its beginning."""
    known = whole.beginnings.get((index, True))
    return (
        known.length + len(known.tail)
        if known is not None and whole.text.startswith(known.tail, known.length)
        else None
    )


def _close(whole: Rendering, index: int, start: int, content_stop: int, shape: TurnShape) -> Span:
    """Extend a message from its last own character through its end-of-turn tokens."""
    limit = whole.next_foreign(index, content_stop)
    after = whole.controls_between(content_stop, limit)
    intruder = whole.next_foreign(index, start)
    if intruder < content_stop:
        return Span(0, 0, False, "the template puts other text of the row inside it")
    if not after:
        return Span(start, content_stop, False)
    run = _contiguous(after)
    adjacent = whole.text[content_stop : run[0].start].strip() == "" and run[0].token_id in shape.end_ids
    if adjacent and (len(run) == 1 or run[1].token_id not in shape.end_ids):
        return Span(start, run[0].stop, True)  # the common case, clear without another rendering
    bound = _own_bound(whole, index, limit)
    if bound < content_stop:
        bound = limit  # the message reads differently when it stands last, so that rendering says nothing about its end here
    run = [one for place, one in enumerate(run) if one.stop <= bound or (place == 0 and adjacent)]
    if not run:
        return Span(start, content_stop, False)
    ends = [one for one in run if one.token_id in shape.end_ids]
    if ends:
        return Span(start, ends[-1].stop, True)
    if whole.roles[index] != "assistant":
        own = run if whole.text[content_stop : run[0].start].strip() == "" else []
        return Span(start, own[-1].stop if own else content_stop, bool(own))
    later = [one for one in after if one.token_id in shape.end_ids and one.stop <= bound]
    return Span(start, later[0].stop if later else run[-1].stop, True)


def _own_bound(whole: Rendering, index: int, limit: int) -> int:
    """Where the text of message `index` ends at the latest: what its rendering as the last message shares with the
    whole.
    """
    if index == len(whole.roles) - 1:
        return len(whole.text)
    known = whole.beginnings.get((index + 1, False))
    if known is not None:
        return known.length + _shared(known.tail, whole.text[known.length : known.length + len(known.tail)])
    try:
        alone = whole.render(index + 1, False)
    except TemplateRefusal:
        return limit
    return _shared(alone, whole.text)


def _contiguous(controls: Sequence[Control]) -> list[Control]:
    run = [controls[0]]
    for one in controls[1:]:
        if one.start != run[-1].stop:
            break
        run.append(one)
    return run


def _shared(left: str, right: str) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def _divergence(prompt: str, text: str) -> str:
    place = _shared(prompt, text)
    return f"the prompt for it goes on with {prompt[place : place + 40]!r}, the whole conversation with {text[place : place + 40]!r}"


def learn_turn_shape(
    render: Callable[[Sequence[Message], bool], str], encode: Callable[[str, Sequence[Run]], Encoded]
) -> TurnShape | TemplateRefusal:
    """Learn a template's turns from a conversation of two questions and two answers.

    Returns the refusal itself where the template does not take even one question and one answer.
    """
    words = ("Kupuka", "Lomina", "Tarevo", "Sidaru")
    plain = [{"role": ("user", "assistant")[place % 2], "content": word} for place, word in enumerate(words)]
    traced = [message | {"content": trace(message["content"], place)} for place, message in enumerate(plain)]
    try:
        try:
            text, count = render(traced, False), 4
        except TemplateRefusal:
            text, count = render(traced[:2], False), 2
        prompt, bare = render(plain[: count - 1], True), render(plain[: count - 1], False)
    except TemplateRefusal as refusal:
        return refusal
    encoded = encode(text, runs_of(text))
    roles = tuple(message["role"] for message in plain[:count])
    whole = Rendering(str.__str__(text), runs_of(text), encoded, roles, lambda n, generate: render(plain[:n], generate))
    first, last = whole.extents.get(count - 1, (None, 0))
    if first is None:
        return TurnShape(frozenset(), "", "")
    final = [one for one in encoded.controls if one.start >= last]
    at_end = _contiguous(final) if final else []
    end_ids = [one.token_id for one in at_end]
    if count == 4 and at_end:
        middle = _middle_end_ids(whole)
        # A token that only closes the whole conversation, after the one that closes every turn, is no end of a turn.
        end_ids = middle if middle and end_ids[: len(middle)] == middle else end_ids + middle
    gap = whole.text[len(prompt) : first] if whole.text.startswith(prompt) else ""
    header = gap if prompt == bare and gap.strip() else ""
    opening = header or (prompt[len(bare) :] if prompt.startswith(bare) else prompt[-40:])
    return TurnShape(frozenset(end_ids), header, opening)


def _middle_end_ids(whole: Rendering) -> list[int]:
    """Control tokens, in order, that end the first answer, which another question follows."""
    _, stop = whole.extents.get(1, (0, 0))
    following, _ = whole.extents.get(2, (0, 0))
    after = whole.controls_between(stop, following)
    if not after:
        return []
    run = _contiguous(after)
    bound = _own_bound(whole, 1, stop)
    own = [one for one in run if one.stop <= bound]
    if not own and whole.text[stop : run[0].start].strip() == "":
        own = run[:1]
    return [one.token_id for one in own]
