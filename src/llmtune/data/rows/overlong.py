"""What happens to an example longer than `data.max_length`, token by token.

Shapes: T tokens of the example, L = max_length.

| policy | pieces | an answer that is cut |
| --- | --- | --- |
| `drop` | none | - |
| `truncate_right` | the first L tokens | keeps its end token: its last kept token makes room for it |
| `truncate_left` | the last L tokens, after the BOS token if the row begins with one | loses its beginning, never its end |
| `split` | consecutive pieces of at most L tokens, each beginning with the last token of the one before | goes on in the next piece |

No token is ever predicted from nothing: the first token of a piece has weight 0. In `split` it is the one that the
piece before has trained already, so every trained token is trained exactly once; pieces without a trained token are
left out. `error` keeps nothing, like `drop`; the caller refuses to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmtune.data.rendering.row_warnings import RowWarning

__all__ = ["OVERLONG", "Cut", "cut_example"]

Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
Piece = tuple[Ids, Weights]

END_LOST = RowWarning("end-lost", "an answer lost its end token in the cut")


class Cut(NamedTuple):
    """What is left of an over-long example: its pieces, how many of its tokens are in none of them, and what has to be
    said about it.
    """

    pieces: list[Piece]
    tokens_lost: int
    notes: tuple[RowWarning, ...] = ()


def cut_example(
    ids_T: Ids,
    weights_T: Weights,
    *,
    max_length: int,
    policy: str,
    end_token_ids: Collection[int],
    bos_token_id: int | None,
) -> Cut:
    """Cut an example of more than `max_length` (at least 2) tokens; where no trained token would be left, nothing is.

    >>> ids, weights = np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], dtype=np.float32)
    >>> cut = cut_example(ids, weights, max_length=4, policy="truncate_right", end_token_ids=[5], bos_token_id=None)
    >>> cut.pieces[0][0].tolist(), cut.tokens_lost
    ([0, 1, 2, 5], 2)
    """
    assert len(ids_T) > max_length >= 2
    cut = OVERLONG[policy](ids_T, weights_T, max_length, end_token_ids, bos_token_id)
    return cut if any(weights.any() for _, weights in cut.pieces) else Cut([], len(ids_T), cut.notes)


def _drop(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del weights, length, ends, bos
    return Cut([], len(ids))


def _right(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del bos
    kept_ids, kept_weights = ids[:length].copy(), weights[:length].copy()
    if weights[length - 1] > 0 and weights[length] > 0:  # the cut goes through a trained span
        after = np.flatnonzero(weights[length:] == 0)
        end = (length + int(after[0]) if len(after) else len(ids)) - 1
        if int(ids[end]) in ends:
            kept_ids[-1], kept_weights[-1] = ids[end], weights[end]
        elif int(kept_ids[-1]) not in ends:
            return Cut([(kept_ids, kept_weights)], len(ids) - length, (END_LOST,))
    return Cut([(kept_ids, kept_weights)], len(ids) - length)


def _left(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del ends
    keep_bos = bos is not None and int(ids[0]) == bos
    start = len(ids) - length + keep_bos
    kept_ids = np.concatenate([ids[:keep_bos], ids[start:]])
    kept_weights = np.concatenate([weights[:keep_bos], weights[start:]])
    kept_weights[0] = 0
    return Cut([(kept_ids, kept_weights)], len(ids) - length)


def _split(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del ends, bos
    pieces = []
    covered = np.zeros(len(ids), dtype=bool)
    for start in range(0, len(ids) - 1, length - 1):
        piece_weights = weights[start : start + length].copy()
        piece_weights[0] = 0
        if piece_weights.any():
            pieces.append((ids[start : start + length], piece_weights))
            covered[start : start + length] = True
    return Cut(pieces, int(len(ids) - covered.sum()))


OVERLONG: dict[str, Callable[[Ids, Weights, int, Collection[int], int | None], Cut]] = {
    "error": _drop,
    "drop": _drop,
    "truncate_right": _right,
    "truncate_left": _left,
    "split": _split,
}
