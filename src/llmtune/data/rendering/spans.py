"""Find the mask: where the trained part of each message begins and ends in a rendered conversation (promise Q5).

An assistant turn is trained from the end of the generation prompt through its end-of-turn token(s). Both ends come from
the template itself:

* The start is the length of the prompt for this answer: the earlier messages rendered with `add_generation_prompt`. It
  must be, character for character, a prefix of the complete rendering; a turn for which it is not is named and not
  trained.
* The end is found after the last character that belongs to the message (its content, reasoning or tool calls): the
  control tokens that follow. Characters that a template writes again in a later turn (a function's name in the turn of
  its result) do not count: the rendering of the messages up to this one lacks them. The control tokens that end a turn
  are learnt once from a small conversation; the header of the next turn never counts, because it is missing when the
  turn is the last one.

An empty thought that the template itself writes at the beginning of an answer is never trained.

Other messages (for the rules that train them) go from their first character through their own end-of-turn tokens.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmtune.data.rendering.chat_template import RenderedPrefix
from llmtune.data.rendering.encoding import Control, Encoded
from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.provenance import Run, runs_of, with_origin

__all__ = ["Rendering", "Span", "TurnShape", "find_span", "learn_turn_shape"]

MessageFields = Mapping[str, object]

_THOUGHT_NAME = r"[^<>\[\]/\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]]\s*"
_THOUGHT_BEGINS = re.compile(rf"[<\[]{_THOUGHT_NAME}", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"\s*[<\[](?:/|[^<>\[\]\s]*end){_THOUGHT_NAME}", re.IGNORECASE)
"""Both ends of a thought: `<think></think>`, `[THINK][/THINK]`, `<|START_THINKING|><|END_THINKING|>`."""
_LONGEST_MARK = 64
"""Characters before an answer among which its prompt may open a thought."""


class TurnShape(NamedTuple):
    """The form of a template's turns, learnt from a small conversation."""

    end_ids: frozenset[int]
    """Ids of the control tokens that end a plain assistant turn."""
    header: str
    """Text of the template between the end of its generation prompt and an answer.

    Empty unless the template ignores `add_generation_prompt`.
    """


class Span(NamedTuple):
    """Trained characters [start, stop) of one message, or the reason why there are none (`problem`).

    `ended` is true where an end-of-turn token closes it. `prompt_stop` is the end of the prompt where the answer does
    not begin with it, because the template writes an empty thought between them.
    """

    start: int
    stop: int
    ended: bool
    problem: str | None = None
    prompt_stop: int | None = None


@dataclass(frozen=True)
class Rendering:
    """A rendered and encoded conversation: its text, runs, tokens, and the roles of its messages."""

    text: str
    runs: tuple[Run, ...]
    encoded: Encoded
    roles: tuple[str, ...]
    render: Callable[[int, bool], str]
    """`render(count, add_generation_prompt)` renders the first `count` messages as plain text."""
    prefixes: Mapping[tuple[int, bool], RenderedPrefix] = field(default_factory=dict)
    """Results of `render` that are known without calling it, by its arguments."""
    render_traced: Callable[[int], str] | None = None
    """`render(count, False)` with the origin of every character, where messages can be traced."""

    @functools.cached_property
    def extents(self) -> dict[int, tuple[int, int]]:
        """The first character and the one after the last of each origin that occurs."""
        extents: dict[int, tuple[int, int]] = {}
        position = 0
        for length, origin in self.runs:
            extents[origin] = (extents.get(origin, (position, 0))[0], position + length)
            position += length
        return extents

    @functools.cached_property
    def _message_runs(self) -> tuple[list[int], list[int], list[int]]:
        """Starts, stops and messages of the runs that belong to a message."""
        stops = list(itertools.accumulate(length for length, _ in self.runs))
        runs = [
            (stop - length, stop, origin)
            for stop, (length, origin) in zip(stops, self.runs, strict=True)
            if origin >= 0
        ]
        return [start for start, _, _ in runs], [stop for _, stop, _ in runs], [origin for _, _, origin in runs]

    @functools.cached_property
    def _runs_by_message(self) -> dict[int, list[tuple[int, int]]]:
        """The stretches [start, stop) of each message's own characters, in order; neighbours are joined."""
        runs_by_message: dict[int, list[tuple[int, int]]] = {}
        for start, stop, message in zip(*self._message_runs, strict=True):
            runs = runs_by_message.setdefault(message, [])
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        return runs_by_message

    def runs_of_message(self, index: int) -> list[tuple[int, int]]:
        """The stretches [start, stop) of a message's own characters, in order."""
        return self._runs_by_message.get(index, [])

    def next_foreign(self, index: int, start: int) -> int:
        """The first character at or after `start` that belongs to another message, or the end of the text."""
        starts, stops, messages = self._message_runs
        for run in range(bisect.bisect_right(stops, start), len(messages)):
            if messages[run] != index:
                return max(starts[run], start)
        return len(self.text)

    def controls_between(self, start: int, stop: int) -> list[Control]:
        """The control tokens within these characters."""
        controls = self.encoded.controls
        first = bisect.bisect_left(controls, start, key=lambda control: control.start)
        return list(itertools.takewhile(lambda control: control.stop <= stop, controls[first:]))


