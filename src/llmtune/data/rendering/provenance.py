"""Strings that carry the origin of each character through everything a chat template does to them.

A chat template mixes its own text with the text of the data: it trims, splits, joins, slices and adds. `Traced` is a
`str` with an *origin* for each character, which it keeps through those operations. After rendering, every character is
therefore known to be written by the template or to belong to a certain message, without markers in the text. Loss masks
(promise Q5) and the safe encoding of content (promise Q6) are built on this.

Origins: `TEMPLATE` (-1) for text of the template, `DATA` (-2) for text of the row that is part of no message's answer
(tool descriptions, names), and the index of a message (0 and up) for its content, reasoning and tool calls. Runs are
`(length, origin)` pairs whose lengths add up to that of the text.
"""

# ruff: noqa: D102 - the methods are those of str

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import SupportsIndex, TypeVar, cast

__all__ = [
    "DATA",
    "TEMPLATE",
    "Run",
    "Traced",
    "call_with_origins",
    "concat",
    "contains_traced",
    "label_as_content",
    "runs_of",
    "with_origin",
]

TEMPLATE = -1
DATA = -2

Run = tuple[int, int]
"""Length and origin."""

T = TypeVar("T")


class Traced(str):
    """A string with the origin of every character. Its methods are those of `str`.

    >>> text = "<user>" + Traced("  hi ", [(5, 0)]).strip() + "</user>"
    >>> text, runs_of(text)
    ('<user>hi</user>', ((6, -1), (2, 0), (7, -1)))
    """

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: Iterable[Run] | None = None) -> Traced:
        traced = super().__new__(cls, text)
        traced._runs = _merged(runs) if runs is not None else (((len(text), DATA),) if text else ())
        return traced

    def __str__(self) -> str:
        return self  # jinja2 calls str() on output; `str.__str__(text)` gives the plain string

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
            index = key.__index__() % len(self)
            return Traced(text, _cut(self._runs, index, index + 1))
        start, stop, step = key.indices(len(self))
        if step == 1:
            return Traced(text, _cut(self._runs, start, stop))
        # A slice with a step (`text[::-1]`) takes characters one by one; templates hardly ever do.
        origins = [origin for length, origin in self._runs for _ in range(length)]
        return Traced(text, [(1, origin) for origin in origins[key]])

    # Without it `for character in text` would give plain characters.
    def __iter__(self) -> Iterator[Traced]:
        return (self[index] for index in range(len(self)))

    def __mod__(self, values: object) -> str:
        return call_with_origins(lambda form, given: str.__mod__(str.__str__(form), given), (self, values), {})

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
        start = 0
        for line, bare in zip(str.splitlines(self, True), str.splitlines(self, False), strict=True):
            parts.append(self[start : start + len(line if keepends else bare)])
            start += len(line)
        return parts

    def partition(self, sep: str) -> tuple[str, str, str]:
        # An empty separator raises str's own error.
        start = str.find(self, sep) if sep else len(str.partition(self, sep)[0])
        return (self, Traced("", ()), Traced("", ())) if start < 0 else self._around(start, len(sep))

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        start = str.rfind(self, sep) if sep else len(str.rpartition(self, sep)[0])
        return (Traced("", ()), Traced("", ()), self) if start < 0 else self._around(start, len(sep))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            # An empty text is replaced between all characters: rare enough for the slow way.
            insert = functools.partial(_insert_between, count=count)
            return call_with_origins(insert, (self, new), {})
        return _interleave(self.split(old, count), new)

    def join(self, pieces: Iterable[str], /) -> str:
        return _interleave(pieces, self)

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
        return Traced(text, self._runs) if len(text) == len(self) else label_as_content(text, (self,))

    def _located(self, parts: Sequence[str], sep: str | None) -> list[str]:
        """The parts that `str.split` gave, cut out of this text again."""
        traced: list[str] = []
        start = 0
        for part in parts:
            if sep is None:  # any amount of white space lies between two parts
                start = str.index(self, part, start)
            traced.append(self[start : start + len(part)])
            start += len(part) + len(sep or "")
        return traced

    def _around(self, start: int, width: int) -> tuple[str, str, str]:
        return self[:start], self[start : start + width], self[start + width :]


