"""Find where the content of a message ends in a rendered conversation.

The content is what comes from the row: text, reasoning, tool calls. A *stretch* is characters [start, stop) that all
come from one message. Three things make the end of the last stretch the wrong answer:

* A later turn repeats the content. The name `f` of a call stands again in the turn of its result, and is no content of
  the call there:

      <|call|>f(1)<|end|><|result|>f: 2<|end|>
              ----                 -

* The template writes the last message differently, so that the rendering of the messages up to this one (`as_last`)
  does not show where it ends. Here the thought of an earlier answer is left out:

      as last    <|assistant|><think>T</think>A<|end|>
      in full    <|assistant|>A<|end|><|user|>...

* The template refuses to render the messages up to this one: the first end of turn is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.provenance import Run, runs_of
from llmtune.data.rendering.rendering import Rendering, shared_length

__all__ = ["content_end", "latest_end"]


def content_end(rendering: Rendering, index: int, start: int, end_ids: frozenset[int]) -> tuple[int, int]:
    """Return where the content of message `index` from `start` on ends, and where it comes again (or the text's end).

    `end_ids` are the control tokens that end a turn.
    """
    stretches = rendering.stretches_of(index)
    text_end = len(rendering.text)
    if not stretches or index == len(rendering.roles) - 1:
        return max(start, stretches[-1][1] if stretches else start), text_end
    if len(stretches) == 1 and not _turn_ends_between(rendering, index, start, stretches[0][0], end_ids):
        return max(start, stretches[0][1]), text_end  # the common case: one stretch, in its own turn
    limit = _content_limit(rendering, index, start, end_ids)
    stops = [stop for first, stop in stretches if first < limit]
    repeated = next((first for first, _ in stretches if first >= max(limit, start)), text_end)
    return max(start, min(stops[-1], limit) if stops else start), repeated


def _turn_ends_between(rendering: Rendering, index: int, start: int, stop: int, end_ids: frozenset[int]) -> bool:
    """Whether another message or an end of turn lies in [start, stop)."""
    ends = (control.token_id in end_ids for control in rendering.controls_between(start, stop))
    return rendering.next_other_message(index, start) < stop or any(ends)


def _content_limit(rendering: Rendering, index: int, start: int, end_ids: frozenset[int]) -> int:
    """The place in the text by which the content of message `index` has ended.

    What looks like its content after that is a later turn that repeats it: the name of a call before its result, say.
    """
    prefix = rendering.prefixes.get((index + 1, False))
    if prefix is not None:
        return prefix.length
    try:
        as_last = rendering.render(index + 1, False)
        if rendering.text.startswith(as_last):
            return len(as_last)
        traced = as_last if rendering.render_traced is None else rendering.render_traced(index + 1)
    except TemplateRefusal:
        return _first_end(rendering, index, start, end_ids)
    last_stretches = _stretches_of_origin(runs_of(traced), index)
    return _limit_by_ending(rendering, index, start, as_last, last_stretches, end_ids)


def _limit_by_ending(
    rendering: Rendering,
    index: int,
    start: int,
    as_last: str,
    last_stretches: Sequence[tuple[int, int]],
    end_ids: frozenset[int],
) -> int:
    """The limit where a message is written differently as the last one (its thought is left out, say).

    Both texts are equal up to a place, and from there on the content is the end of what it is in `as_last`.
    """
    shared = shared_length(as_last, rendering.text)
    last_content = _content(as_last, last_stretches, shared)
    content = _content(rendering.text, rendering.stretches_of(index), shared)
    if not last_content:
        return shared  # the two renderings part after the message, so what comes later is a repetition
    lengths = range(len(content), 0, -1)
    ending = last_content.rstrip()
    length = next((length for length in lengths if ending.endswith(content[:length].rstrip())), 0)
    if not content[:length].strip():
        return _first_end(rendering, index, max(start, shared), end_ids)
    for first, stop in rendering.stretches_of(index):
        first = max(first, shared)
        if first < stop:
            if length <= stop - first:
                return first + length
            length -= stop - first
    return len(rendering.text)


def _first_end(rendering: Rendering, index: int, start: int, end_ids: frozenset[int]) -> int:
    """The first end of turn after the first own character at or after `start`, or the end of the text."""
    first = next((max(first, start) for first, stop in rendering.stretches_of(index) if stop > start), start)
    controls = rendering.controls_between(first, len(rendering.text))
    return next((control.stop for control in controls if control.token_id in end_ids), len(rendering.text))


def _stretches_of_origin(runs: Sequence[Run], index: int) -> list[tuple[int, int]]:
    """The stretches [start, stop) of one origin."""
    stops = itertools.accumulate(length for length, _ in runs)
    return [(stop - length, stop) for stop, (length, origin) in zip(stops, runs, strict=True) if origin == index]


def _content(text: str, stretches: Sequence[tuple[int, int]], start: int) -> str:
    """The characters of stretches from `start` on."""
    return "".join(text[max(first, start) : stop] for first, stop in stretches if stop > start)


def latest_end(rendering: Rendering, index: int, limit: int) -> int:
    """An upper bound of the end of message `index`: the text that its rendering as the last message shares."""
    if index == len(rendering.roles) - 1:
        return len(rendering.text)
    prefix = rendering.prefixes.get((index + 1, False))
    if prefix is not None:
        rest = rendering.text[prefix.length : prefix.length + len(prefix.tail)]
        return prefix.length + shared_length(prefix.tail, rest)
    try:
        as_last = rendering.render(index + 1, False)
    except TemplateRefusal:
        return limit
    return shared_length(as_last, rendering.text)