def find_span(rendering: Rendering, index: int, shape: TurnShape) -> Span:
    """Find the trained part of message `index`; `problem` gives the reason where the template gives no clear answer."""
    first, _ = rendering.extents.get(index, (None, 0))
    if rendering.roles[index] != "assistant":
        if first is None:
            return Span(0, 0, False, "the template does not render it")
        return _extend_to_end(rendering, index, first, shape)
    start = _known_prompt_length(rendering, index)
    if start is None:
        try:
            prompt = rendering.render(index, True)
        except TemplateRefusal as refusal:
            return Span(0, 0, False, f"the template gives no prompt for it ({refusal})")
        if not rendering.text.startswith(prompt):
            return Span(0, 0, False, _divergence(prompt, rendering.text))
        start = len(prompt)
    if shape.header:
        if not rendering.text.startswith(shape.header, start):
            return Span(0, 0, False, f"the template does not begin it with {shape.header!r}")
        start += len(shape.header)
    if first is not None and first < start:
        return Span(0, 0, False, "the template puts part of it before the place where the model begins to answer")
    after_thought = _after_empty_thought(rendering, index, start)
    span = _extend_to_end(rendering, index, after_thought, shape)
    return span if after_thought == start else span._replace(prompt_stop=start)


def _after_empty_thought(rendering: Rendering, index: int, start: int) -> int:
    """The place after an empty thought that the template writes at the beginning of an answer, or `start`.

    Such a block stands where the row has no thought; trained, it would teach the model not to think.
    """
    text, next_foreign = rendering.text, rendering.next_foreign
    begins = _THOUGHT_BEGINS.match(text, start) or next(
        (
            mark
            for mark in _THOUGHT_BEGINS.finditer(text, max(0, start - _LONGEST_MARK), start)
            if mark.end() == start and next_foreign(index, mark.start()) >= start  # the prompt opens it
        ),
        None,
    )
    ends = _THOUGHT_ENDS.match(text, begins.end()) if begins is not None else None
    if ends is None:
        return start
    own = next((max(first, start) for first, stop in rendering.runs_of_message(index) if stop > start), len(text))
    stop = min(ends.end(), next_foreign(index, start), own)
    return stop if stop >= ends.start() + len(ends.group().rstrip()) else start


def _known_prompt_length(rendering: Rendering, index: int) -> int | None:
    """The length of the prompt of message `index`, if it is known and a prefix of the complete text."""
    prefix = rendering.prefixes.get((index, True))
    if prefix is None or not rendering.text.startswith(prefix.tail, prefix.length):
        return None
    return prefix.length + len(prefix.tail)


def _content_stop(rendering: Rendering, index: int, start: int, shape: TurnShape) -> tuple[int, int]:
    """Return where the message's own characters from `start` on end, and where they come again later (or the end)."""
    runs = rendering.runs_of_message(index)
    text_end = len(rendering.text)
    if not runs or index == len(rendering.roles) - 1:
        return max(start, runs[-1][1] if runs else start), text_end
    if len(runs) == 1 and not _turn_ends_between(rendering, index, start, runs[0][0], shape):
        return max(start, runs[0][1]), text_end  # the common case: one stretch of text, in its own turn
    bound = _content_bound(rendering, index, start, shape)
    own = [run for run in runs if run[0] < bound]
    repeated = next((run[0] for run in runs if run[0] >= max(bound, start)), text_end)
    return max(start, min(own[-1][1], bound) if own else start), repeated


