"""Encode a text and locate its tokens in it; long texts in chunks, so that memory does not grow with them.

The tokenizers library needs about 140 bytes for every byte it encodes in one call. A long text is therefore encoded in
chunks that overlap. Two chunks are joined at a character in their overlap at which both begin a word and around which
both have the same tokens: from there on both read the same text from the same place, so the result is that of one call
over the complete text. Where there is no such character (a tokenizer without words) the text is encoded in one call.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

from tokenizers import Tokenizer

from llmtune.errors import DataError

__all__ = ["located_tokens"]

CHUNK_CHARACTERS = 200_000
"""Characters encoded in one call, where a text has more than one chunk."""

OVERLAP_CHARACTERS = 8_000
"""Characters that a chunk shares with the next one."""

AGREEING_TOKENS = 8
"""Tokens on either side of a border that must be the same, at the same characters, in both chunks."""

Located = tuple[list[int], Sequence[int], Sequence[int]]
"""Ids, starts and stops (in characters) of T tokens."""


def located_tokens(backend: Tokenizer, text: str) -> Located:
    """Return ids, starts and stops of the tokens of a text, without special tokens; starts never decrease.

    Raises DataError for a text with half a character (a lone surrogate), which no tokenizer can encode.
    """
    if len(text) > CHUNK_CHARACTERS + OVERLAP_CHARACTERS:
        joined = _encode_chunks(backend, text)
        if joined is not None:
            return joined
    ids, starts, stops, _ = _encode(backend, text, with_words=False)
    return ids, starts, stops


def _in_order(starts: list[int], stops: list[int]) -> tuple[list[int], list[int]]:
    """The same positions, with starts that never decrease and no stop before its start.

    Tokens of one character that takes several bytes can come with offsets in any order.
    """
    if starts == sorted(starts):
        return starts, stops
    starts = list(itertools.accumulate(starts, max))
    return starts, [max(start, stop) for start, stop in zip(starts, stops, strict=True)]


def _encode(
    backend: Tokenizer, text: str, *, with_words: bool
) -> tuple[list[int], list[int], list[int], list[int | None]]:
    """Ids, starts, stops and, with `with_words`, the number of each token's word."""
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except TypeError as error:
        half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
        if half is None:
            raise
        problem = f"the text holds half a character (the surrogate U+{ord(half):04X})"
        raise DataError(problem, fix="write the text as UTF-8") from error
    # Only lists of numbers leave this function: the library's encoding is far larger.
    offsets = encoding.offsets
    starts, stops = _in_order([start for start, _ in offsets], [stop for _, stop in offsets])
    return encoding.ids, starts, stops, encoding.word_ids if with_words else []


class _Chunk:
    """The tokens of one chunk, located in the complete text."""

    def __init__(self, backend: Tokenizer, text: str, begin: int) -> None:
        self.begin = begin
        self.end = min(len(text), begin + CHUNK_CHARACTERS + OVERLAP_CHARACTERS)
        is_joined = self.end < len(text) or begin > 0
        self.ids, starts, stops, words = _encode(backend, text[begin : self.end], with_words=is_joined)
        # Arrays take 8 bytes a number, lists 36.
        self.starts = array("l", (start + begin for start in starts))
        self.stops = array("l", (stop + begin for stop in stops))
        self._words = words

    def word_borders(self, low: int, high: int) -> dict[int, int]:
        """Character -> token, for tokens that begin a word in [low, high) with enough tokens on either side."""
        borders = {}
        for index in range(AGREEING_TOKENS, len(self.ids) - AGREEING_TOKENS):
            start = self.starts[index]
            # Tokens never cross words, so at a border of words both chunks may be cut.
            begins_word = self._words[index] != self._words[index - 1] and self.stops[index - 1] <= start
            if low <= start < high and begins_word:
                borders[start] = index
        return borders

    def around(self, index: int) -> list[tuple[int, int, int]]:
        """The tokens on either side of a border."""
        near = slice(index - AGREEING_TOKENS, index + AGREEING_TOKENS)
        return list(zip(self.ids[near], self.starts[near], self.stops[near], strict=True))


def _encode_chunks(backend: Tokenizer, text: str) -> Located | None:
    """Encode a long text in chunks, or give None where two of them cannot be joined."""
    ids: list[int] = []
    starts, stops = array("l"), array("l")
    chunk = _Chunk(backend, text, 0)
    first = 0
    while chunk.end < len(text):
        # Only two chunks exist at a time, whatever the length of the text.
        following = _Chunk(backend, text, chunk.begin + CHUNK_CHARACTERS)
        ending = chunk.word_borders(following.begin, chunk.end)
        beginning = following.word_borders(following.begin, chunk.end)
        # The middle first: there both chunks have the most context on either side.
        middle = following.begin + OVERLAP_CHARACTERS // 2
        shared = sorted(ending.keys() & beginning.keys(), key=lambda character: abs(character - middle))
        border = next(
            (
                character
                for character in shared
                if ending[character] >= first
                and chunk.around(ending[character]) == following.around(beginning[character])
            ),
            None,
        )
        if border is None:
            return None
        taken = slice(first, ending[border])
        ids += chunk.ids[taken]
        starts += chunk.starts[taken]
        stops += chunk.stops[taken]
        chunk, first = following, beginning[border]
    return ids + chunk.ids[first:], starts + chunk.starts[first:], stops + chunk.stops[first:]
