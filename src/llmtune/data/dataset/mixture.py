"""How often each source is seen in an epoch: `repeat` and `share` of the sources become rows drawn for each epoch.

Source i has n_i examples, of which an epoch has k_i:

    repeat r    k_i = r * n_i, rounded, and at least 1
    share s     k_i = s * N, rounded down or up, such that all k_i add up to N

N is the number of examples in an epoch. With R examples of the sources without a share and shares that add up to S < 1,
N = R / (1 - S), rounded. Where every source has a share, N is the number of all examples. A row that
`data.overlong: split` has cut counts as its pieces; a pair of answers is one example here.

The examples of a source are read in passes, each in an order of its own. Epoch e, from 0, takes those at positions
e * k_i to (e + 1) * k_i of its passes: a pure function of e, so a resumed run needs nothing of the epochs before. After
any number of epochs, two examples of a source have been seen equally often or once more.

Shapes: N examples of an epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from llmtune.common.decisions import Decision
from llmtune.config.schema import DataConfig, SourceConfig
from llmtune.data.dataset.packing import Indices, examples_together, plan_packs, seeded_order
from llmtune.data.dataset.store import MappedExamples
from llmtune.errors import DataError, Problem

__all__ = ["EpochDraws", "Mixture", "epoch_counts", "mixture_of", "plan_epochs"]

_PASS = 1
"""Last part of the key of a pass. NumPy fills keys of less than four parts up with zeros, so it is the fifth."""

MOST_REPEATS = 1000
"""An epoch has at most this many times the examples of its sources: a share near 1 beside a large source has no end."""


class EpochDraws:
    """The examples of every epoch: `counts[i]` of those in `groups[i]`, in an order by `seed` (None: as they stand)."""

    def __init__(self, groups: Sequence[Indices], counts: Sequence[int], seed: int | None) -> None:
        self._groups = [np.asarray(group, dtype=np.int64) for group in groups]
        self._counts = tuple(counts)
        self._seed = seed
        self.count = sum(counts)
        """Examples in an epoch."""

    def order(self, epoch: int) -> Indices:
        """Give the examples of an epoch (from 0) in the order in which steps take them, int64 [N]."""
        drawn = [self._drawn(place, epoch) for place in range(len(self._groups))]
        examples = np.concatenate([np.empty(0, dtype=np.int64), *drawn])
        return examples if self._seed is None else examples[seeded_order(self.count, self._seed, epoch)]

    def _drawn(self, place: int, epoch: int) -> Indices:
        group, count = self._groups[place], self._counts[place]
        if not count:
            return group[:0]
        begin, end = epoch * count, (epoch + 1) * count
        first = begin // len(group)
        passes = [self._pass(place, number) for number in range(first, -(-end // len(group)))]
        start = begin - first * len(group)
        return np.concatenate(passes)[start : start + count]

    def _pass(self, place: int, number: int) -> Indices:
        group = self._groups[place]
        return group if self._seed is None else group[seeded_order(len(group), self._seed, place, number, 0, _PASS)]

    @property
    def digest(self) -> str:
        """sha256 over everything that decides the draws."""
        digest = hashlib.sha256(f"{self._counts} {self._seed}".encode())
        for group in self._groups:
            digest.update(f"{len(group)} ".encode() + group.astype("<i8").tobytes())
        return digest.hexdigest()


class Mixture(NamedTuple):
    """The examples of each source, by their place in the config, and how many of them an epoch has."""

    groups: tuple[Indices, ...]
    counts: tuple[int, ...]

    def decisions(self, sources: Sequence[SourceConfig]) -> Iterator[Decision]:
        """What an epoch has of each source, with the reason."""
        total = sum(self.counts)
        for place, (group, count, source) in enumerate(zip(self.groups, self.counts, sources, strict=True)):
            drawn = f"; {count / total:.2%} of an epoch of {total:,}" if total else ""
            kept = "no `share` of its own" if source.repeat == 1 else f"`repeat: {source.repeat:g}`"
            reason = f"{kept if source.share is None else f'`share: {source.share:g}`'}{drawn}"
            yield Decision(f"data.train[{place}]", f"{count:,} of {len(group):,} examples an epoch", reason)


def mixture_of(examples: MappedExamples, sources: Sequence[SourceConfig]) -> Mixture:
    """How the examples (a pair of answers is one) are mixed.

    Raises DataError (see `epoch_counts`), also for a source of which its share is not one example.
    """
    source_of_example = examples.sources[:: examples_together(examples)]
    groups = tuple(np.flatnonzero(source_of_example == place).astype(np.int64) for place in range(len(sources)))
    counts = epoch_counts([len(group) for group in groups], sources)
    unseen = [
        place for place, (group, count) in enumerate(zip(groups, counts, strict=True)) if len(group) and not count
    ]
    if unseen:
        fix = f"give it a share of at least {1 / sum(counts):.2g}, or take the source out"
        problem = "`share: {:g}` of an epoch of {:,} is no row"
        raise DataError.all(
            Problem(problem.format(sources[place].share, sum(counts)), f"data.train[{place}]", fix) for place in unseen
        )
    return Mixture(groups, tuple(counts))


def epoch_counts(sizes: Sequence[int], sources: Sequence[SourceConfig]) -> list[int]:
    """The examples of each source in an epoch; `sizes` are the examples that each has.

    Raises DataError for a source with a share but without examples, shares beside no other examples, and an epoch of
    more than `MOST_REPEATS` times all examples.

    >>> halves = [SourceConfig("a", share=0.5), SourceConfig("b")]
    >>> epoch_counts([3, 40], halves), epoch_counts([3, 40], [SourceConfig("a", repeat=2.5), SourceConfig("b")])
    ([40, 40], [8, 40])
    """
    repeated_counts = [
        None if source.share is not None else max(_rounded(size * Fraction(str(source.repeat))), min(size, 1))
        for size, source in zip(sizes, sources, strict=True)
    ]
    shares = [None if source.share is None else Fraction(str(source.share)) for source in sources]
    total_share = sum(share for share in shares if share is not None)
    rest = sum(count for count in repeated_counts if count is not None)
    if not total_share:
        return [count or 0 for count in repeated_counts]
    _refuse_empty(sizes, sources, rest if None in shares else 1)
    if None in shares:
        total = _rounded(rest / (1 - total_share))
    else:
        total = sum(sizes)
        shares = [share / total_share for share in shares if share is not None]  # they may add up to 1 by rounding only
    if total > MOST_REPEATS * sum(sizes):
        problem = f"an epoch would have {total:,} rows, {total / sum(sizes):,.0f} times all there are"
        raise DataError(problem, "data.train", "lower the shares")
    quotas = [None if share is None else share * total for share in shares]
    drawn = iter(_apportion([quota for quota in quotas if quota is not None], total - (rest if None in shares else 0)))
    return [next(drawn) if count is None else count for count in repeated_counts]


def _rounded(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def _apportion(quotas: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each its quota rounded down or up: the largest remainders are rounded up.

    The method of Hamilton; a quota that is whole may be rounded up where `total` is more than all quotas together.
    """
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda place: (counts[place] - quotas[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def _refuse_empty(sizes: Sequence[int], sources: Sequence[SourceConfig], rest: int) -> None:
    problems = [
        Problem(
            f"no row is left of {source.path!r}, of which a share is to be drawn",
            f"data.train[{place}]",
            "look at `llmtune data report`, or take the source out",
        )
        for place, (size, source) in enumerate(zip(sizes, sources, strict=True))
        if source.share is not None and not size
    ]
    if not rest:
        problem = "no row is left of the sources without a `share`, which make up the rest of an epoch"
        problems.append(Problem(problem, "data.train", "look at `llmtune data report`, or give every source a share"))
    if problems:
        raise DataError.all(problems)


def plan_epochs(examples: MappedExamples, data: DataConfig) -> tuple[list[Indices], EpochDraws | None]:
    """The packs of an epoch, and what draws their order anew each epoch where they are not the same in all of them.

    Without a `share`, and with whole numbers of `repeat`, an epoch is every example as often as it is repeated, laid
    into packs once. Raises DataError (see `epoch_counts`, `plan_packs`).
    """
    mixture = mixture_of(examples, data.train)
    together = examples_together(examples)
    sequences = np.arange(len(examples), dtype=np.int64).reshape(-1, together)
    members = repeated(mixture.groups, mixture.counts)
    if members is not None:
        lengths = examples.lengths.reshape(-1, together).sum(axis=1)[members]
        packs = plan_packs(lengths, together * data.max_length, data.packing, data.shuffle_seed)
        return [sequences[members[pack]].reshape(-1) for pack in packs], None
    assert data.packing == "none", "rows that are drawn anew are not packed: the config is checked"
    return list(sequences), EpochDraws(mixture.groups, mixture.counts, data.shuffle_seed)


def repeated(groups: Sequence[Indices], counts: Sequence[int]) -> Indices | None:
    """Every example as often as an epoch has it, int64 [N], where that is the same in all epochs; None where it is not.

    Then each count is a multiple of the examples of its source.
    """
    if any(count % len(group) if len(group) else count for group, count in zip(groups, counts, strict=True)):
        return None
    pieces = [np.tile(group, count // len(group)) for group, count in zip(groups, counts, strict=True) if len(group)]
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])