def _turn_ends_between(rendering: Rendering, index: int, start: int, stop: int, shape: TurnShape) -> bool:
    """Whether another message or an end of turn lies in [start, stop)."""
    ends = (control.token_id in shape.end_ids for control in rendering.controls_between(start, stop))
    return rendering.next_foreign(index, start) < stop or any(ends)


def _content_bound(rendering: Rendering, index: int, start: int, shape: TurnShape) -> int:
    """The place in the text by which the content of message `index` has ended.

    What looks like its content after that is a later turn that repeats it: the name of a call before its result, say.
    """
    prefix = rendering.prefixes.get((index + 1, False))
    if prefix is not None:
        return prefix.length
    text_end = len(rendering.text)
    try:
        alone = rendering.render(index + 1, False)
        if rendering.text.startswith(alone):
            return len(alone)
        traced = alone if rendering.render_traced is None else rendering.render_traced(index + 1)
    except TemplateRefusal:
        return _first_end(rendering, index, start, shape)
    shared = _shared_length(alone, rendering.text)
    alone_text = _own_text(alone, _own_runs(runs_of(traced), index), shared)
    own_text = _own_text(rendering.text, rendering.runs_of_message(index), shared)
    if not alone_text:
        return shared  # the two renderings part after the message, so what comes later is a repetition
    # The message reads differently as the last one (its reasoning is left out, say); both renderings end alike.
    lengths = range(len(own_text), 0, -1)
    ending = alone_text.rstrip()
    length = next((length for length in lengths if ending.endswith(own_text[:length].rstrip())), 0)
    if not own_text[:length].strip():
        return _first_end(rendering, index, max(start, shared), shape)
    for first, stop in rendering.runs_of_message(index):
        first = max(first, shared)
        if first < stop:
            if length <= stop - first:
                return first + length
            length -= stop - first
    return text_end


def _first_end(rendering: Rendering, index: int, start: int, shape: TurnShape) -> int:
    """The first end of turn after the first own character at or after `start`, or the end of the text."""
    first = next((max(first, start) for first, stop in rendering.runs_of_message(index) if stop > start), start)
    controls = rendering.controls_between(first, len(rendering.text))
    return next((control.stop for control in controls if control.token_id in shape.end_ids), len(rendering.text))


def _own_runs(runs: Sequence[Run], index: int) -> list[tuple[int, int]]:
    """The stretches [start, stop) of one origin."""
    stops = itertools.accumulate(length for length, _ in runs)
    return [(stop - length, stop) for stop, (length, origin) in zip(stops, runs, strict=True) if origin == index]


def _own_text(text: str, runs: Sequence[tuple[int, int]], start: int) -> str:
    """The characters of these stretches from `start` on."""
    return "".join(text[max(first, start) : stop] for first, stop in runs if stop > start)


def _extend_to_end(rendering: Rendering, index: int, start: int, shape: TurnShape) -> Span:
    """Extend a message from its last own character through its end-of-turn tokens."""
    content_stop, repeated = _content_stop(rendering, index, start, shape)
    limit = min(rendering.next_foreign(index, content_stop), repeated)
    following = rendering.controls_between(content_stop, limit)
    if rendering.next_foreign(index, start) < content_stop:
        return Span(0, 0, False, "the template puts other text of the row inside it")
    if not following:
        return Span(start, content_stop, False)
    run = _contiguous(following)
    is_adjacent = not rendering.text[content_stop : run[0].start].strip()
    ends_here = is_adjacent and run[0].token_id in shape.end_ids
    if ends_here and (len(run) == 1 or run[1].token_id not in shape.end_ids):
        return Span(start, run[0].stop, True)  # the common case, clear without another rendering
    bound = _latest_end(rendering, index, limit)
    if bound < content_stop:
        bound = limit  # the message reads differently as the last one, so that rendering does not show its end here
    run = [control for number, control in enumerate(run) if control.stop <= bound or (number == 0 and ends_here)]
    if not run:
        return Span(start, content_stop, False)
    ends = [control for control in run if control.token_id in shape.end_ids]
    if ends:
        return Span(start, ends[-1].stop, True)
    if rendering.roles[index] != "assistant":
        # Control tokens of another kind, as after a system prompt: they end the message if nothing lies between.
        return Span(start, run[-1].stop if is_adjacent else content_stop, is_adjacent)
    later = [control for control in following if control.token_id in shape.end_ids and control.stop <= bound]
    return Span(start, later[0].stop if later else run[-1].stop, True)


