"""Tokens with their places in the text; long texts piece by piece, so that memory does not grow with them.

The tokenizers library needs about 140 bytes for every byte it encodes in one call. A long text is therefore encoded in
pieces that overlap, and two pieces are joined where, inside their overlap, both begin a word at the same character and
agree about every token around it. From there on both read the same text from the same place, so what comes out is what
one call over the whole text gives. Where no such place is found (a tokenizer that knows no words) the text is encoded
in one call.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

from tokenizers import Tokenizer

from llmtune.errors import DataError

__all__ = ["located_tokens"]

PIECE_CHARACTERS = 200_000
"""Characters encoded in one call, where a text has more than one piece."""

OVERLAP_CHARACTERS = 8_000
"""Characters that a piece shares with the next one."""

AGREEING_TOKENS = 8
"""Tokens on either side of a border that both pieces must have in the same places."""

Located = tuple[list[int], Sequence[int], Sequence[int]]


def located_tokens(backend: Tokenizer, text: str) -> Located:
    """Return ids, starts and stops of the tokens of a text, without special tokens; starts never fall.

    Raises DataError for a text with half a character (a lone surrogate), which no tokenizer can encode.
    """
    if len(text) > PIECE_CHARACTERS + OVERLAP_CHARACTERS:
        joined = _joined(backend, text)
        if joined is not None:
            return joined
    ids, starts, stops, _ = _encode(backend, text, with_words=False)
    return ids, starts, stops


def _in_order(starts: list[int], stops: list[int]) -> tuple[list[int], list[int]]:
    """The same places, with starts that never fall and no stop before its start."""
    if starts == sorted(starts):
        return starts, stops
    starts = list(itertools.accumulate(starts, max))
    return starts, [max(start, stop) for start, stop in zip(starts, stops, strict=True)]


def _encode(
    backend: Tokenizer, text: str, *, with_words: bool
) -> tuple[list[int], list[int], list[int], list[int | None]]:
    """Ids, starts, stops and, if asked for, the number of each token's word.

    The library's far larger record of them is let go at once.
    """
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except TypeError as error:
        half = next((one for one in text if "\ud800" <= one <= "\udfff"), None)
        if half is None:
            raise
        raise DataError(
            f"the text holds half a character (the surrogate U+{ord(half):04X})", fix="write the text as UTF-8"
        ) from error
    offsets = encoding.offsets
    starts, stops = _in_order([start for start, _ in offsets], [stop for _, stop in offsets])
    return encoding.ids, starts, stops, encoding.word_ids if with_words else []


class _Piece:
    """The tokens of one piece, with places in the whole text."""

    def __init__(self, backend: Tokenizer, text: str, begin: int) -> None:
        self.begin = begin
        self.end = min(len(text), begin + PIECE_CHARACTERS + OVERLAP_CHARACTERS)
        self.ids, starts, stops, words = _encode(
            backend, text[begin : self.end], with_words=self.end < len(text) or begin > 0
        )
        self.starts, self.stops = array("l", starts), array("l", stops)
        if begin:
            self.starts, self.stops = (
                array("l", (one + begin for one in places)) for places in (self.starts, self.stops)
            )
        self._words = words

    def word_borders(self, low: int, high: int) -> dict[int, int]:
        """Character -> token, for tokens between those characters that begin a word, with enough tokens on either side."""
        borders = {}
        for place in range(AGREEING_TOKENS, len(self.ids) - AGREEING_TOKENS):
            start = self.starts[place]
            if low <= start < high and self._words[place] != self._words[place - 1] and self.stops[place - 1] <= start:
                borders[start] = place
        return borders

    def around(self, place: int) -> list[tuple[int, int, int]]:
        """The tokens on either side of a border."""
        near = slice(place - AGREEING_TOKENS, place + AGREEING_TOKENS)
        return list(zip(self.ids[near], self.starts[near], self.stops[near], strict=True))


def _joined(backend: Tokenizer, text: str) -> Located | None:
    ids: list[int] = []
    starts, stops = array("l"), array("l")
    piece = _Piece(backend, text, 0)
    first = 0
    while piece.end < len(text):
        following = _Piece(backend, text, piece.begin + PIECE_CHARACTERS)
        here = piece.word_borders(following.begin, piece.end)
        there = following.word_borders(following.begin, piece.end)
        middle = following.begin + OVERLAP_CHARACTERS // 2
        shared = sorted(here.keys() & there.keys(), key=lambda place: abs(place - middle))
        border = next(
            (one for one in shared if here[one] >= first and piece.around(here[one]) == following.around(there[one])),
            None,
        )
        if border is None:
            return None
        kept = slice(first, here[border])
        ids += piece.ids[kept]
        starts += piece.starts[kept]
        stops += piece.stops[kept]
        piece, first = following, there[border]
    return ids + piece.ids[first:], starts + piece.starts[first:], stops + piece.stops[first:]
