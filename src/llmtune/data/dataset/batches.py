"""Which examples make which step: order, windows and micro-batches, each a pure function of its number.

A *sequence* is a pack (without packing: one example). A window takes the next `batch_size x accumulation x world_size`
sequences of the epoch's order, so its rows depend on the global batch only, not on how many processes or micro-batches
share it. The last window of an epoch is smaller when the rows run out. Nothing is kept between windows: resuming at
step k costs nothing.

Legend: B rows of a micro-batch, T positions, S examples, P sequences.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch

from llmtune.data.dataset.packing import Indices, seeded_order
from llmtune.data.example import Example, ExampleSet
from llmtune.errors import ConfigError, DataError

__all__ = [
    "BatchPlan",
    "Layout",
    "MicroBatch",
    "MicroBatches",
    "Window",
    "eval_batches",
    "even_groups",
    "make_micro_batch",
]

Layout = Literal["flat", "padded"]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward sees on one device.

    `padded`: one example a row, padded on the right. `flat`: B is 1, the examples lie one after another without
    padding; `segments` holds where each begins and, last, where the row ends.
    """

    input_ids: torch.Tensor
    """int64 [B, T]."""
    weights: torch.Tensor
    """float32 [B, T]; `weights[b, t]` is the weight of predicting `input_ids[b, t]`; 0 at every example's first token
    and on padding.
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

    def to(self, device: torch.device) -> MicroBatch:
        """Give the same micro-batch with its tensors on `device` (itself when they are there).

        Copies do not wait for the device.
        """
        if self.input_ids.device == device:
            return self
        names = ("input_ids", "weights", "position_ids", "attention_mask", "segments")
        present = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        if device.type == "cuda":
            present = {name: tensor.pin_memory() for name, tensor in present.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in present.items()})


class MicroBatches(Sequence[MicroBatch]):
    """The micro-batches of one process in one window; each is built when it is asked for."""

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


@dataclass(frozen=True, eq=False)
class Window:
    """All the micro-batches of one optimizer update that fall to this process."""

    step: int
    """Number of the step that this window makes, from 1."""
    epoch: float
    """Epochs done after this step."""
    progress: float
    """Part of the planned windows done after this one, in (0, 1]."""
    micro_batches: Sequence[MicroBatch]
    """Those of this process; may be none."""
    loss_weight: float
    """Sum of weights of this process, float64."""
    num_tokens: int
    """Real tokens of this process."""
    num_sequences: int
    """Examples of this process."""
    row_names: Callable[[], tuple[str, ...]]
    """Reads the names of the rows; see `sources`."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Rows of the window, `file:line`, over all processes."""
        return self.row_names()


class _Place(NamedTuple):
    """Where a window stands: its epoch from 0, and the sequences [begin, end) of that epoch's order."""

    epoch: int
    begin: int
    end: int


