"""Limits of time and size for rendering one conversation, and the loops of a template that keep to them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "Budget", "LimitedLoop", "Limits", "MessageLoop", "SizedLoop", "TemplateRefusal"]


class TemplateRefusal(Exception):
    """The template refuses or fails on a conversation; the message gives the reason.

    `is_limit` marks a template that went over a limit of time or space.
    """

    def __init__(self, problem: str, *, is_limit: bool = False) -> None:
        super().__init__(problem)
        self.is_limit = is_limit


@dataclass(frozen=True)
class Limits:
    """Limits of one rendering: seconds, and characters of any one text (more for a long conversation)."""

    seconds: float = 10.0
    characters: int = 16_000_000


DEFAULT_LIMITS = Limits()


class Budget:
    """The rest of the limits of one rendering, and the positions in its output at which each message began."""

    def __init__(self, limits: Limits, input_characters: int, messages: Sequence[object]) -> None:
        self.deadline = time.monotonic() + limits.seconds
        self.seconds = limits.seconds
        # In proportion to the row: a template writes a long conversation out more than once, but not without bound.
        self.characters = limits.characters + 16 * input_characters
        self.turns = 0
        self.written = 0
        """Characters of output so far."""
        self.messages = messages
        self.message_starts: dict[int, int] = {}
        """Characters of output before each message; at `len(messages)` those before the end of the loop."""

    def count_turn(self) -> None:
        """Count a turn of a loop or a call. Raises TemplateRefusal over the time limit."""
        self.turns += 1
        # Reading the clock at each turn would double the time of a loop.
        if self.turns % 256 == 0 and time.monotonic() > self.deadline:
            raise TemplateRefusal(f"the chat template ran longer than {self.seconds:g} s", is_limit=True)

    def check_size(self, size: int) -> None:
        """Raise TemplateRefusal for a text of more characters than allowed."""
        if size > self.characters:
            raise TemplateRefusal(f"the chat template made more than {self.characters:,} characters", is_limit=True)


class LimitedLoop:
    """The items of a loop; every turn counts against the budget."""

    def __init__(self, items: Iterable[object], budget: Budget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[object]:
        for item in self._items:
            self._budget.count_turn()
            yield item


class SizedLoop(LimitedLoop):
    """A `LimitedLoop` with a length, without which `loop.length` and `loop.last` would not work in the template."""

    def __init__(self, items: Sequence[object], budget: Budget) -> None:
        super().__init__(items, budget)
        self._length = len(items)

    def __len__(self) -> int:
        return self._length


class MessageLoop(SizedLoop):
    """The loop of a template over its messages; records where in the output each turn begins and the loop ends."""

    def __init__(self, items: Sequence[object], budget: Budget) -> None:
        super().__init__(items, budget)
        self._sequence = items

    def __iter__(self) -> Iterator[object]:
        messages, starts = self._budget.messages, self._budget.message_starts
        first = len(messages) - len(self._sequence)
        # A template may have changed the list before its loop; starts are recorded only for the messages given to it.
        is_known = first >= 0 and all(
            item is message for item, message in zip(self._sequence, messages[first:], strict=True)
        )
        for index, item in enumerate(super().__iter__(), first):  # a template may begin at `messages[1:]`
            if is_known:
                starts[index] = self._budget.written
            yield item
        if is_known:
            starts[len(messages)] = self._budget.written
