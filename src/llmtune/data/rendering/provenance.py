"""Text that knows where each of its characters came from, through everything a chat template does to it.

A chat template mixes its own text with the text of the data: it trims, splits, joins, slices and adds. `Traced` is a
`str` that carries, beside its characters, an *origin* for each of them, and keeps it through those operations. After
rendering we therefore know for every character whether the template wrote it or which message it belongs to, with no
markers in the text and no second guess: this is what masks (Q5) and the safe encoding of content (Q6) stand on.

Origins: `TEMPLATE` (-1) for what the template writes, `DATA` (-2) for text of the row that belongs to no message's
answer (tool descriptions, names), and a message's index (0 and up) for its content, reasoning and tool calls. Runs are
`(length, origin)` pairs whose lengths add up to the text's.
"""

# ruff: noqa: D102 - the methods are those of str

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

__all__ = ["DATA", "TEMPLATE", "Run", "Traced", "concat", "holds_traced", "label", "lift", "runs_of", "trace"]

TEMPLATE = -1
DATA = -2

Run = tuple[int, int]


class Traced(str):
    """A string with the origin of every character. Its methods are those of `str`.

    >>> text = "<user>" + Traced("  hi ", [(5, 0)]).strip() + "</user>"
    >>> text, runs_of(text)
    ('<user>hi</user>', ((6, -1), (2, 0), (7, -1)))
    """

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: Iterable[Run] | None = None) -> Traced:
        made = super().__new__(cls, text)
        made._runs = _merged(runs) if runs is not None else (((len(text), DATA),) if text else ())
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), (*self._runs, *runs_of(other)))

    def __radd__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(other, self), (*runs_of(other), *self._runs))

    def __mul__(self, count: SupportsIndex) -> Traced:
        times = max(0, count.__index__())
        return Traced(str.__mul__(self, times), self._runs * times)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> Traced:
        text = str.__getitem__(self, key)
        if not isinstance(key, slice):
            place = key.__index__() % len(self)
            return Traced(text, _cut(self._runs, place, place + 1))
        start, stop, step = key.indices(len(self))
        if step == 1:
            return Traced(text, _cut(self._runs, start, stop))
        origins = [origin for length, origin in self._runs for _ in range(length)]
        return Traced(text, [(1, origin) for origin in origins[key]])

    def __iter__(self) -> Iterator[Traced]:
        return (self[place] for place in range(len(self)))

    def __mod__(self, values: Any) -> str:
        return lift(lambda form, given: str.__mod__(str.__str__(form), given), (self, values), {})

    def strip(self, chars: str | None = None) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Traced:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> Traced:
        return self[len(prefix) :] if str.startswith(self, prefix) else self

    def removesuffix(self, suffix: str) -> Traced:
        return self[: len(self) - len(suffix)] if suffix and str.endswith(self, suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        parts: list[str] = []
        place = 0
        for kept, bare in zip(str.splitlines(self, True), str.splitlines(self, False), strict=True):
            parts.append(self[place : place + len(kept if keepends else bare)])
            place += len(kept)
        return parts

    def partition(self, sep: str) -> tuple[str, str, str]:
        place = str.find(self, sep) if sep else len(str.partition(self, sep)[0])
        return (self, Traced("", ()), Traced("", ())) if place < 0 else self._around(place, len(sep))

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        place = str.rfind(self, sep) if sep else len(str.rpartition(self, sep)[0])
        return (Traced("", ()), Traced("", ()), self) if place < 0 else self._around(place, len(sep))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return lift(lambda text, put: str.replace(str.__str__(text), "", put, count), (self, new), {})
        parts = self.split(old, count)
        return concat(piece for place, part in enumerate(parts) for piece in ((part,) if place == 0 else (new, part)))

    def join(self, pieces: Iterable[str], /) -> str:
        return concat(piece for place, part in enumerate(pieces) for piece in ((part,) if place == 0 else (self, part)))

    def upper(self) -> Traced:
        return self._recased(str.upper(self))

    def lower(self) -> Traced:
        return self._recased(str.lower(self))

    def capitalize(self) -> Traced:
        return self._recased(str.capitalize(self))

    def title(self) -> Traced:
        return self._recased(str.title(self))

    def _recased(self, text: str) -> Traced:
        # A few letters grow when their case changes; then single origins are no longer known, but it is still content.
        return Traced(text, self._runs) if len(text) == len(self) else label(text, (self,))

    def _located(self, parts: Sequence[str], sep: str | None) -> list[str]:
        found: list[str] = []
        place = 0
        for part in parts:
            if sep is None:
                place = str.index(self, part, place)
            found.append(self[place : place + len(part)])
            place += len(part) + len(sep or "")
        return found

    def _around(self, place: int, width: int) -> tuple[str, str, str]:
        return self[:place], self[place : place + width], self[place + width :]


PRECISE_METHODS = frozenset(
    name for name, value in vars(Traced).items() if callable(value) and not name.startswith("_")
)
"""Methods of `Traced` that keep origins; the result of any other is labelled as content by the environment."""


def runs_of(text: str) -> tuple[Run, ...]:
    """Return the runs of a text; a plain string is the template's own."""
    if isinstance(text, Traced):
        return text._runs
    return ((len(text), TEMPLATE),) if text else ()


def concat(pieces: Iterable[str]) -> str:
    """Join pieces as `"".join` does; the result is `Traced` when any piece is."""
    parts = list(pieces)
    if not any(isinstance(part, Traced) for part in parts):
        return "".join(parts)
    return Traced("".join(parts), [run for part in parts for run in runs_of(part)])


def trace(value: Any, origin: int) -> Any:
    """Return a copy of JSON-like `value` in which every string, keys too, is `Traced` with `origin`."""
    if isinstance(value, str):
        return Traced(value, [(len(value), origin)])
    if isinstance(value, Mapping):
        return {trace(key, origin): trace(item, origin) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [trace(item, origin) for item in value]
    return value


def holds_traced(value: Any) -> bool:
    """Tell whether a `Traced` string stands anywhere in nested lists, tuples and mappings."""
    return next(_traced_in(value), None) is not None


def label(text: str, sources: Any) -> Traced:
    """Label all of `text` as content made from `sources`: with their one origin where they share it, as DATA otherwise."""
    origins = {origin for source in _traced_in(sources) for _, origin in source._runs if origin != TEMPLATE}
    return Traced(text, [(len(text), origins.pop() if len(origins) == 1 else DATA)])


def lift(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function that knows nothing of origins and find out where the characters of its text came from.

    The function is called a second time with unguessable words in place of the traced strings. Where putting the
    strings back gives the true result, origins are exact; where it does not (the function looked into them, escaped or
    cut them), the whole result is labelled as content: never as the template's.
    """
    result = function(*args, **kwargs)
    if not isinstance(result, str):
        return result
    stands_for: dict[str, Traced] = {}
    nonce = secrets.token_hex(12)
    try:
        stand_in = function(*_hidden(args, nonce, stands_for), **_hidden(dict(kwargs), nonce, stands_for))
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
        return label(result, (args, kwargs))
    if not isinstance(stand_in, str) or not stands_for:
        return label(result, (args, kwargs)) if stands_for else result
    pieces = re.split(f"(zq{nonce}x[0-9]+zq)", str.__str__(stand_in))
    guess = concat(stands_for.get(piece, piece) for piece in pieces)
    return guess if str.__eq__(guess, result) else label(result, (args, kwargs))


def _hidden(value: Any, nonce: str, stands_for: dict[str, Traced]) -> Any:
    if isinstance(value, Traced):
        word = f"zq{nonce}x{len(stands_for)}zq"
        stands_for[word] = value
        return word
    if isinstance(value, Mapping):
        return {_hidden(key, nonce, stands_for): _hidden(item, nonce, stands_for) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_hidden(item, nonce, stands_for) for item in value)
    return value


def _traced_in(value: Any) -> Iterator[Traced]:
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _traced_in(key)
            yield from _traced_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _traced_in(item)


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    merged: list[Run] = []
    for length, origin in runs:
        if merged and merged[-1][1] == origin:
            merged[-1] = (merged[-1][0] + length, origin)
        elif length:
            merged.append((length, origin))
    return tuple(merged)


def _cut(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    kept: list[Run] = []
    place = 0
    for length, origin in runs:
        low, high = max(start, place), min(stop, place + length)
        if low < high:
            kept.append((high - low, origin))
        place += length
    return kept
