"""Lay examples out as the tensors of a micro-batch, and divide examples into micro-batches of a limited size.

Shapes: B rows of a micro-batch, T positions, S examples.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from llmtune.common.memory import copy_to
from llmtune.data.dataset.packing import Indices
from llmtune.data.example import Example, Side

__all__ = ["Layout", "MicroBatch", "MicroBatches", "even_groups", "idle_micro_batch", "make_micro_batch", "split_group"]

Layout = Literal["flat", "padded"]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward and backward on one device.

    `padded`: one example a row, padded on the right. `flat`: B is 1, the examples lie one after another without
    padding; `segments` holds where each begins and, last, where the row ends.
    """

    input_ids: torch.Tensor
    """int64 [B, T]."""
    weights: torch.Tensor
    """float32 [B, T]; `weights[b, t]` is the weight of predicting `input_ids[b, t]`.

    0 at the first token of every example and on padding.
    """
    position_ids: torch.Tensor
    """int64 [B, T]; restart at 0 with every example."""
    attention_mask: torch.Tensor | None
    """bool [B, T], true on real tokens; None where nothing is padded."""
    segments: torch.Tensor | None
    """int32 [S + 1], cumulative lengths of the examples in a flat row; None in the padded layout."""
    sources: tuple[str, ...]
    """Row of each example, `file:line`."""
    num_tokens: int
    """Real tokens, without padding."""
    num_sequences: int
    """Examples."""
    loss_weight: float
    """Sum of weights, summed in float64."""
    sides: tuple[Side | None, ...] = ()
    """Side of each example. The chosen and the rejected side of a pair follow each other."""
    indices: Indices | None = None
    """int64 [S], number of each example in its set, where the micro-batch was made from one."""

    @property
    def trained_tokens_per_example(self) -> torch.Tensor:
        """Trained tokens of each example, int64 [S], on the CPU where the micro-batch is.

        tokens_s = number of t with weight_st != 0; losses of token means divide by it (SimPO, arXiv:2405.14734).
        """
        if self.segments is None:
            return (self.weights[:, 1:] != 0).sum(dim=1)
        ends = torch.cat([self.weights.new_zeros(1, dtype=torch.int64), (self.weights[0] != 0).cumsum(0)])
        return ends[self.segments.long()].diff()

    def to(self, device: torch.device) -> MicroBatch:
        """Give the same micro-batch with its tensors on `device`, or itself when they are there."""
        if self.input_ids.device == device:
            return self
        names = ("input_ids", "weights", "position_ids", "attention_mask", "segments")
        present = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        copies: dict[str, Any] = {name: copy_to(tensor, device) for name, tensor in present.items()}
        return replace(self, **copies)


class MicroBatches(Sequence[MicroBatch]):
    """The micro-batches of one process in one window, built when indexed: a window may hold many tensors."""

    def __init__(self, groups: Sequence[Indices], build: Callable[[Indices], MicroBatch]) -> None:
        self._groups = groups
        self._build = build

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        if isinstance(index, slice):
            return MicroBatches(self._groups[index], self._build)
        return self._build(self._groups[index])


def make_micro_batch(examples: Sequence[Example], layout: Layout, pad_id: int) -> MicroBatch:
    """Lay examples out as one micro-batch; at least one example, none empty, `weights[0]` of each is 0."""
    assert examples, "a micro-batch has at least one example"
    lengths_S = np.array([len(example) for example in examples], dtype=np.int64)
    assert lengths_S.min() > 0, "an example has at least one token"
    assert all(example.weights[0] == 0 for example in examples), "the first token of an example is not predicted"
    if layout == "flat":
        ids_BT = np.concatenate([example.input_ids for example in examples])[None].astype(np.int64)
        weights_BT = np.concatenate([example.weights for example in examples])[None].astype(np.float32)
        ends_S = np.cumsum(lengths_S)
        # The row's positions less those at which each example begins.
        positions_BT = (np.arange(ends_S[-1]) - np.repeat(ends_S - lengths_S, lengths_S))[None]
        mask_BT = None
        segments = torch.from_numpy(np.concatenate([[0], ends_S]).astype(np.int32))
    else:
        rows, longest = len(examples), int(lengths_S.max())
        ids_BT = np.full((rows, longest), pad_id, dtype=np.int64)
        weights_BT = np.zeros((rows, longest), dtype=np.float32)
        for row, example in enumerate(examples):
            ids_BT[row, : len(example)] = example.input_ids
            weights_BT[row, : len(example)] = example.weights
        positions_BT = np.broadcast_to(np.arange(longest), (rows, longest)).copy()
        # Without a mask attention takes its fast causal path.
        mask_BT = None if lengths_S.min() == longest else torch.from_numpy(positions_BT < lengths_S[:, None])
        segments = None
    return MicroBatch(
        input_ids=torch.from_numpy(ids_BT),
        weights=torch.from_numpy(weights_BT),
        position_ids=torch.from_numpy(positions_BT),
        attention_mask=mask_BT,
        segments=segments,
        sources=tuple(example.source for example in examples),
        num_tokens=int(lengths_S.sum()),
        num_sequences=len(examples),
        loss_weight=float(weights_BT.sum(dtype=np.float64)),
        sides=tuple(example.side for example in examples),
    )