def _insert_between(text: str, new: str, count: SupportsIndex) -> str:
    return str.replace(str.__str__(text), "", new, count)


def _interleave(parts: Iterable[str], glue: str) -> str:
    return concat(piece for index, part in enumerate(parts) for piece in ((part,) if index == 0 else (glue, part)))


PRECISE_METHODS = frozenset(
    name for name, value in vars(Traced).items() if callable(value) and not name.startswith("_")
)
"""Methods of `Traced` that keep origins; the sandbox labels the result of any other as content."""


def runs_of(text: str) -> tuple[Run, ...]:
    """Return the runs of a text; a plain string is text of the template."""
    if isinstance(text, Traced):
        return text._runs
    return ((len(text), TEMPLATE),) if text else ()


def concat(pieces: Iterable[str]) -> str:
    """Join pieces as `"".join` does; the result is `Traced` when any piece is."""
    parts = list(pieces)
    if not any(isinstance(part, Traced) for part in parts):
        return "".join(parts)
    return Traced("".join(parts), [run for part in parts for run in runs_of(part)])


def with_origin(value: T, origin: int) -> T:
    """Return a copy of JSON-like `value` in which every string, keys too, is `Traced` with `origin`."""
    if isinstance(value, str):
        return cast("T", Traced(value, [(len(value), origin)]))
    if isinstance(value, Mapping):
        return cast("T", {with_origin(key, origin): with_origin(item, origin) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return cast("T", [with_origin(item, origin) for item in value])
    return value


def contains_traced(value: object) -> bool:
    """Whether nested lists, tuples and mappings contain a `Traced` string."""
    return next(_traced_in(value), None) is not None


def label_as_content(text: str, sources: object) -> Traced:
    """Give all of `text` one origin: that of the `sources` it was made from if they share one, DATA otherwise."""
    # The template's part is left out: text that is only partly content counts as content.
    origins = {origin for source in _traced_in(sources) for _, origin in source._runs if origin != TEMPLATE}
    return Traced(text, [(len(text), origins.pop() if len(origins) == 1 else DATA)])


def call_with_origins(function: Callable[..., T], args: tuple[object, ...], kwargs: Mapping[str, object]) -> T:
    """Call a function that loses origins, and determine the origins of the characters of its text.

    The function is called a second time with random words in the place of the traced strings. If putting the strings
    back gives the true result, origins are exact. If not (the function looked into the strings, escaped or cut them),
    all of the result is labelled as content, never as the template's: content that passes for template text could
    become a control token.
    """
    result = function(*args, **kwargs)
    if not isinstance(result, str):
        return result
    strings: dict[str, Traced] = {}
    nonce = secrets.token_hex(12)  # a row cannot contain a word that is drawn after it was read
    try:
        other = function(
            *[_with_words(value, nonce, strings) for value in args],
            **{name: _with_words(value, nonce, strings) for name, value in kwargs.items()},
        )
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
        return cast("T", label_as_content(result, (args, kwargs)))
    if not strings:
        return result
    if isinstance(other, str):
        pieces = re.split(f"(zq{nonce}x[0-9]+zq)", str.__str__(other))
        guess = concat(strings.get(piece, piece) for piece in pieces)
        # Otherwise the function looked at what the strings hold, and a guess would be wrong somewhere.
        if str.__eq__(guess, result):
            return cast("T", guess)
    return cast("T", label_as_content(result, (args, kwargs)))


def _with_words(value: object, nonce: str, strings: dict[str, Traced]) -> object:
    """A copy of `value` with a word for each traced string, which is put into `strings` under that word."""
    if isinstance(value, Traced):
        word = f"zq{nonce}x{len(strings)}zq"
        strings[word] = value
        return word
    if isinstance(value, Mapping):
        return {_with_words(key, nonce, strings): _with_words(item, nonce, strings) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_words(item, nonce, strings) for item in value)
    return value


def _traced_in(value: object) -> Iterator[Traced]:
    if isinstance(value, str):  # first, because most values are strings and the check for a Mapping is slow
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
    """The runs of the characters [start, stop)."""
    inside: list[Run] = []
    run_start = 0
    for length, origin in runs:
        low, high = max(start, run_start), min(stop, run_start + length)
        if low < high:
            inside.append((high - low, origin))
        run_start += length
    return inside
