"""Text of known origin -> token ids, so that content never becomes a control token (promise Q6).

A *control token* is an added token of the tokenizer, special or not, unless it is nothing but whitespace. Where content
does not spell one, the ids are those of the tokenizer's own `encode`, one call over the whole text: nothing can differ.
Where content does spell one (alone, over two fields, or together with the template's text), the text is encoded by a
twin of the tokenizer in which every control token answers to an unguessable name: the template's own control tokens are
written under those names, and whatever the content spells is only letters.
"""

from __future__ import annotations

import bisect
import functools
import json
import secrets
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from llmtune.data.rendering.chunked_encoding import located_tokens
from llmtune.data.rendering.provenance import DATA, TEMPLATE, Run
from llmtune.data.rendering.vocabulary import Vocabulary
from llmtune.errors import TokenizerError

__all__ = ["Control", "Encoded", "SafeEncoder"]

_EDGE = 8
"""Characters of each end of a content that stand for it where only the template's own control tokens are looked for."""


class Control(NamedTuple):
    """A control token in an encoded text: its place among the tokens, its characters [start, stop), its id."""

    place: int
    start: int
    stop: int
    token_id: int


class Encoded(NamedTuple):
    """An encoded text of T tokens.

    ids: T token ids. starts, stops: the characters [start, stop) of each token; starts never fall. controls: the
    control tokens, in order. hostile: the control strings that content spelled and that were encoded as plain text.
    unknown: tokens that stand for characters the tokenizer does not know.
    """

    ids: list[int]
    starts: Sequence[int]
    stops: Sequence[int]
    controls: list[Control]
    hostile: tuple[str, ...]
    unknown: int = 0