def idle_micro_batch(layout: Layout) -> MicroBatch:
    """A micro-batch that adds nothing, for a process that has fewer rows than the others: two tokens of weight 0."""
    token = np.zeros(2, dtype=np.int32)
    batch = make_micro_batch([Example("", token, np.zeros(2, dtype=np.float32))], layout, 0)
    none = np.empty(0, dtype=np.int64)
    return replace(batch, sources=(), num_tokens=0, num_sequences=0, sides=(), indices=none)


# --- the size of a micro-batch


def split_group(
    indices: Indices,
    lengths_N: npt.NDArray[np.int64],
    layout: Layout,
    max_group_tokens: int | None,
    *,
    together: int = 1,
) -> list[Indices]:
    """Divide examples into groups of at most `max_group_tokens` positions; a longer example is a group by itself.

    `indices`: int64, into `lengths_N`, int64 [N]. Each run of `together` examples (2: pairs) stays in one group, and
    counts as an example. Padded rows are cut in order. A flat row may hold any examples, so its groups are few and
    even, because each has fixed costs. The positions of a padded group are rows times its longest row.
    """
    if max_group_tokens is None or len(indices) == 0:
        return [indices] if len(indices) else []
    units = indices.reshape(-1, together)
    if layout == "flat":
        groups = even_groups(lengths_N[units].sum(axis=1).tolist(), max_group_tokens)
    else:
        groups = _padded_runs(lengths_N[units].max(axis=1).tolist(), max_group_tokens // together)
    return [units[group].reshape(-1) for group in groups]


def _padded_runs(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut rows, in order, where padding them to their longest would take more than `limit` positions.

    Gives groups of indices into `sizes`.
    """
    groups: list[list[int]] = [[0]]
    longest = sizes[0]
    for index, size in enumerate(sizes[1:], start=1):
        longest = max(longest, size)
        if longest * (len(groups[-1]) + 1) > limit:
            groups.append([])
            longest = size
        groups[-1].append(index)
    return groups


def even_groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Divide items of these sizes into few groups with nearly equal sums of at most `limit`.

    Gives groups of indices into `sizes`, ascending in a group. An item over `limit` is a group by itself. Starts with
    the fewest groups possible, and adds one while a sum is over the limit. Longest first, each item goes to the group
    with the smallest sum, so the largest sum is at most 4/3 of the best possible one (R. L. Graham, "Bounds on
    multiprocessing timing anomalies", 1969).
    """
    alone = [[index] for index, size in enumerate(sizes) if size > limit]
    longest_first = sorted(
        (index for index, size in enumerate(sizes) if size <= limit), key=lambda index: -sizes[index]
    )
    count = -(-sum(sizes[index] for index in longest_first) // limit)
    while (groups := _deal(longest_first, sizes, limit, count)) is None:
        count += 1
    return sorted([*alone, *groups])


def _deal(indices: Sequence[int], sizes: Sequence[int], limit: int, count: int) -> list[list[int]] | None:
    """Deal items, in this order, to `count` groups, each to the one with the smallest sum; None if one goes over."""
    # Sum first, so that the heap's top is the emptiest group; ties go to the lower number, on every machine.
    heap = [(0, number) for number in range(count)]
    groups: list[list[int]] = [[] for _ in heap]
    for index in indices:
        total, number = heap[0]
        if total + sizes[index] > limit:
            return None
        heapq.heapreplace(heap, (total + sizes[index], number))
        groups[number].append(index)
    return [sorted(group) for group in groups]