class BatchPlan:
    """The windows of a training, by number.

    `packs`: arrays of example indices, one a sequence (see `plan_packs`). `epochs` may be a fraction: the part of an
    epoch is rounded up to whole windows. `max_steps` replaces `epochs`: shorter, or as many further epochs as it takes.
    `shuffle_seed` None keeps the order of `packs` in every epoch. `rank` is this process of `world_size`.
    `max_group_tokens` cuts micro-batches further where they hold more tokens (padding counted); the window stays the
    same.

    Raises DataError when there is nothing to train on, ConfigError for a length that makes no step.
    """

    def __init__(
        self,
        examples: ExampleSet,
        packs: Sequence[Indices],
        *,
        batch_size: int,
        accumulation: int,
        epochs: float,
        max_steps: int | None,
        shuffle_seed: int | None,
        world_size: int = 1,
        rank: int = 0,
        layout: Layout = "padded",
        max_group_tokens: int | None = None,
        pad_id: int = 0,
    ) -> None:
        if not packs:
            raise DataError(
                "there is no example to train on", fix="look at `llmtune data report` for what became of the rows"
            )
        assert batch_size > 0
        assert accumulation > 0
        assert 0 <= rank < world_size
        self._examples = examples
        self._members = np.concatenate(packs).astype(np.int64)
        self._ends = np.cumsum([len(pack) for pack in packs], dtype=np.int64)
        self._begins = np.concatenate([[0], self._ends[:-1]])
        self._lengths = np.asarray(examples.lengths, dtype=np.int64)
        self._weights = np.asarray(examples.loss_weights, dtype=np.float64)
        self._pack_tokens = np.add.reduceat(self._lengths[self._members], self._begins)
        self._batch_size = batch_size
        self._world_size = world_size
        self._rank = rank
        self.global_batch = batch_size * accumulation * world_size
        """Sequences of a whole window, over all processes."""
        self._shuffle_seed = shuffle_seed
        self._layout: Layout = layout
        self._max_group_tokens = max_group_tokens
        self._build = functools.partial(_build, examples, layout, pad_id)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._make_epoch_order)
        self.steps_per_epoch = -(-len(packs) // self.global_batch)
        """Windows in a whole epoch."""
        self.total_steps = _total_steps(self.steps_per_epoch, epochs, max_steps)
        """Windows in the whole training; steps, when none is skipped."""

    @property
    def num_packs(self) -> int:
        """Sequences in an epoch."""
        return len(self._ends)

    @property
    def most_window_tokens(self) -> int:
        """Tokens that a window can have at most: those of its number of longest sequences, in whatever order an epoch
        takes them.
        """
        return int(np.sort(self._pack_tokens)[-self.global_batch :].sum())

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what decides the rows of every step: examples, packs, global batch and shuffle seed.

        Number of processes, micro-batch size, layout and length of the training have no part in it.
        """
        digest = hashlib.sha256(f"{self._examples.digest} {self.global_batch} {self._shuffle_seed}".encode())
        digest.update(self._members.astype("<i8").tobytes())
        digest.update(self._ends.astype("<i8").tobytes())
        return digest.hexdigest()

    def window(self, step: int) -> Window:
        """Give the window that makes step number `step`, from 1 to `total_steps`."""
        assert 1 <= step <= self.total_steps, f"step {step} is not in 1..{self.total_steps}"
        place = self._place(step)
        packs, groups = self._packs_and_groups(place)
        mine = np.concatenate([np.empty(0, dtype=np.int64), *groups])
        return Window(
            step=step,
            epoch=place.epoch + place.end / self.num_packs,
            progress=step / self.total_steps,
            micro_batches=MicroBatches(groups, self._build),
            loss_weight=float(np.sum(self._weights[mine])),
            num_tokens=int(np.sum(self._lengths[mine])),
            num_sequences=len(mine),
            row_names=lambda: tuple(self._examples[int(index)].source for index in self._examples_of(packs)),
        )

    def groups(self, step: int) -> list[Indices]:
        """Give the examples of each micro-batch of this process at step number `step`, as indices, without reading a
        token.
        """
        return self._packs_and_groups(self._place(step))[1]

    def _packs_and_groups(self, place: _Place) -> tuple[Indices, list[Indices]]:
        packs = self._epoch_order(place.epoch)[place.begin : place.end]
        return packs, [group for batch in self._micro_batches(self._deal(packs)) for group in self._split(batch)]

    def windows(self, start_step: int = 0) -> Iterator[Window]:
        """Give the windows after the first `start_step`, in order."""
        for step in range(start_step + 1, self.total_steps + 1):
            yield self.window(step)

    def order(self, epoch: int) -> Indices:
        """Give the examples of an epoch (from 0) in the order in which steps take them, int64 [N]."""
        return self._examples_of(self._epoch_order(epoch))

    def _make_epoch_order(self, epoch: int) -> Indices:
        if self._shuffle_seed is None:
            return np.arange(self.num_packs, dtype=np.int64)
        return seeded_order(self.num_packs, self._shuffle_seed, epoch)

    def _place(self, step: int) -> _Place:
        epoch, window = divmod(step - 1, self.steps_per_epoch)
        begin = window * self.global_batch
        return _Place(epoch, begin, min(begin + self.global_batch, self.num_packs))

    def _examples_of(self, packs: Indices) -> Indices:
        spans = zip(self._begins[packs], self._ends[packs], strict=True)
        return np.concatenate([np.empty(0, dtype=np.int64), *(self._members[begin:end] for begin, end in spans)])

    def _deal(self, packs: Indices) -> Indices:
        """Give this process its share of a window: longest first, to and fro over the processes, so that none waits
        long for another.
        """
        if self._world_size == 1:
            return packs
        by_length = np.argsort(-self._pack_tokens[packs], kind="stable")
        turn, seat = np.divmod(np.arange(len(packs)), self._world_size)
        receiver = np.where(turn % 2 == 0, seat, self._world_size - 1 - seat)
        return packs[np.sort(by_length[receiver == self._rank])]

    def _micro_batches(self, packs: Indices) -> list[Indices]:
        """Cut this process's packs of a window into micro-batches of `batch_size` and give the examples of each.

        Rows are padded to the longest of their micro-batch, so the padded layout puts equal lengths together.
        """
        if self._layout == "padded":
            packs = packs[np.argsort(-self._pack_tokens[packs], kind="stable")]
        return [
            self._examples_of(packs[begin : begin + self._batch_size])
            for begin in range(0, len(packs), self._batch_size)
        ]

    def _split(self, indices: Indices) -> list[Indices]:
        return _split_group(indices, self._lengths, self._layout, self._max_group_tokens)


def eval_batches(
    examples: ExampleSet,
    *,
    batch_size: int,
    layout: Layout,
    pad_id: int,
    max_group_tokens: int | None = None,
    world_size: int = 1,
    rank: int = 0,
) -> Iterator[MicroBatch]:
    """Give every example once, longest first, `batch_size` at a time.

    With several processes every `world_size`-th to each.

    Longest first means least padding, and memory that runs out does so at once.
    """
    lengths = np.asarray(examples.lengths, dtype=np.int64)
    mine = np.argsort(-lengths, kind="stable").astype(np.int64)[rank::world_size]
    for begin in range(0, len(mine), batch_size):
        for group in _split_group(mine[begin : begin + batch_size], lengths, layout, max_group_tokens):
            yield _build(examples, layout, pad_id, group)


def make_micro_batch(examples: Sequence[Example], layout: Layout, pad_id: int) -> MicroBatch:
    """Lay examples out as one micro-batch; at least one example, none empty, `weights[0]` of each is 0."""
    assert examples, "a micro-batch has at least one example"
    lengths = np.array([len(example) for example in examples], dtype=np.int64)
    assert lengths.min() > 0, "an example has at least one token"
    assert all(example.weights[0] == 0 for example in examples), "the first token of an example is not predicted"
    if layout == "flat":
        ids_BT = np.concatenate([example.input_ids for example in examples])[None].astype(np.int64)
        weights_BT = np.concatenate([example.weights for example in examples])[None].astype(np.float32)
        ends = np.cumsum(lengths)
        positions_BT = (np.arange(ends[-1]) - np.repeat(ends - lengths, lengths))[None]
        mask_BT = None
        segments = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    else:
        rows, longest = len(examples), int(lengths.max())
        ids_BT = np.full((rows, longest), pad_id, dtype=np.int64)
        weights_BT = np.zeros((rows, longest), dtype=np.float32)
        for row, example in enumerate(examples):
            ids_BT[row, : len(example)] = example.input_ids
            weights_BT[row, : len(example)] = example.weights
        positions_BT = np.broadcast_to(np.arange(longest), (rows, longest)).copy()
        mask_BT = None if lengths.min() == longest else torch.from_numpy(positions_BT < lengths[:, None])
        segments = None
    return MicroBatch(
        input_ids=torch.from_numpy(ids_BT),
        weights=torch.from_numpy(weights_BT),
        position_ids=torch.from_numpy(positions_BT),
        attention_mask=mask_BT,
        segments=segments,
        sources=tuple(example.source for example in examples),
        num_tokens=int(lengths.sum()),
        num_sequences=len(examples),
        loss_weight=float(weights_BT.sum(dtype=np.float64)),
    )


def _build(examples: ExampleSet, layout: Layout, pad_id: int, indices: Indices) -> MicroBatch:
    return make_micro_batch([examples[int(index)] for index in indices], layout, pad_id)


def _split_group(
    indices: Indices, lengths: npt.NDArray[np.int64], layout: Layout, max_group_tokens: int | None
) -> list[Indices]:
    """Cut examples into groups that take at most `max_group_tokens` positions.

    One longer example is a group of its own.

    Padded rows are cut in order. A flat row may hold any examples, so its groups are few and even: each has its fixed
    costs.
    """
    if max_group_tokens is None or len(indices) == 0:
        return [indices] if len(indices) else []
    places = (even_groups if layout == "flat" else _padded_runs)(lengths[indices].tolist(), max_group_tokens)
    return [indices[group] for group in places]


def _padded_runs(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut rows, in order, where padding them to their longest would take more than `limit` positions.

    Gives places in `sizes`.
    """
    groups: list[list[int]] = [[0]]
    longest = sizes[0]
    for place, size in enumerate(sizes[1:], start=1):
        longest = max(longest, size)
        if longest * (len(groups[-1]) + 1) > limit:
            groups.append([])
            longest = size
        groups[-1].append(place)
    return groups


def even_groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Put things of these sizes into few groups with nearly equal sums.

    Gives places in `sizes`, those of a group in order.

    A group's sum is at most `limit`; what is larger by itself is a group of its own. From the fewest groups there can
    be: longest first, each to the group that holds least (at most 4/3 of the best largest sum: R. L. Graham, 1969);
    while one is too full, with a group more.
    """
    alone = [[place] for place, size in enumerate(sizes) if size > limit]
    longest_first = sorted(
        (place for place, size in enumerate(sizes) if size <= limit), key=lambda place: -sizes[place]
    )
    count = -(-sum(sizes[place] for place in longest_first) // limit)
    while (groups := _dealt(longest_first, sizes, limit, count)) is None:
        count += 1
    return sorted([*alone, *groups])


def _dealt(places: Sequence[int], sizes: Sequence[int], limit: int, count: int) -> list[list[int]] | None:
    """Deal places, in this order, to `count` groups, each to the one that holds least.

    None when one would hold more than `limit`.
    """
    heap = [(0, number) for number in range(count)]
    groups: list[list[int]] = [[] for _ in heap]
    for place in places:
        held, number = heap[0]
        if held + sizes[place] > limit:
            return None
        heapq.heapreplace(heap, (held + sizes[place], number))
        groups[number].append(place)
    return [sorted(group) for group in groups]


def _total_steps(steps_per_epoch: int, epochs: float, max_steps: int | None) -> int:
    """Count the windows of a training: `max_steps`, or those of the whole epochs and of the rest, rounded up."""
    if max_steps is not None:
        if max_steps < 1:
            raise ConfigError(
                f"`training.max_steps` is {max_steps}", fix="at least 1, or leave it out to train for `training.epochs`"
            )
        return max_steps
    exact = Fraction(str(epochs))  # the decimal that was written: 0.1 x 30 is 3 windows, not 4
    if exact <= 0:
        raise ConfigError(f"`training.epochs` is {epochs}", fix="more than 0; a fraction of an epoch is allowed")
    return math.ceil(exact * steps_per_epoch)