class SafeEncoder:
    """Encodes text of known origin with a fast tokenizer.

    Raises `TokenizerError` when the tokenizer produces a control token from plain text.
    """

    def __init__(self, vocabulary: Vocabulary, *, parse_control_tokens: bool = False) -> None:
        self._backend = vocabulary.backend
        self._parse_control_tokens = parse_control_tokens
        self._unknown_id = vocabulary.unknown_id
        self.control_tokens = vocabulary.control_tokens
        """Text of every control token by its id."""

    @functools.cached_property
    def definition(self) -> str:
        """The tokenizer as JSON text, as saved in tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str, runs: Sequence[Run]) -> Encoded:
        """Encode `text`, whose characters come from where `runs` say, without adding special tokens.

        Raises DataError for a text with half a character (a lone surrogate), which no tokenizer can encode.
        """
        text = str.__str__(text)  # the bare characters: `Traced` is for the runs
        ids, starts, stops = located_tokens(self._backend, text)
        controls = self._controls(text, ids, starts, stops)
        unknown = self._count_unknown(ids, controls)
        if self._parse_control_tokens:
            return Encoded(ids, starts, stops, controls, (), unknown)
        content = _ContentMap(runs)
        hostile = tuple(self.control_tokens[one.token_id] for one in controls if content.overlaps(one.start, one.stop))
        if not hostile:
            return Encoded(ids, starts, stops, controls, (), unknown)
        del ids, starts, stops, controls  # a long row is not to be in memory twice
        return self._encode_hostile(text, content, hostile)

    def _controls(self, text: str, ids: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> list[Control]:
        found = []
        control_tokens = self.control_tokens
        for place in [place for place, token_id in enumerate(ids) if token_id in control_tokens]:
            token_id, start = ids[place], starts[place]
            covered = text[start : stops[place]]
            # Tokens with lstrip or rstrip cover whitespace around them that may be content.
            lead = covered.find(control_tokens[token_id])
            width = len(control_tokens[token_id])
            if lead < 0 and token_id == self._unknown_id:
                continue  # a character the tokenizer does not know, not the text of a control token
            if lead < 0:
                lead, width = len(covered) - len(covered.lstrip()), len(covered.strip())
            found.append(Control(place, start + lead, start + lead + width, token_id))
        return found

    def _count_unknown(self, ids: Sequence[int], controls: Sequence[Control]) -> int:
        if self._unknown_id is None or self._unknown_id not in ids:
            return 0
        return ids.count(self._unknown_id) - sum(one.token_id == self._unknown_id for one in controls)

    def _encode_hostile(self, text: str, content: _ContentMap, hostile: tuple[str, ...]) -> Encoded:
        own = self._own_controls(text, content)
        twin, names = self._twin
        pieces: list[str] = []
        anchors: list[tuple[int, int]] = [(0, 0)]
        twin_length = place = 0
        for one in own:
            for piece, origin_end in ((text[place : one.start], one.start), (names[one.token_id], one.stop)):
                pieces.append(piece)
                twin_length += len(piece)
                anchors.append((twin_length, origin_end))
            place = one.stop
        pieces.append(text[place:])
        ids, twin_starts, twin_stops = located_tokens(twin, "".join(pieces))
        back = _Map(anchors)
        starts, stops = array("l", map(back.to_origin, twin_starts)), array("l", map(back.to_origin, twin_stops))
        controls = self._controls(text, ids, starts, stops)
        if len(controls) != len(own):
            raise TokenizerError(
                f"the tokenizer makes control tokens out of plain text ({hostile[0]!r} in a row)",
                where="model.tokenizer",
                fix="remove such rows, or set `data.parse_control_tokens: true` if they are meant to be control tokens",
            )
        return Encoded(ids, starts, stops, controls, hostile, self._count_unknown(ids, controls))

    def _own_controls(self, text: str, content: _ContentMap) -> list[Control]:
        """The control tokens that the template itself wrote, found with content that is harmless, and only its edges of
        it.
        """
        harmless, masked, anchors = content.masked(text, self._harmless_letter, self._harmless_mark)
        back = _Map(anchors)
        found = self._controls(harmless, *located_tokens(self._backend, harmless))
        return [
            Control(one.place, start, start + one.stop - one.start, one.token_id)
            for one in found
            if not masked.overlaps(one.start, one.stop)
            for start in (back.to_origin(one.start),)
        ]

    @functools.cached_property
    def _harmless_letter(self) -> str:
        return self._unused("\u4e00\u3042\u0416\u03a9\u05d0\u0e01\uac00")

    @functools.cached_property
    def _harmless_mark(self) -> str:
        return self._unused("\u00a7\u00b6\u2020\u2030\u203b\u00a4\u00ac")

    def _unused(self, candidates: str) -> str:
        used = "".join(self.control_tokens.values())
        return next(character for character in candidates if character not in used)

    @functools.cached_property
    def _twin(self) -> tuple[Tokenizer, dict[int, str]]:
        """The tokenizer with every control token renamed to something no data can contain, and the new names by id."""
        nonce = secrets.token_hex(16)
        names = {token_id: f"zq{nonce}{place:06d}zq" for place, token_id in enumerate(self.control_tokens)}
        new_name = {self.control_tokens[token_id]: name for token_id, name in names.items()}
        definition = json.loads(self.definition)
        for token in definition["added_tokens"]:
            token["content"] = new_name.get(token["content"], token["content"])
        _rename_in_model(definition["model"], new_name)
        twin = Tokenizer.from_str(json.dumps(definition))
        for token_id, name in names.items():
            if twin.token_to_id(name) != token_id:
                raise TokenizerError(
                    f"the control token {self.control_tokens[token_id]!r} cannot be told apart from text in this tokenizer",
                    where="model.tokenizer",
                    fix="load and save the tokenizer with transformers first, so that its added tokens are numbered as in its files",
                )
        return twin, names


class _ContentMap:
    """Which characters are content, for quick questions."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        place = 0
        for length, origin in runs:
            if origin != TEMPLATE:
                self._starts.append(place)
                self._stops.append(place + length)
            place += length

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any character in [start, stop) is content."""
        place = bisect.bisect_left(self._starts, stop) - 1
        return place >= 0 and self._stops[place] > start

    def masked(self, text: str, letter: str, mark: str) -> tuple[str, _ContentMap, list[tuple[int, int]]]:
        """Put harmless characters of the same kind (letter, mark, whitespace) in the place of content, of long content
        only its edges.

        Returns that text, which of it is content, and (character of it, character of `text`) pairs for `_Map`.
        """
        pieces: list[str] = []
        runs: list[Run] = []
        anchors = [(0, 0)]
        length = place = 0
        for start, stop in zip(self._starts, self._stops, strict=True):
            shown = (
                text[start:stop]
                if stop - start <= 2 * _EDGE
                else text[start : start + _EDGE] + text[stop - _EDGE : stop]
            )
            harmless = "".join(
                one if one.isspace() else letter if one.isalnum() or one == "_" else mark for one in shown
            )
            pieces += [text[place:start], harmless]
            runs += [(start - place, TEMPLATE), (len(harmless), DATA)]
            length += start - place
            anchors.append((length, start))
            length += len(harmless)
            anchors.append((length, stop))
            place = stop
        pieces.append(text[place:])
        return "".join(pieces), _ContentMap(runs), anchors


class _Map:
    """Characters of the twin's text -> characters of the original, given (twin, original) pairs at piece borders."""

    def __init__(self, anchors: Sequence[tuple[int, int]]) -> None:
        self._twin = [twin for twin, _ in anchors]
        self._origin = [origin for _, origin in anchors]

    def to_origin(self, place: int) -> int:
        """The place in the original of a place in the twin, both in characters.

        Within replaced content never beyond its end.
        """
        low = bisect.bisect_right(self._twin, place) - 1
        origin = self._origin[low] + place - self._twin[low]
        return min(origin, self._origin[low + 1]) if low + 1 < len(self._origin) else origin


def _rename_in_model(model: dict[str, Any], new_name: dict[str, str]) -> None:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {new_name.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[new_name.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new_name.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[left, right] for left, right in pairs if not {left, right, left + right} & new_name.keys()]