def _latest_end(rendering: Rendering, index: int, limit: int) -> int:
    """An upper bound of the end of message `index`: the text that its rendering as the last message shares."""
    if index == len(rendering.roles) - 1:
        return len(rendering.text)
    prefix = rendering.prefixes.get((index + 1, False))
    if prefix is not None:
        rest = rendering.text[prefix.length : prefix.length + len(prefix.tail)]
        return prefix.length + _shared_length(prefix.tail, rest)
    try:
        alone = rendering.render(index + 1, False)
    except TemplateRefusal:
        return limit
    return _shared_length(alone, rendering.text)


def _contiguous(controls: Sequence[Control]) -> list[Control]:
    """The first control token and those that follow it without a gap."""
    run = [controls[0]]
    for control in controls[1:]:
        if control.start != run[-1].stop:
            break
        run.append(control)
    return run


def _shared_length(left: str, right: str) -> int:
    """The length of the longest common prefix, by bisection: slices compare much faster than a loop."""
    # Invariant: the first `low` characters are equal, and at most `high` are.
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def _divergence(prompt: str, text: str) -> str:
    start = _shared_length(prompt, text)
    ours, theirs = prompt[start : start + 40], text[start : start + 40]
    return f"the prompt for it goes on with {ours!r}, the whole conversation with {theirs!r}"


def learn_turn_shape(
    render: Callable[[Sequence[MessageFields], bool], str], encode: Callable[[str, Sequence[Run]], Encoded]
) -> TurnShape | TemplateRefusal:
    """Learn a template's turns from a conversation of two questions and two answers.

    Returns the refusal of a template that does not render even one question and one answer.
    """
    # Their characters are found again by origin; the words only must not be changed by a filter such as `trim`.
    words = ("Kupuka", "Lomina", "Tarevo", "Sidaru")  # words that no template contains
    plain = [{"role": ("user", "assistant")[index % 2], "content": word} for index, word in enumerate(words)]
    traced = [message | {"content": with_origin(message["content"], index)} for index, message in enumerate(plain)]
    try:
        try:
            text, count = render(traced, False), 4
        except TemplateRefusal:
            # Some templates accept a single question with its answer only.
            text, count = render(traced[:2], False), 2
        prompt, bare = render(plain[: count - 1], True), render(plain[: count - 1], False)
    except TemplateRefusal as refusal:
        return refusal
    rendering = Rendering(
        text=str.__str__(text),
        runs=runs_of(text),
        encoded=encode(text, runs_of(text)),
        roles=tuple(message["role"] for message in plain[:count]),
        render=lambda first, generate: render(plain[:first], generate),
    )
    start, stop = rendering.extents.get(count - 1, (None, 0))
    if start is None:
        return TurnShape(frozenset(), "")
    final = [control for control in rendering.encoded.controls if control.start >= stop]
    end_ids = [control.token_id for control in _contiguous(final)] if final else []
    if count == 4 and end_ids:
        middle = _middle_end_ids(rendering)
        # A token that only closes the whole conversation, after the one that closes every turn, is no end of a turn.
        end_ids = middle if middle and end_ids[: len(middle)] == middle else end_ids + middle
    gap = rendering.text[len(prompt) : start] if rendering.text.startswith(prompt) else ""
    header = gap if prompt == bare and gap.strip() else ""
    return TurnShape(frozenset(end_ids), header)


def _middle_end_ids(rendering: Rendering) -> list[int]:
    """Control tokens, in order, that end the first answer, which another question follows."""
    _, stop = rendering.extents.get(1, (0, 0))
    next_start, _ = rendering.extents.get(2, (0, 0))
    following = rendering.controls_between(stop, next_start)
    if not following:
        return []
    run = _contiguous(following)
    # What the answer as the last message also ends with belongs to it; the rest opens the next question.
    bound = _latest_end(rendering, 1, stop)
    own = [control for control in run if control.stop <= bound]
    if not own and not rendering.text[stop : run[0].start].strip():
        own = run[:1]
    return [control.token_id for control in own]
