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
* The stop is that of the control tokens which follow the content (`content_end.py`) and end a turn (`turn_shape.py`).
  The newline after `<|im_end|>` and the header of the next turn are the template's, and a model never writes them.

An empty thought that the template itself writes at the beginning of an answer is never trained.

Other messages (for the rules that train them) go from their first character through their own end-of-turn tokens.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from llmtune.data.rendering.content_end import content_end, latest_end
from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.rendering import Rendering, adjacent_controls, shared_length
from llmtune.data.rendering.turn_shape import TurnShape

__all__ = ["Span", "find_span"]

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
