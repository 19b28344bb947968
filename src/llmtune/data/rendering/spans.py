"""Find the mask: where the trained part of each message begins and ends in a rendered conversation (promise Q5).

An assistant turn is trained from the end of the generation prompt through its end-of-turn token(s). A question and its
answer in a ChatML template (a newline is shown as ~):

    text       <|im_start|>user~Hi<|im_end|>~<|im_start|>assistant~Hello.<|im_end|>~
    prompt     <|im_start|>user~Hi<|im_end|>~<|im_start|>assistant~
    content                                                        Hello.
    trained                                                        Hello.<|im_end|>

Both ends come from the template itself:

* The start is the length of the prompt for this answer: the earlier messages rendered with `add_generation_prompt`. It
  must be, character for character, a prefix of the complete text; an answer for which it is not is named and not
  trained.
* The stop is that of the control tokens which follow the content (`content_end`) and end a turn (`learn_turn_shape`).
  The newline after `<|im_end|>` and the header of the next turn are the template's, and a model never writes them.

An empty thought that the template itself writes at the beginning of an answer is never trained.

Other messages (for the rules that train them) go from their first character through their own end-of-turn tokens.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llmtune.data.rendering.encoding import Encoded
from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.provenance import Run, runs_of, with_origin
from llmtune.data.rendering.rendering import Rendering, adjacent_controls, shared_length

__all__ = ["Span", "TurnShape", "content_end", "find_span", "latest_end", "learn_turn_shape"]


def content_end(rendering: Rendering, index: int, start: int, end_ids: frozenset[int]) -> tuple[int, int]:
    """Return where the content of message `index` from `start` on ends, and where it comes again (or the text's end).

    `end_ids` are the control tokens that end a turn. The content is what comes from the row: text, reasoning, tool
    calls. A *stretch* is characters [start, stop) that all come from one message. Three things make the end of the last
    stretch the wrong answer:

    * A later turn repeats the content. The name `f` of a call stands again in the turn of its result, and is no content
      of the call there:

          <|call|>f(1)<|end|><|result|>f: 2<|end|>
                  ----                 -

    * The template writes the last message differently, so that the rendering of the messages up to this one
      (`as_last`) does not show where it ends. Here the thought of an earlier answer is left out:

          as last    <|assistant|><think>T</think>A<|end|>
          in full    <|assistant|>A<|end|><|user|>...

    * The template refuses to render the messages up to this one: the first end of turn is taken.

    The last message has no later turn, but a template may repeat it after its end, in a summary of the conversation,
    say: see `_before_repetition`.
    """
    stretches = rendering.stretches_of(index)
    text_end = len(rendering.text)
    if not stretches:
        return start, text_end
    if index == len(rendering.roles) - 1:
        own = _before_repetition(rendering, stretches)
        repeated = stretches[len(own)][0] if len(own) < len(stretches) else text_end
        return max(start, own[-1][1]), repeated
    if len(stretches) == 1 and not _turn_ends_between(rendering, index, start, stretches[0][0], end_ids):
        return max(start, stretches[0][1]), text_end  # the common case: one stretch, in its own turn
    limit = _content_limit(rendering, index, start, end_ids)
    stops = [stop for first, stop in stretches if first < limit]
    repeated = next((first for first, _ in stretches if first >= max(limit, start)), text_end)
    return max(start, min(stops[-1], limit) if stops else start), repeated


def _before_repetition(rendering: Rendering, stretches: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """The stretches of the last message without those at the end in which the template repeats it.

    What two turns of a template hold of one message may be both its own (a thought, and the answer), also where they
    are equal. So a repetition is only what the template does not write there where a question follows, after all that
    it does write:

        in full     <|assistant|>A<|end|><|summary|>A<|end|>
        followed    <|assistant|>A<|end|><|user|>...
    """
    texts = [rendering.text[start:stop].strip() for start, stop in stretches]
    splits = [
        number for number in range(1, len(stretches)) if all(text in "".join(texts[:number]) for text in texts[number:])
    ]
    if not splits or rendering.render_followed is None:
        return stretches
    try:
        shared = shared_length(rendering.render_followed(), rendering.text)
    except TemplateRefusal:
        return stretches
    own = (number for number in splits if stretches[number - 1][1] <= shared < stretches[number][0])
    return stretches[: next(own, len(stretches))]


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


MessageFields = Mapping[str, object]


class TurnShape(NamedTuple):
    """The form of a template's turns, learnt from a small conversation."""

    end_ids: frozenset[int]
    """Ids of the control tokens that end a plain assistant turn."""
    header: str
    """Text of the template between the end of its generation prompt and an answer.

    Empty unless the template ignores `add_generation_prompt`.
    """


def learn_turn_shape(
    render: Callable[[Sequence[MessageFields], bool], str], encode: Callable[[str, Sequence[Run]], Encoded]
) -> TurnShape | TemplateRefusal:
    """Learn a template's turns from a conversation of two questions and two answers.

    In the example above a turn ends with `<|im_end|>`: that token follows both answers. What opens the next question
    (`<|im_start|>`) follows the first answer only, and is no end. The header is empty: the generation prompt ends with
    `assistant` and a newline, and the answer begins there.

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
    end_ids = [control.token_id for control in adjacent_controls(final)] if final else []
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
    run = adjacent_controls(following)
    # What the answer as the last message also ends with belongs to it; the rest opens the next question.
    bound = latest_end(rendering, 1, stop)
    own = [control for control in run if control.stop <= bound]
    if not own and not rendering.text[stop : run[0].start].strip():
        own = run[:1]
    return [control.token_id for control in own]


_THOUGHT_NAME = r"[^<>\[\]/\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]]\s*"
_THOUGHT_BEGINS = re.compile(rf"[<\[]{_THOUGHT_NAME}", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"\s*[<\[](?:/|[^<>\[\]\s]*end){_THOUGHT_NAME}", re.IGNORECASE)
"""Both ends of a thought: `<think></think>`, `[THINK][/THINK]`, `<|START_THINKING|><|END_THINKING|>`."""
_LONGEST_MARK = 64
"""Characters before an answer among which its prompt may open a thought."""


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
    text, next_other_message = rendering.text, rendering.next_other_message
    begins = _THOUGHT_BEGINS.match(text, start) or next(
        (
            mark
            for mark in _THOUGHT_BEGINS.finditer(text, max(0, start - _LONGEST_MARK), start)
            if mark.end() == start and next_other_message(index, mark.start()) >= start  # the prompt opens it
        ),
        None,
    )
    ends = _THOUGHT_ENDS.match(text, begins.end()) if begins is not None else None
    if ends is None:
        return start
    own = next((max(first, start) for first, stop in rendering.stretches_of(index) if stop > start), len(text))
    stop = min(ends.end(), next_other_message(index, start), own)
    return stop if stop >= ends.start() + len(ends.group().rstrip()) else start


def _known_prompt_length(rendering: Rendering, index: int) -> int | None:
    """The length of the prompt of message `index`, if it is known and a prefix of the complete text."""
    prefix = rendering.prefixes.get((index, True))
    if prefix is None or not rendering.text.startswith(prefix.tail, prefix.length):
        return None
    return prefix.length + len(prefix.tail)


def _extend_to_end(rendering: Rendering, index: int, start: int, shape: TurnShape) -> Span:
    """Extend a message from its last own character through its end-of-turn tokens."""
    content_stop, repeated = content_end(rendering, index, start, shape.end_ids)
    limit = min(rendering.next_other_message(index, content_stop), repeated)
    following = rendering.controls_between(content_stop, limit)
    if rendering.next_other_message(index, start) < content_stop:
        return Span(0, 0, False, "the template puts other text of the row inside it")
    if not following:
        return Span(start, content_stop, False)
    closing = adjacent_controls(following)
    is_adjacent = not rendering.text[content_stop : closing[0].start].strip()
    ends_here = is_adjacent and closing[0].token_id in shape.end_ids
    if ends_here and (len(closing) == 1 or closing[1].token_id not in shape.end_ids):
        return Span(start, closing[0].stop, True)  # the common case, clear without another rendering
    bound = latest_end(rendering, index, limit)
    if bound < content_stop:
        bound = limit  # the message reads differently as the last one, so that rendering does not show its end here
    closing = [
        control for number, control in enumerate(closing) if control.stop <= bound or (number == 0 and ends_here)
    ]
    if not closing:
        return Span(start, content_stop, False)
    ends = [control for control in closing if control.token_id in shape.end_ids]
    if ends:
        return Span(start, ends[-1].stop, True)
    if rendering.roles[index] != "assistant":
        # Control tokens of another kind, as after a system prompt: they end the message if nothing lies between.
        return Span(start, closing[-1].stop if is_adjacent else content_stop, is_adjacent)
    later = [control for control in following if control.token_id in shape.end_ids and control.stop <= bound]
    return Span(start, later[0].stop if later else closing[-1].stop, True)


def _divergence(prompt: str, text: str) -> str:
    start = shared_length(prompt, text)
    ours, theirs = prompt[start : start + 40], text[start : start + 40]
    return f"the prompt for it goes on with {ours!r}, the whole conversation with {theirs!r}"
