"""The examples of every step: order, windows and micro-batches, each a pure function of its number.

Without packing, a pack is one example. A window takes the next `batch_size x accumulation` packs of the epoch's order,
however many processes share them, so the same config is the same run on one process and on many. The last window of an
epoch is smaller when the rows run out. Windows have no state: resuming at step k needs none of the steps before it.

Shapes: N examples, P packs. What metrics call a sequence (`num_sequences`) is an example, packed or not.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from llmtune.data.dataset.micro_batch import (
    Layout,
    MicroBatch,
    MicroBatches,
    idle_micro_batch,
    make_micro_batch,
    split_group,
)
from llmtune.data.dataset.mixture import EpochDraws
from llmtune.data.dataset.packing import Indices, seeded_order
from llmtune.data.example import ExampleSet
from llmtune.errors import ConfigError, DataError

__all__ = ["BatchPlan", "Window", "eval_batches"]


@dataclass(frozen=True, eq=False)
class Window:
    """The share of this process in the micro-batches of one optimizer update."""

    step: int
    """Number of the window and of its step, from 1."""
    epoch: float
    """Epochs done after this step."""
    progress: float
    """Fraction of the planned windows done after this one, in (0, 1]."""
    micro_batches: Sequence[MicroBatch]
    """Those of this process; may be empty."""
    loss_weight: float
    """Sum of weights of this process, float64."""
    num_tokens: int
    """Real tokens of this process."""
    num_sequences: int
    """Examples of this process."""
    indices: Indices
    """Numbers of this process's examples, in the order of the window; int64 [S]."""
    all_indices: Indices
    """Those of all processes, in the order of the window, which no cut into micro-batches changes; int64."""
    row_names: Callable[[], tuple[str, ...]]
    """Reads the names of the rows (see `sources`), which few steps need."""

    @property
    def rows_digest(self) -> str:
        """sha256 over the window's examples in their order, 16 hex digits: equal on any number of processes."""
        return hashlib.sha256(self.all_indices.astype("<i8").tobytes()).hexdigest()[:16]

    @property
    def sources(self) -> tuple[str, ...]:
        """Rows of the window, `file:line`, over all processes."""
        return self.row_names()


class _Span(NamedTuple):
    """The packs of a window: [begin, end) of the order of an epoch, from 0."""

    epoch: int
    begin: int
    end: int


