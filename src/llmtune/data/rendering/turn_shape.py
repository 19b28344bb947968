"""Learn how a chat template begins and ends its turns, from a small conversation.

Of the template in the example of `spans.py`, a turn ends with `<|im_end|>`: that token follows both answers. What opens
the next question (`<|im_start|>`) follows the first answer only, and is no end. The header is empty:
with `add_generation_prompt` the template writes `<|im_start|>assistant` and a newline, and the answer begins there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llmtune.data.rendering.content_end import latest_end
from llmtune.data.rendering.encoding import Encoded
from llmtune.data.rendering.limits import TemplateRefusal
from llmtune.data.rendering.provenance import Run, runs_of, with_origin
from llmtune.data.rendering.rendering import Rendering, adjacent_controls

__all__ = ["TurnShape", "learn_turn_shape"]

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
