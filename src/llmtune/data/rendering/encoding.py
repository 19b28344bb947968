"""Tokenize text of known origin so that content never becomes a control token (promise Q6).

A *control token* is an added token of the tokenizer, special or not, unless it is only white space. Where content does
not spell one, the ids are those of the tokenizer's own `encode`, in one call over the complete text, so nothing can
differ from it. Where content does spell one (alone, over two fields, or together with text of the template), the text
is encoded by a copy of the tokenizer in which every control token has an unguessable name: the control tokens that the
template wrote are written under those names, and the spellings in the content are only letters.

A process that only tokenizes receives a `Vocabulary` instead of the tokenizer object, so it imports neither
transformers nor torch.
"""

from __future__ import annotations

import bisect
import functools
import json
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from llmtune.data.rendering.chunked_encoding import located_tokens
from llmtune.data.rendering.provenance import DATA, TEMPLATE, Run
from llmtune.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Control", "Encoded", "SafeEncoder", "Vocabulary"]

_EDGE = 8
"""Characters of each end of a content that stand for it when only the template's own control tokens are searched."""


@dataclass(frozen=True)
class Vocabulary:
    """The parts of a fast tokenizer that rendering uses: its encoder, template and special tokens. Picklable."""

    backend: Tokenizer
    """Encodes without truncation, padding or special handling of control tokens."""
    chat_template: str | dict[str, str] | list[dict[str, str]] | None
    """As the tokenizer has it: a text, several by name, a list of `{"name", "template"}`, or None."""
    special_tokens: dict[str, str | list[str]]
    """Special tokens by their role (`bos_token`, ...), as the tokenizer has them: a text, or several."""
    control_tokens: dict[int, str]
    """Text of every control token (an added token that is more than whitespace) by its id."""
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    before: tuple[int, ...]
    """Ids that the tokenizer adds before a text."""
    after: tuple[int, ...]
    """Ids that end a document: those the tokenizer adds after a text, and the end token."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Make one of a loaded tokenizer. Raises `TokenizerError` for one without a `tokenizers` backend."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            name = type(tokenizer).__name__
            raise TokenizerError(
                f"{name} is not a fast tokenizer, so the place of its tokens in the text is unknown",
                where="model.tokenizer",
                fix="use a folder with a tokenizer.json",
            )
        before, after = _frame(tokenizer)
        # A copy, because the tokenizer's own encoder may be used by others with these settings.
        if backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens:
            backend = Tokenizer.from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        return cls(
            backend=backend,
            chat_template=tokenizer.chat_template,
            special_tokens=dict(tokenizer.special_tokens_map),
            control_tokens={
                token_id: token.content
                for token_id, token in tokenizer.added_tokens_decoder.items()
                if token.content.replace("\u2581", " ").strip()  # SentencePiece writes a space as U+2581
            },
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            unknown_id=tokenizer.unk_token_id,
            before=before,
            after=after,
        )

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens spelled out."""
        return self.backend.decode(ids, skip_special_tokens=False)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer adds around a text, read off one letter encoded with and without them."""
    # By trying, because tokenizers keep these ids in several places, and which one counts depends on their class.
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    starts = range(len(framed) - len(bare) + 1)
    start = next((start for start in starts if framed[start : start + len(bare)] == bare), 0)
    before, after = framed[:start], framed[start + len(bare) :]
    end_id = tokenizer.eos_token_id
    if end_id is not None and end_id not in after:
        after.append(end_id)
    return tuple(before), tuple(after)


class Control(NamedTuple):
    """A control token in an encoded text: its position among the tokens, its characters [start, stop), its id."""

    position: int
    start: int
    stop: int
    token_id: int


class Encoded(NamedTuple):
    """An encoded text of T tokens."""

    ids: list[int]
    """T token ids."""
    starts: Sequence[int]
    """First character of each token [T]; never decreasing."""
    stops: Sequence[int]
    """The character after each token [T]."""
    controls: list[Control]
    """The control tokens, in order."""
    spelled: tuple[str, ...]
    """Control strings that content spells and that are encoded as plain text."""
    unknown: int = 0
    """Tokens that stand for characters the tokenizer does not know."""


class SafeEncoder:
    """Encodes text of known origin with a fast tokenizer.

    With `parse_control_tokens` content may become control tokens, as in the libraries.
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
        """Encode `text`, whose characters have the origins in `runs`, without adding special tokens.

        Raises DataError for a text with half a character (a lone surrogate), which no tokenizer can encode, and
        TokenizerError for a tokenizer that produces a control token from plain text.
        """
        text = str.__str__(text)  # the plain string: the operations of `Traced` are slow
        ids, starts, stops = located_tokens(self._backend, text)
        controls = self._controls(text, ids, starts, stops)
        unknown = self._count_unknown(ids, controls)
        if self._parse_control_tokens:
            return Encoded(ids, starts, stops, controls, (), unknown)
        content = _ContentMap(runs)
        spelled = tuple(
            self.control_tokens[control.token_id]
            for control in controls
            if content.overlaps(control.start, control.stop)
        )
        if not spelled:
            return Encoded(ids, starts, stops, controls, (), unknown)
        del ids, starts, stops, controls  # a long row must not be in memory twice
        return self._encode_renamed(text, content, spelled)

    def _controls(self, text: str, ids: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> list[Control]:
        controls = []
        control_tokens = self.control_tokens
        # A comprehension first: few tokens are control tokens, and a loop body for every other one would be slow.
        for index in [index for index, token_id in enumerate(ids) if token_id in control_tokens]:
            token_id, start = ids[index], starts[index]
            covered = text[start : stops[index]]
            # Tokens with lstrip or rstrip cover whitespace around them that may be content.
            lead = covered.find(control_tokens[token_id])
            width = len(control_tokens[token_id])
            if lead < 0 and token_id == self._unknown_id:
                continue  # a character the tokenizer does not know, not the text of a control token
            if lead < 0:  # a normalizer changed the text, such as its case
                lead, width = len(covered) - len(covered.lstrip()), len(covered.strip())
            controls.append(Control(index, start + lead, start + lead + width, token_id))
        return controls

    def _count_unknown(self, ids: Sequence[int], controls: Sequence[Control]) -> int:
        # `in` runs in C; most rows end here.
        if self._unknown_id is None or self._unknown_id not in ids:
            return 0
        return ids.count(self._unknown_id) - sum(control.token_id == self._unknown_id for control in controls)

    def _encode_renamed(self, text: str, content: _ContentMap, spelled: tuple[str, ...]) -> Encoded:
        """Encode a text whose content spells control tokens, by the tokenizer with renamed control tokens."""
        template_controls = self._template_controls(text, content)
        # Content may spell the old names now: they are plain letters to this tokenizer.
        tokenizer, names = self._renamed_tokenizer
        pieces: list[str] = []
        anchors: list[tuple[int, int]] = [(0, 0)]
        renamed_length = position = 0
        for control in template_controls:
            name = names[control.token_id]
            # Both borders of every piece are anchors, so that positions inside it map back exactly.
            for piece, end in ((text[position : control.start], control.start), (name, control.stop)):
                pieces.append(piece)
                renamed_length += len(piece)
                anchors.append((renamed_length, end))
            position = control.stop
        pieces.append(text[position:])
        ids, renamed_starts, renamed_stops = located_tokens(tokenizer, "".join(pieces))
        to_original = _PositionMap(anchors).to_original
        starts, stops = array("l", map(to_original, renamed_starts)), array("l", map(to_original, renamed_stops))
        controls = self._controls(text, ids, starts, stops)
        # Only the template's control tokens have a name that can be found, so one more was made out of letters.
        if len(controls) != len(template_controls):
            raise TokenizerError(
                f"the tokenizer makes control tokens out of plain text ({spelled[0]!r} in a row)",
                where="model.tokenizer",
                fix="remove such rows, or set `data.parse_control_tokens: true` if they are meant to be control tokens",
            )
        return Encoded(ids, starts, stops, controls, spelled, self._count_unknown(ids, controls))

    def _template_controls(self, text: str, content: _ContentMap) -> list[Control]:
        """The control tokens that the template wrote, found with harmless letters in the place of content."""
        harmless, harmless_content, anchors = content.made_harmless(text, self._harmless_letter, self._harmless_mark)
        to_original = _PositionMap(anchors).to_original
        template_controls = []
        for control in self._controls(harmless, *located_tokens(self._backend, harmless)):
            if not harmless_content.overlaps(control.start, control.stop):
                start = to_original(control.start)
                stop = start + control.stop - control.start
                template_controls.append(control._replace(start=start, stop=stop))
        return template_controls

    @functools.cached_property
    def _harmless_letter(self) -> str:
        return self._unused("\u4e00\u3042\u0416\u03a9\u05d0\u0e01\uac00")

    @functools.cached_property
    def _harmless_mark(self) -> str:
        return self._unused("\u00a7\u00b6\u2020\u2030\u203b\u00a4\u00ac")

    def _unused(self, candidates: str) -> str:
        # A letter of a control token could complete one at the border of content.
        used = "".join(self.control_tokens.values())
        return next(character for character in candidates if character not in used)

    @functools.cached_property
    def _renamed_tokenizer(self) -> tuple[Tokenizer, dict[int, str]]:
        """The tokenizer with an unguessable name for every control token, and those names by id."""
        # Guessable names would only be other spellings of the control tokens.
        nonce = secrets.token_hex(16)
        names = {token_id: f"zq{nonce}{number:06d}zq" for number, token_id in enumerate(self.control_tokens)}
        new_name = {self.control_tokens[token_id]: name for token_id, name in names.items()}
        # The library cannot rename a token in place, so its JSON form is changed and read again.
        definition = json.loads(self.definition)
        for token in definition["added_tokens"]:
            token["content"] = new_name.get(token["content"], token["content"])
        _rename_in_model(definition["model"], new_name)
        tokenizer = Tokenizer.from_str(json.dumps(definition))
        for token_id, name in names.items():
            # A renamed token that got another id would train other rows of the embedding.
            if tokenizer.token_to_id(name) != token_id:
                text = self.control_tokens[token_id]
                raise TokenizerError(
                    f"the control token {text!r} cannot be told apart from text in this tokenizer",
                    where="model.tokenizer",
                    fix="load and save the tokenizer with transformers first, "
                    "so that its added tokens are numbered as in its files",
                )
        return tokenizer, names


class _ContentMap:
    """The characters of a text that are content, as sorted intervals for fast look-ups."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        position = 0
        for length, origin in runs:
            if origin != TEMPLATE:
                self._starts.append(position)
                self._stops.append(position + length)
            position += length

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any character in [start, stop) is content."""
        # The last interval that begins before `stop` is the only one that can reach past `start` there.
        index = bisect.bisect_left(self._starts, stop) - 1
        return index >= 0 and self._stops[index] > start

    def made_harmless(self, text: str, letter: str, mark: str) -> tuple[str, _ContentMap, list[tuple[int, int]]]:
        """Replace content by harmless characters of its kind (letter, mark, white space), and long content by its ends.

        Returns that text, its content, and (character of it, character of `text`) pairs for `_PositionMap`.
        """
        # The kind of the characters beside a control token may decide whether the tokenizer finds it.
        pieces: list[str] = []
        runs: list[Run] = []
        anchors = [(0, 0)]
        length = position = 0
        # A long content is cut to its ends: only they can join with text of the template into a control token.
        for start, stop in zip(self._starts, self._stops, strict=True):
            is_short = stop - start <= 2 * _EDGE
            ends = text[start:stop] if is_short else text[start : start + _EDGE] + text[stop - _EDGE : stop]
            harmless = "".join(
                character if character.isspace() else letter if character.isalnum() or character == "_" else mark
                for character in ends
            )
            pieces += [text[position:start], harmless]
            runs += [(start - position, TEMPLATE), (len(harmless), DATA)]
            length += start - position
            anchors.append((length, start))
            length += len(harmless)
            anchors.append((length, stop))
            position = stop
        pieces.append(text[position:])
        return "".join(pieces), _ContentMap(runs), anchors


class _PositionMap:
    """Maps positions in a changed text to the original, by (changed, original) pairs at the borders of pieces."""

    def __init__(self, anchors: Sequence[tuple[int, int]]) -> None:
        self._changed = [changed for changed, _ in anchors]
        self._original = [original for _, original in anchors]

    def to_original(self, position: int) -> int:
        """The position in the original; inside a replaced piece never beyond its end."""
        low = bisect.bisect_right(self._changed, position) - 1
        original = self._original[low] + position - self._changed[low]
        return min(original, self._original[low + 1]) if low + 1 < len(self._original) else original


def _rename_in_model(model: dict[str, Any], new_name: dict[str, str]) -> None:
    """Rename tokens in the part `model` of tokenizer.json, in place."""
    vocabulary = model["vocab"]  # BPE and WordPiece map pieces to ids, Unigram lists [piece, score]
    if isinstance(vocabulary, dict):
        model["vocab"] = {new_name.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[new_name.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new_name.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        # A merge into a control token would name a piece that the vocabulary no longer has.
        model["merges"] = [[left, right] for left, right in pairs if not {left, right, left + right} & new_name.keys()]
