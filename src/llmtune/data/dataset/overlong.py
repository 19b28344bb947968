"""Cut an example longer than `data.max_length`, token by token.

Shapes: T tokens of the example, L = max_length.

| policy | pieces | an answer that is cut |
| --- | --- | --- |
| `drop` | none | - |
| `truncate_right` | the first L tokens | keeps its end token, in the place of its last token |
| `truncate_left` | the last L tokens, after the row's BOS token if any | loses its beginning, never its end |
| `split` | runs of at most L tokens, each begins with the last token of the one before | continues in the next piece |

The first token of a piece has weight 0, because nothing precedes it to predict it from. In `split` that token was
trained in the piece before, so every trained token is trained exactly once. Pieces without a trained token are left
out. `error` cuts like `drop`; the caller stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmtune.data.example import Side
from llmtune.data.rendering.row_warnings import RowWarning

__all__ = ["OVERLONG", "RAISE_LENGTH", "Cut", "cut_example", "cut_sides", "overlong_ways"]

Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
Piece = tuple[Ids, Weights]

END_LOST = RowWarning("end-lost", "an answer lost its end token in the cut")


class Cut(NamedTuple):
    """The pieces of an over-long example, the number of its tokens that are in none of them, and warnings."""

    pieces: list[Piece]
    tokens_lost: int
    warnings: tuple[RowWarning, ...] = ()


def cut_example(
    ids_T: Ids,
    weights_T: Weights,
    *,
    max_length: int,
    policy: str,
    end_token_ids: Collection[int],
    bos_token_id: int | None,
) -> Cut:
    """Cut an example of more than `max_length` (at least 2) tokens: ids int32 [T], weights float32 [T].

    Gives no piece at all where no trained token would be left.

    >>> ids, weights = np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], dtype=np.float32)
    >>> cut = cut_example(ids, weights, max_length=4, policy="truncate_right", end_token_ids=[5], bos_token_id=None)
    >>> cut.pieces[0][0].tolist(), cut.tokens_lost
    ([0, 1, 2, 5], 2)
    """
    assert len(ids_T) > max_length >= 2
    cut = OVERLONG[policy](ids_T, weights_T, max_length, end_token_ids, bos_token_id)
    return cut if any(weights.any() for _, weights in cut.pieces) else Cut([], len(ids_T), cut.warnings)


def cut_sides(
    sides: Sequence[Piece],
    *,
    max_length: int,
    policy: str,
    end_token_ids: Collection[int],
    bos_token_id: int | None,
) -> Cut:
    """Cut answers to one prompt, of which one or more have over `max_length` tokens; the prompt stays the same in all.

    `truncate_right` cuts each side by itself, `truncate_left` takes the same tokens off each prompt. Gives no piece at
    all where a side would have no trained token, a prompt would be lost whole, or all sides would become equal.
    """
    excess = max(len(ids) for ids, _ in sides) - max_length
    cuts = []
    for ids, weights in sides:
        length = len(ids) - excess if policy == "truncate_left" else max_length
        if length < 2 or (policy == "truncate_left" and weights[: excess + 1].any()):
            return Cut([], sum(len(ids) for ids, _ in sides))
        if len(ids) <= length:
            cuts.append(Cut([(ids, weights)], 0))
            continue
        cuts.append(
            cut_example(
                ids,
                weights,
                max_length=length,
                policy=policy,
                end_token_ids=end_token_ids,
                bos_token_id=bos_token_id,
            )
        )
    pieces = [piece for cut in cuts for piece in cut.pieces]
    is_equal = len(pieces) > 1 and all(np.array_equal(pieces[0][0], ids) for ids, _ in pieces[1:])
    if len(pieces) < len(sides) or is_equal:
        return Cut([], sum(len(ids) for ids, _ in sides))
    warnings = tuple(dict.fromkeys(warning for cut in cuts for warning in cut.warnings))
    return Cut(pieces, sum(cut.tokens_lost for cut in cuts), warnings)


def _drop(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del weights, length, ends, bos
    return Cut([], len(ids))


def _truncate_right(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del bos
    left_ids, left_weights = ids[:length].copy(), weights[:length].copy()
    if weights[length - 1] > 0 and weights[length] > 0:  # the cut goes through a trained span
        untrained = np.flatnonzero(weights[length:] == 0)
        end = (length + int(untrained[0]) if len(untrained) else len(ids)) - 1
        if int(ids[end]) in ends:
            # A model trained on answers without their end token would not learn to stop.
            left_ids[-1], left_weights[-1] = ids[end], weights[end]
        elif int(left_ids[-1]) not in ends:
            return Cut([(left_ids, left_weights)], len(ids) - length, (END_LOST,))
    return Cut([(left_ids, left_weights)], len(ids) - length)


def _truncate_left(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del ends
    keeps_bos = bos is not None and int(ids[0]) == bos
    start = len(ids) - length + keeps_bos
    right_ids = np.concatenate([ids[:keeps_bos], ids[start:]])
    right_weights = np.concatenate([weights[:keeps_bos], weights[start:]])
    right_weights[0] = 0
    return Cut([(right_ids, right_weights)], len(ids) - length)


def _split(ids: Ids, weights: Weights, length: int, ends: Collection[int], bos: int | None) -> Cut:
    del ends, bos
    pieces = []
    covered = np.zeros(len(ids), dtype=bool)
    for start in range(0, len(ids) - 1, length - 1):  # pieces share one token, so the stride is one less
        piece_weights = weights[start : start + length].copy()
        piece_weights[0] = 0
        if piece_weights.any():
            pieces.append((ids[start : start + length], piece_weights))
            covered[start : start + length] = True
    return Cut(pieces, int(len(ids) - covered.sum()))


OVERLONG: dict[str, Callable[[Ids, Weights, int, Collection[int], int | None], Cut]] = {
    "error": _drop,
    "drop": _drop,
    "truncate_right": _truncate_right,
    "truncate_left": _truncate_left,
    "split": _split,
}
"""Cutting functions by `data.overlong`."""

RAISE_LENGTH = "raise `data.max_length`, or "
"""Begins what to do about a row that is too long."""


def overlong_ways(side: Side | None) -> str:
    """The values of `data.overlong` that serve rows of a side: prompts are never cut, judged answers never split."""
    if side == "prompt":
        return "drop"
    return "drop, truncate_right, truncate_left or split" if side is None else "drop, truncate_right or truncate_left"
