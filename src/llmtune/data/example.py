"""The words of the data rooms as types: row, message, conversation, example.

Shapes: T tokens of one example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Conversation", "Example", "ExampleList", "ExampleSet", "Message", "Row", "example_digest", "set_digest"]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file. `source` is `file:line`, or `file[index]` where a file has no lines."""

    source: str
    fields: Mapping[str, Any]
    loss_weight: float = 1.0
    """Weight that the row's source gives to its trained tokens (`data.train[].weight`)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `weight` is None unless the row gives one: 0 takes the message out of the loss under every `train_on` rule,
    `customized` uses it as is. `extra` holds what a chat template may read beside role and content
    (`reasoning_content`, `tool_calls`, `tool_call_id`, `name`).
    """

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row as messages. A plain-text row has no messages and only `text`; a prompt-completion row is two messages.

    `prompt_is_text` marks a prompt-completion row of plain strings that is joined as text, without a chat template.
    """

    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt_is_text: bool = False
    loss_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it.

    input_ids: int32 [T]. weights: float32 [T]; `weights[i]` is the weight of *predicting* `input_ids[i]`, so
    `weights[0]` is always 0.
    """

    source: str
    input_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.input_ids)


class ExampleSet(Protocol):
    """Random access to many examples, in memory or memory-mapped.

    Everything after `prepare` reads examples only through this.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 [N]."""
        ...

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Sum of weights of each example, float64 [N]."""
        ...

    @property
    def digest(self) -> str:
        """sha256 over all ids and weights in order: two sets with one digest train alike."""
        ...


class ExampleList:
    """An `ExampleSet` held in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, int64 [N]."""
        return np.array([len(example) for example in self._examples], dtype=np.int64)

    @property
    def loss_weights(self) -> npt.NDArray[np.float64]:
        """Sum of weights of each example, float64 [N]."""
        return np.array([example.weights.sum(dtype=np.float64) for example in self._examples], dtype=np.float64)

    @property
    def digest(self) -> str:
        """sha256 over all ids and weights in order."""
        return set_digest(example_digest(one.input_ids, one.weights) for one in self._examples)


def example_digest(input_ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> bytes:
    """16 bytes that stand for one example's ids and weights, wherever they are kept."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(input_ids.astype("<i4", copy=False).tobytes())
    digest.update(weights.astype("<f4", copy=False).tobytes())
    return digest.digest()


def set_digest(examples: Iterable[bytes]) -> str:
    """sha256 in hex over the `example_digest`s of examples in order: the digest of every kind of `ExampleSet`.

    Where the rows came from plays no part: a file that was moved or renamed is the same data.
    """
    digest = hashlib.sha256()
    for one in examples:
        digest.update(one)
    return digest.hexdigest()
