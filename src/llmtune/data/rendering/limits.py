"""What rendering one conversation may use of time and space, and the loops in which it is spent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFAULT_LIMITS", "Budget", "Limits", "RenderLimit", "SizedTicking", "TemplateRefusal", "Walking"]


class TemplateRefusal(Exception):
    """The template refuses or fails on one conversation; the message says how.

    `is_limit` marks a template that asked for too much time or space.
    """

    def __init__(self, problem: str, *, is_limit: bool = False) -> None:
        super().__init__(problem)
        self.is_limit = is_limit


@dataclass(frozen=True)
class Limits:
    """What one rendering may use: seconds, and characters of any one text (raised with the size of the conversation)."""

    seconds: float = 10.0
    characters: int = 16_000_000


DEFAULT_LIMITS = Limits()


class Budget:
    """What one rendering may still use, what it has written, and where it turned to each message."""

    def __init__(self, limits: Limits, input_characters: int) -> None:
        self.deadline = time.monotonic() + limits.seconds
        self.seconds = limits.seconds
        self.characters = limits.characters + 16 * input_characters
        self.turns = 0
        self.written = 0
        self.marks: dict[int, int] = {}
        self.messages: Sequence[Any] = ()

    def spend(self) -> None:
        """Pay for a turn of a loop or a call."""
        self.turns += 1
        if self.turns % 256 == 0 and time.monotonic() > self.deadline:
            raise TemplateRefusal(f"the chat template ran longer than {self.seconds:g} s", is_limit=True)

    def check_size(self, size: int) -> None:
        """Refuse a text of more characters than are allowed."""
        if size > self.characters:
            raise TemplateRefusal(f"the chat template made more than {self.characters:,} characters", is_limit=True)


class RenderLimit:
    """An iterable whose every turn is paid for.

    It keeps its length so that `loop.length` and `loop.last` work as before.
    """

    def __init__(self, items: Any, budget: Budget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.spend()
            yield item


class SizedTicking(RenderLimit):
    """The same with its length."""

    def __len__(self) -> int:
        return len(self._items)


class Walking(SizedTicking):
    """A template's walk through its messages: where in the output each turn begins, and where the walk ends, is written
    down.
    """

    def __iter__(self) -> Iterator[Any]:
        budget = self._budget
        skipped = len(budget.messages) - len(self._items)
        known = skipped >= 0 and all(
            one is other for one, other in zip(self._items, budget.messages[skipped:], strict=True)
        )
        for place, item in enumerate(super().__iter__(), skipped):
            if known:
                budget.marks[place] = budget.written
            yield item
        if known:
            budget.marks[len(budget.messages)] = budget.written