class BatchPlan:
    """The windows of a training, by number.

    `packs`: P arrays of example indices (see `plan_packs`). `epochs` may be a fraction: the part of an epoch is rounded
    up to whole windows. `max_steps` replaces `epochs`, with as many epochs as it takes. `shuffle_seed` None keeps the
    order of `packs` in every epoch. `rank` is this process of `world_size`. `max_group_tokens` cuts micro-batches
    further where they hold more tokens (padding counted); the window stays the same. `draws` gives the packs of each
    epoch, which then are single examples (or pairs) in their order; without it an epoch has every pack once.
    `together`: examples that stay in one micro-batch, in order (2: the sides of a pair). `equal_counts`: every process
    gets as many micro-batches as the one with the most, the last of them idle ones, without rows.

    Raises DataError without any pack, ConfigError for `epochs` or `max_steps` that make no step.
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
        draws: EpochDraws | None = None,
        together: int = 1,
        equal_counts: bool = False,
    ) -> None:
        if not packs:
            fix = "look at `llmtune data report` for what became of the rows"
            raise DataError("there is no example to train on", fix=fix)
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
        self._draws = draws
        self._batch_size = batch_size
        self.world_size = world_size
        """Processes, or groups of them, among which windows are dealt."""
        self._rank = rank
        self.global_batch = batch_size * accumulation
        """Sequences of a full window, over all processes."""
        self._shuffle_seed = shuffle_seed
        self._layout: Layout = layout
        self._max_group_tokens, self._together = max_group_tokens, together
        self._equal_counts = equal_counts
        self._build = functools.partial(_build, examples, layout, pad_id)
        # All steps of an epoch use its order; two are kept for steps at the border of epochs.
        self._epoch_order = functools.lru_cache(maxsize=2)(self._make_epoch_order)
        self.steps_per_epoch = -(-self.num_packs // self.global_batch)
        """Windows in an epoch."""
        self.total_steps = _total_steps(self.steps_per_epoch, epochs, max_steps)
        """Windows in the training; steps, when none is skipped."""

    @property
    def num_packs(self) -> int:
        """Sequences in an epoch."""
        return len(self._ends) if self._draws is None else self._draws.count

    @property
    def most_window_tokens(self) -> int:
        """Upper bound of the tokens of a window in any order: those of the `global_batch` longest packs."""
        if self._draws is not None:  # which may draw the longest of them more than once
            return int(self._pack_tokens.max()) * min(self.global_batch, self.num_packs)
        return int(np.sort(self._pack_tokens)[-self.global_batch :].sum())

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the rows of a step: examples, packs, global batch and shuffle seed.

        Number of processes, micro-batch size, layout and length of the training are not part of it.
        """
        digest = hashlib.sha256(f"{self._examples.digest} {self.global_batch} {self._shuffle_seed}".encode())
        digest.update(self._members.astype("<i8").tobytes())
        digest.update(self._ends.astype("<i8").tobytes())
        if self._draws is not None:
            digest.update(self._draws.digest.encode())
        return digest.hexdigest()

    def window(self, step: int) -> Window:
        """Give the window of step number `step`, from 1 to `total_steps`."""
        assert 1 <= step <= self.total_steps, f"step {step} is not in 1..{self.total_steps}"
        span = self._span(step)
        packs = self._packs_of(span)
        groups = self._groups_of(packs, self._rank)
        idle = [_NO_ROWS] * (self._most_groups(packs) - len(groups)) if self._equal_counts else []
        mine = np.concatenate([np.empty(0, dtype=np.int64), *groups])
        return Window(
            step=step,
            epoch=span.epoch + span.end / self.num_packs,
            progress=step / self.total_steps,
            micro_batches=MicroBatches([*groups, *idle], self._build),
            loss_weight=float(np.sum(self._weights[mine])),
            num_tokens=int(np.sum(self._lengths[mine])),
            num_sequences=len(mine),
            indices=self._examples_of(self._deal(packs, self._rank)),
            all_indices=self._examples_of(packs),
            row_names=lambda: tuple(self._examples[int(index)].source for index in self._examples_of(packs)),
        )

    def groups(self, step: int) -> list[Indices]:
        """Give the example indices of each micro-batch of this process at a step, without reading a token."""
        return self._groups_of(self._packs_of(self._span(step)), self._rank)

    def _packs_of(self, span: _Span) -> Indices:
        return self._epoch_order(span.epoch)[span.begin : span.end]

    def _most_groups(self, packs: Indices) -> int:
        return max(len(self._groups_of(packs, rank)) for rank in range(self.world_size))

    def _groups_of(self, packs: Indices, rank: int) -> list[Indices]:
        return [
            group
            for batch in self._micro_batches(self._deal(packs, rank))
            for group in split_group(
                batch, self._lengths, self._layout, self._max_group_tokens, together=self._together
            )
        ]

    def windows(self, start_step: int = 0) -> Iterator[Window]:
        """Give the windows after the first `start_step`, in order."""
        for step in range(start_step + 1, self.total_steps + 1):
            yield self.window(step)

    def order(self, epoch: int) -> Indices:
        """Give the examples of an epoch (from 0) in the order in which steps take them, int64 [N]."""
        return self._examples_of(self._epoch_order(epoch))

    @property
    def draws_anew(self) -> bool:
        """Whether an epoch has other examples than the one before it."""
        return self._draws is not None

    def tokens_of_epoch(self, epoch: int = 0) -> tuple[int, float]:
        """Give the tokens of an epoch (from 0) and the sum of their weights."""
        examples = self._members if self._draws is None else self.order(epoch)
        return int(self._lengths[examples].sum()), float(self._weights[examples].sum())

    def _make_epoch_order(self, epoch: int) -> Indices:
        if self._draws is not None:
            return self._draws.order(epoch)
        if self._shuffle_seed is None:
            return np.arange(self.num_packs, dtype=np.int64)
        return seeded_order(self.num_packs, self._shuffle_seed, epoch)

    def _span(self, step: int) -> _Span:
        epoch, window = divmod(step - 1, self.steps_per_epoch)
        begin = window * self.global_batch
        return _Span(epoch, begin, min(begin + self.global_batch, self.num_packs))

    def _examples_of(self, packs: Indices) -> Indices:
        spans = zip(self._begins[packs], self._ends[packs], strict=True)
        return np.concatenate([np.empty(0, dtype=np.int64), *(self._members[begin:end] for begin, end in spans)])

    def _deal(self, packs: Indices, rank: int) -> Indices:
        """Give a process's share of a window, longest first, to and fro over the processes to even their work."""
        if self.world_size == 1:
            return packs
        by_length = np.argsort(-self._pack_tokens[packs], kind="stable")
        turn, seat = np.divmod(np.arange(len(packs)), self.world_size)
        receiver = np.where(turn % 2 == 0, seat, self.world_size - 1 - seat)
        return packs[np.sort(by_length[receiver == rank])]

    def _micro_batches(self, packs: Indices) -> list[Indices]:
        """Cut a process's packs of a window into micro-batches of `batch_size` and give the examples of each.

        Rows are padded to the longest of their micro-batch, so the padded layout puts equal lengths together.
        """
        if self._layout == "padded":
            packs = packs[np.argsort(-self._pack_tokens[packs], kind="stable")]
        return [
            self._examples_of(packs[begin : begin + self._batch_size])
            for begin in range(0, len(packs), self._batch_size)
        ]


