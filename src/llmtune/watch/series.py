"""The values of one metric over a run: gaps, smoothing, and fewer points for a drawing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Series"]


@dataclass
class Series:
    """Values of one metric by position (a step, or seconds), in rising order of position.

    A value that was not finite is NaN and is a gap of the line.
    """

    xs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.xs)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return iter(zip(self.xs, self.values, strict=True))

    def put(self, x: float, value: float | None) -> None:
        """Add a value; one at the same position replaces the earlier one, as the steps of a resumed run do.

        None and values that are not finite are gaps.
        """
        number = math.nan if value is None or not math.isfinite(value) else float(value)
        if not self.xs or x > self.xs[-1]:
            self.xs.append(x)
            self.values.append(number)
            return
        place = bisect_left(self.xs, x)
        if self.xs[place] == x:
            self.values[place] = number
        else:
            self.xs.insert(place, x)
            self.values.insert(place, number)

    def finite(self) -> Series:
        """The same without gaps."""
        kept = [(x, value) for x, value in self if not math.isnan(value)]
        return Series([x for x, _ in kept], [value for _, value in kept])

    @property
    def last(self) -> tuple[float, float] | None:
        """The newest point that is no gap."""
        for x, value in zip(reversed(self.xs), reversed(self.values), strict=True):
            if not math.isnan(value):
                return x, value
        return None

    def smoothed(self, weight: float) -> Series:
        """Exponential moving average with bias correction (Kingma & Ba 2015, arXiv:1412.6980, section 3).

        `weight` in [0, 1) is the share of the past; 0 gives the series itself. Gaps stay gaps and count for nothing.

        >>> Series([1, 2, 3], [4.0, math.nan, 2.0]).smoothed(0.5).values
        [4.0, nan, 2.6666666666666665]
        """
        average, share, values = 0.0, 1.0, []
        for value in self.values:
            if math.isnan(value):
                values.append(value)
                continue
            average, share = weight * average + (1 - weight) * value, share * weight
            values.append(average / (1 - share))
        return Series(list(self.xs), values)

    def thinned(self, most: int) -> Series:
        """At most `most` (>= 8) of its points: both ends, and of every stretch its smallest, its largest and one gap.

        >>> Series(list(range(100)), [float(x == 41) for x in range(100)]).thinned(8).finite().values
        [0.0, 1.0, 0.0, 0.0]
        """
        if len(self) <= most:
            return Series(list(self.xs), list(self.values))
        stretches = (most - 2) // 3
        kept = {0, len(self) - 1}
        for stretch in range(stretches):
            part = range(len(self) * stretch // stretches, len(self) * (stretch + 1) // stretches)
            finite = [index for index in part if not math.isnan(self.values[index])]
            if finite:
                kept |= {min(finite, key=self.values.__getitem__), max(finite, key=self.values.__getitem__)}
            if len(finite) < len(part):
                kept.add(next(index for index in part if math.isnan(self.values[index])))
        order = sorted(kept)
        return Series([self.xs[index] for index in order], [self.values[index] for index in order])

    def runs(self) -> list[Series]:
        """The parts between the gaps, each at least one point long."""
        parts: list[Series] = []
        is_open = False
        for x, value in self:
            if math.isnan(value):
                is_open = False
                continue
            if not is_open:
                parts.append(Series())
                is_open = True
            parts[-1].xs.append(x)
            parts[-1].values.append(value)
        return parts
