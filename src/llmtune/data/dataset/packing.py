"""Put examples into packs. All packs are planned before step 1, so that the number of steps is exact.

Shapes: N examples, P packs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmtune.data.example import SIDES, ExampleSet
from llmtune.errors import DataError

__all__ = [
    "STRATEGIES",
    "PackingStrategy",
    "examples_together",
    "packing_efficiency",
    "plan_packs",
    "plan_sequences",
    "seeded_order",
]

PackingStrategy = Literal["none", "greedy", "first_fit", "best_fit"]
Indices = npt.NDArray[np.int64]


def seeded_order(count: int, *key: int) -> Indices:
    """Give the permutation of `range(count)` that belongs to `key`, int64 [count].

    It sorts raw 64-bit draws of PCG64, a stream that NumPy promises never to change (unlike `Generator.permutation`),
    so a key gives the same order on every machine and version. Key parts must be non-negative.

    >>> seeded_order(5, 42, 0).tolist() == seeded_order(5, 42, 0).tolist() != seeded_order(5, 42, 1).tolist()
    True
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64)


def plan_packs(
    lengths: npt.NDArray[np.int64], max_length: int, strategy: PackingStrategy, seed: int | None
) -> list[Indices]:
    """Put every example in exactly one pack of at most `max_length` tokens; an example is never split.

    `lengths`: int64 [N], tokens of each example. Returns P int64 arrays of example indices, a pure function of the
    arguments. Inside a pack, and over the packs, examples keep the seeded order (the given order when `seed` is None);
    a pack has the position of its first example.

    - `none`: one example in each pack.
    - `greedy`: fill a pack in order, close it at the first example that does not fit.
    - `first_fit`: longest example first, each into the oldest pack with room for it (first-fit decreasing).
    - `best_fit`: longest example first, each into the pack it leaves the least room in, the oldest of equals (best-fit
      decreasing).

    The "decreasing" rules need at most 11/9 of the fewest packs possible, and a constant (D. S. Johnson, "Near-optimal
    bin packing algorithms", 1973). On long-tailed lengths they waste under 1 % (as in arXiv:2404.10830).

    Raises DataError when an example is longer than `max_length` (and `strategy` is not `none`) or empty.

    >>> [pack.tolist() for pack in plan_packs(np.array([6, 5, 4, 3, 2]), 10, "best_fit", None)]
    [[0, 2], [1, 3, 4]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if strategy not in STRATEGIES:
        raise DataError(f"unknown packing `{strategy}`", where="data.packing", fix=f"one of {', '.join(STRATEGIES)}")
    refuse_unpackable(lengths, None if strategy == "none" else max_length)
    if len(lengths) == 0:
        return []
    order = np.arange(len(lengths), dtype=np.int64) if seed is None else seeded_order(len(lengths), seed)
    pack_of = STRATEGIES[strategy](lengths[order], max_length)
    return _in_order(order, pack_of)


def examples_together(examples: ExampleSet) -> int:
    """Examples that stay in one micro-batch, in order: 2 for pairs of a chosen and a rejected answer, else 1.

    Raises DataError for a set in which some rows are pairs and others are not.
    """
    in_pairs = examples.sides == SIDES.index("chosen")
    rejected = examples.sides == SIDES.index("rejected")
    if not (in_pairs | rejected).any():
        return 1
    if not (in_pairs | rejected).all():
        raise DataError(
            "some rows are pairs of answers, others single answers with a label",
            where="data.train / data.eval",
            fix="train on one kind: leave out the files of the other",
        )
    assert in_pairs[0::2].all()
    assert rejected[1::2].all()
    return 2


def plan_sequences(examples: ExampleSet, max_length: int, strategy: PackingStrategy, seed: int | None) -> list[Indices]:
    """Plan the packs of a set of examples (see `plan_packs`); the sides of a pair lie in one pack, one after the other.

    A pack of pairs holds up to twice `max_length` tokens, so that each pair has a place. Raises DataError.
    """
    together = examples_together(examples)
    lengths = np.asarray(examples.lengths, dtype=np.int64).reshape(-1, together).sum(axis=1)
    sides = np.arange(together, dtype=np.int64)
    packs = plan_packs(lengths, together * max_length, strategy, seed)
    return [(pack[:, None] * together + sides).reshape(-1) for pack in packs]


def packing_efficiency(lengths: npt.NDArray[np.int64], packs: list[Indices], max_length: int) -> float:
    """Give the fraction of all positions of P packs that hold a token, in [0, 1]; 1.0 for no packs.

    efficiency = sum(lengths) / (P max_length), with `lengths` int64 [N].
    """
    return float(np.sum(lengths) / (len(packs) * max_length)) if packs else 1.0


def refuse_unpackable(lengths: npt.NDArray[np.int64], max_length: int | None) -> None:
    """Raise DataError for the first example that is empty or longer than `max_length` tokens; `lengths`: int64 [N]."""
    empty = np.flatnonzero(lengths < 1)
    if len(empty):
        problem = f"example {empty[0]} has no tokens ({len(empty)} such examples)"
        raise DataError(problem, fix="leave out empty examples before packing")
    overlong = np.flatnonzero(lengths > max_length) if max_length is not None else empty
    if len(overlong):
        first = f"example {overlong[0]} has {lengths[overlong[0]]} tokens, a pack holds {max_length}"
        fix = "raise `data.max_length` or choose what happens to them with `data.overlong`"
        raise DataError(f"{first} ({len(overlong)} such examples)", fix=fix)


def _in_order(order: Indices, pack_of: Indices) -> list[Indices]:
    """Give the example indices of each pack, by first example: `order[i]` lies in pack `pack_of[i]`, both int64 [N]."""
    _, first, inverse = np.unique(pack_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    # A pack is numbered by its first example, so that packs keep the seeded order.
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    pack_of = rank[inverse]
    members = order[np.argsort(pack_of, kind="stable")]
    ends = np.cumsum(np.bincount(pack_of)).tolist()
    return [members[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _none(lengths: Indices, _max_length: int) -> Indices:
    return np.arange(len(lengths), dtype=np.int64)


def _greedy(lengths: Indices, max_length: int) -> Indices:
    # One search in the running sum finds the end of a pack, instead of a step for every example.
    ends = np.cumsum(lengths)
    starts: list[int] = []
    start = used = 0
    while start < len(lengths):
        starts.append(start)
        start = int(np.searchsorted(ends, used + max_length, side="right"))
        used = int(ends[start - 1])
    marks = np.zeros(len(lengths), dtype=np.int64)
    marks[starts] = 1
    return np.cumsum(marks) - 1


def _first_fit(lengths: Indices, max_length: int) -> Indices:
    """First-fit decreasing, in one NumPy sweep over the open packs for each distinct length.

    Equal lengths are interchangeable, so the oldest pack takes as many of them as fit, then the next one.
    """
    by_length = np.argsort(-lengths, kind="stable")
    shortest = int(lengths.min())
    pack_of = np.empty(len(lengths), dtype=np.int64)
    open_ids = np.empty(0, dtype=np.int64)
    open_room = np.empty(0, dtype=np.int32)
    packs = 0
    for length, begin, end in _runs(lengths[by_length]):
        takes = open_room // length  # examples of this length that each open pack has room for
        filled = np.cumsum(takes)
        placed = min(int(filled[-1]) if len(filled) else 0, end - begin)
        takes = np.minimum(takes, np.maximum(placed - (filled - takes), 0))  # no more than the run has, oldest first
        open_room = (open_room - takes * length).astype(np.int32)
        # What no open pack had room for goes into new ones, as many of this length in each as fit.
        each = max_length // length
        fresh = -(-(end - begin - placed) // each)
        fresh_takes = np.full(fresh, each, dtype=np.int64)
        if fresh:
            fresh_takes[-1] = end - begin - placed - each * (fresh - 1)
        fresh_ids = np.arange(packs, packs + fresh, dtype=np.int64)
        packs += fresh
        targets = np.concatenate([np.repeat(open_ids, takes), np.repeat(fresh_ids, fresh_takes)])
        pack_of[by_length[begin:end]] = targets
        open_ids = np.concatenate([open_ids, fresh_ids])
        open_room = np.concatenate([open_room, (max_length - fresh_takes * length).astype(np.int32)])
        still_open = open_room >= shortest  # a pack without room for any example would only slow the sweeps
        open_ids, open_room = open_ids[still_open], open_room[still_open]
    return pack_of


def _best_fit(lengths: Indices, max_length: int) -> Indices:
    """Best-fit decreasing over packs filed by the room they have left.

    `filed` has bit r set when some pack has r tokens of room, so the tightest room for a length is the lowest set bit
    from that length on. A pack that took one example of a run is still the tightest while another fits, so it takes all
    that fit at once.
    """
    by_length = np.argsort(-lengths, kind="stable")
    shortest = int(lengths.min())
    pack_of = np.empty(len(lengths), dtype=np.int64)
    packs_with_room: dict[int, list[int]] = {}
    filed = 0
    packs = 0
    for length, begin, end in _runs(lengths[by_length]):
        targets: list[int] = []
        takes: list[int] = []
        left = end - begin
        while left:
            fitting = filed >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                same_room = packs_with_room[room]
                pack = heapq.heappop(same_room)  # the oldest of equals
                if not same_room:
                    filed ^= 1 << room
            else:
                room, pack = max_length, packs
                packs += 1
            take = min(room // length, left)
            left -= take
            targets.append(pack)
            takes.append(take)
            room -= take * length
            if room >= shortest:  # no example that is left fits into less
                heapq.heappush(packs_with_room.setdefault(room, []), pack)
                filed |= 1 << room
        pack_of[by_length[begin:end]] = np.repeat(targets, takes)
    return pack_of


def _runs(sorted_lengths: Indices) -> list[tuple[int, int, int]]:
    """Give (length, begin, end) of every run of equal lengths."""
    borders = np.flatnonzero(np.diff(sorted_lengths)) + 1
    begins = [0, *borders.tolist()]
    ends = [*borders.tolist(), len(sorted_lengths)]
    return [(int(sorted_lengths[begin]), begin, end) for begin, end in zip(begins, ends, strict=True)]


STRATEGIES: dict[str, Callable[[Indices, int], Indices]] = {
    "none": _none,
    "greedy": _greedy,
    "first_fit": _first_fit,
    "best_fit": _best_fit,
}
"""Functions from lengths [N], in order, and `max_length` to the number of each example's pack [N]."""