def eval_batches(
    examples: ExampleSet,
    *,
    batch_size: int,
    layout: Layout,
    pad_id: int,
    max_group_tokens: int | None = None,
    world_size: int = 1,
    rank: int = 0,
    together: int = 1,
    equal_counts: bool = False,
) -> Iterator[MicroBatch]:
    """Give every example once, longest first, `batch_size` at a time; each process takes every `world_size`-th.

    Longest first needs the least padding, and if memory runs out, it does so at once. Each run of `together` examples
    (2: pairs) counts as one and stays in one micro-batch. `equal_counts`: as in `BatchPlan`.
    """
    lengths = np.asarray(examples.lengths, dtype=np.int64)
    units = np.argsort(-lengths.reshape(-1, together).sum(axis=1), kind="stable").astype(np.int64)
    members = units[:, None] * together + np.arange(together, dtype=np.int64)

    def groups_of(rank: int) -> list[Indices]:
        mine = members[rank::world_size]
        return [
            group
            for begin in range(0, len(mine), batch_size)
            for group in split_group(
                mine[begin : begin + batch_size].reshape(-1), lengths, layout, max_group_tokens, together=together
            )
        ]

    groups = groups_of(rank)
    most = max(len(groups_of(process)) for process in range(world_size)) if equal_counts else len(groups)
    for group in [*groups, *[_NO_ROWS] * (most - len(groups))]:
        yield _build(examples, layout, pad_id, group)


_NO_ROWS: Indices = np.empty(0, dtype=np.int64)


def _build(examples: ExampleSet, layout: Layout, pad_id: int, indices: Indices) -> MicroBatch:
    if not len(indices):
        return idle_micro_batch(layout)
    batch = make_micro_batch([examples[int(index)] for index in indices], layout, pad_id)
    return replace(batch, indices=indices)


def _total_steps(steps_per_epoch: int, epochs: float, max_steps: int | None) -> int:
    """Count the windows of a training: `max_steps`, or those of all epochs, rounded up."""
    if max_steps is not None:
        if max_steps < 1:
            fix = "at least 1, or leave it out to train for `training.epochs`"
            raise ConfigError(f"`training.max_steps` is {max_steps}", fix=fix)
        return max_steps
    exact = Fraction(str(epochs))  # the decimal that was written: 0.1 x 30 is 3 windows, not 4
    if exact <= 0:
        raise ConfigError(f"`training.epochs` is {epochs}", fix="more than 0; a fraction of an epoch is allowed")
    return math.ceil(exact * steps_per_epoch)
