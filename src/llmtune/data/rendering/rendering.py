"""A rendered conversation: its text, its tokens, and which of its characters belong to which message."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llmtune.data.rendering.chat_template import RenderedPrefix
from llmtune.data.rendering.encoding import Control, Encoded
from llmtune.data.rendering.provenance import Run

__all__ = ["Rendering", "adjacent_controls", "shared_length"]


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
    render_followed: Callable[[], str] | None = None
    """Renders all messages and a question after them, as plain text."""

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
    def _stretches(self) -> dict[int, list[tuple[int, int]]]:
        """The stretches [start, stop) of each message's own characters, in order; neighbours are joined."""
        stretches: dict[int, list[tuple[int, int]]] = {}
        for start, stop, message in zip(*self._message_runs, strict=True):
            runs = stretches.setdefault(message, [])
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        return stretches

    def stretches_of(self, index: int) -> list[tuple[int, int]]:
        """The stretches [start, stop) of a message's own characters, in order."""
        return self._stretches.get(index, [])

    def next_other_message(self, index: int, start: int) -> int:
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


def adjacent_controls(controls: Sequence[Control]) -> list[Control]:
    """The first control token and those that follow it without a gap."""
    run = [controls[0]]
    for control in controls[1:]:
        if control.start != run[-1].stop:
            break
        run.append(control)
    return run


def shared_length(left: str, right: str) -> int:
    """The length of the longest common prefix, by bisection: slices compare much faster than a loop."""
    # Invariant: the first `low` characters are equal, and at most `high` are.
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low
