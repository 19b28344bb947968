"""The types of the way from a data file to the model: row, message, conversation, example.

Shapes: T tokens of one example, N examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "REASONING_FIELDS",
    "SIDES",
    "Conversation",
    "Example",
    "ExampleSet",
    "Message",
    "Row",
    "Side",
    "Stretch",
    "example_digest",
    "set_digest",
    "stretches",
]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning in the wild; chat templates read the first (a few the second)."""

Side = Literal["chosen", "rejected", "desirable", "undesirable", "prompt", "labelled"]
"""What a preference says of an answer: the two of a pair, or an answer that is judged by itself. A `prompt` has none
yet: its answers are drawn in training. A `labelled` row is classified as a whole.
"""
SIDES: tuple[Side, ...] = get_args(Side)
"""Tables hold a side by its index in this order, and -1 for an example without one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file. `source` is `file:line`, or `file[index]` where a file has no lines."""

    source: str
    fields: Mapping[str, object]
    loss_weight: float = 1.0
    """Factor on the weights of the row's trained tokens (`data.train[].weight`)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `weight` is None unless the row gives one: 0 takes the message out of the loss under every `train_on` rule,
    `customized` uses it as is. `extra` holds the other fields a chat template may read (`reasoning_content`,
    `tool_calls`, `tool_call_id`, `name`).
    """

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row as messages. A plain-text row has no messages and only `text`; a prompt-completion row is two messages.

    `prompt_is_text` marks a prompt-completion row of plain strings that is joined as text, without a chat template.
    """

    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, object], ...] = ()
    prompt_is_text: bool = False
    loss_weight: float = 1.0
    template_args: Mapping[str, object] = field(default_factory=dict)
    """Further arguments of the chat template (`enable_thinking`), given by the row."""
    unused: tuple[str, ...] = ()
    """Fields of the row and its messages that nothing reads, described."""
    side: Side | None = None
    """What the row says of its answer, which is then the only trained part."""
    label: str | None = None
    """The label of a `labelled` row."""
    margin: float = 0.0
    """By how much the chosen side of a pair is to score above the rejected one."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it.

    input_ids: int32 [T]. weights: float32 [T]; `weights[i]` is the weight of *predicting* `input_ids[i]`, so
    `weights[0]` is always 0.
    """

    source: str
    input_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    side: Side | None = None
    """What a preference says of the answer; None in supervised fine-tuning."""
    label: str | None = None
    margin: float = 0.0

    def __len__(self) -> int:
        return len(self.input_ids)


class ExampleSet(Protocol):
    """Random access to N examples, in memory or memory-mapped; packing, batches and training read through this."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 [N]."""
        ...

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Sum of weights of each example, float64 [N]: loss_weight_n = sum_t weight_nt."""
        ...

    @property
    def sides(self) -> npt.NDArray[np.int8]:
        """The side of each example by its index in `SIDES`, -1 for none; int8 [N]."""
        ...

    @property
    def digest(self) -> str:
        """sha256 over all that trains, in order: two sets with the same digest train alike."""
        ...


def example_digest(
    input_ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    side: Side | None = None,
    *,
    label: str | None = None,
    margin: float = 0.0,
) -> bytes:
    """16-byte digest of one example: ids int32 [T], weights float32 [T]; side, label and margin where it has them.

    BLAKE2b (RFC 7693, https://www.rfc-editor.org/rfc/rfc7693).
    """
    digest = hashlib.blake2b(digest_size=16, person=(side or "").encode())
    # Little-endian on every machine, so that digests in checkpoints and caches agree.
    digest.update(input_ids.astype("<i4", copy=False).tobytes())
    digest.update(weights.astype("<f4", copy=False).tobytes())
    if label is not None or margin:
        digest.update(f"\0{label}\0{margin!r}".encode())
    return digest.digest()


def set_digest(examples: Iterable[bytes]) -> str:
    """sha256 in hex over the `example_digest`s of examples in order: the digest of every kind of `ExampleSet`.

    It does not cover the names of rows: a file that was moved or renamed is the same data.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example)
    return digest.hexdigest()


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind: their text, their weight, and whether they are control tokens."""

    text: str
    weight: float
    is_control: bool


def stretches(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Stretch]:
    """Yield an example's text in stretches of one weight and kind; together they are the text of all its tokens."""
    added = tokenizer.added_tokens_decoder.items()
    control_ids = {token_id for token_id, token in added if token.content.replace("\u2581", " ").strip()}
    pending: list[str] = []
    kind: tuple[float, bool] | None = None
    for text, weight, token in _token_texts(example, tokenizer):
        if kind != (weight, token in control_ids):
            if kind is not None:
                yield Stretch("".join(pending), *kind)
            pending, kind = [], (weight, token in control_ids)
        pending.append(text)
    if kind is not None:
        yield Stretch("".join(pending), *kind)


def _token_texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, float, int]]:
    """Yield (text, weight, id) of every token.

    A character made of several tokens is the text of its last, at the weight they share.
    """

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    ids, weights = example.input_ids.tolist(), example.weights.tolist()
    before: list[int] = []
    pending: list[int] = []
    for index, (token, weight) in enumerate(zip(ids, weights, strict=True)):
        pending.append(token)
        # A decoder may drop a leading space, so a token is decoded after the one before it.
        text = decode([*before, *pending])[len(decode(before)) :]
        # A replacement character is either half a character, which the next tokens complete, or in the text itself.
        ends = index + 1 == len(ids) or weights[index + 1] != weight or len(pending) > 8
        if text.endswith("\ufffd") and not ends:
            continue
        yield text, weight, token
        before, pending = [token] if len(pending) == 1 else pending, []
