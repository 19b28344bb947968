"""Disk space: forecast before step 1; and saves that may fail without ending the run (P7)."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

from llmtune import durable
from llmtune.common.environment import home_expanded
from llmtune.common.text import printable, readable_bytes
from llmtune.config.schema import Config
from llmtune.engine.schedule import interval
from llmtune.errors import MachineError, Problem

__all__ = ["DiskForecast", "SaveAttempts", "forecast_disk", "free_bytes_at"]

_T = TypeVar("_T")

_MARGIN_BYTES = 64 << 20
"""For metrics, samples, TensorBoard's files, manifests, and partly filled blocks."""

# Errors a disk may recover from while the run goes on.
_TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT}


class DiskForecast(NamedTuple):
    """The bytes a run needs on its disk at the worst moment, and the free ones."""

    needed_bytes: int
    free_bytes: int
    parts: dict[str, int]
    """Bytes of each part of `needed_bytes`."""

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable_bytes(count)}" for name, count in self.parts.items())
        return f"{readable_bytes(self.needed_bytes)} of {readable_bytes(self.free_bytes)} free ({parts})"


def free_bytes_at(folder: Path | str) -> int:
    """Return the bytes this user may still write on the disk of `folder`, which need not exist yet.

    Raises MachineError.
    """
    folder = Path(folder).absolute()
    # The system answers only for a folder that exists; the new one will be on the same disk.
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with durable.translate_os_errors("ask for the free space of", nearest):
        status = os.statvfs(nearest)
    return status.f_bavail * status.f_frsize  # not f_bfree, part of which is reserved for root


def forecast_disk(
    config: Config,
    *,
    weights_bytes: int,
    optimizer_bytes: int,
    total_steps: int,
    steps_per_epoch: int,
    has_heldout: bool,
    free_bytes: int | None = None,
) -> DiskForecast:
    """Return the disk space that the run of `config` needs. Raises MachineError where `run.output_dir` has less.

    At the worst moment there are the kept checkpoints and the one being written (`checkpoint.keep_last` + 1, or all of
    them when 0), the best model twice (while it is replaced) and the final one. The error has the numbers and what to
    change.

    weights_bytes: the trained weights, as one checkpoint holds them.
    optimizer_bytes: the state of the optimizer.
    has_heldout: whether there are held-out rows, without which no model is the best.
    free_bytes: measured at `run.output_dir` when None.
    """
    keep_last, folder = config.checkpoint.keep_last, config.run.output_dir
    every = interval(
        config.checkpoint.every_steps,
        config.checkpoint.every_epochs,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )
    saves = math.ceil(Fraction(total_steps) / (every or steps_per_epoch))
    checkpoints = saves if keep_last == 0 else min(saves, keep_last + 1)
    parts = {
        f"{checkpoints} checkpoints": checkpoints * (weights_bytes + optimizer_bytes),
        "best": 2 * weights_bytes if config.checkpoint.keep_best and has_heldout else 0,
        "final": weights_bytes,
        "logs": _MARGIN_BYTES,
    }
    free = free_bytes_at(home_expanded(folder)) if free_bytes is None else free_bytes
    forecast = DiskForecast(sum(parts.values()), free, {name: count for name, count in parts.items() if count})
    if forecast.needed_bytes > free:
        fewer = "checkpoint.keep_last=1" if keep_last != 1 else "checkpoint.keep_best=false"
        missing = readable_bytes(forecast.needed_bytes - free)
        raise MachineError(
            f"the disk is too small for this run: {forecast}",
            where=printable(folder),
            fix=f"free {missing}, choose run.output_dir on another disk, or keep less ({fewer})",
        )
    return forecast


class SaveAttempts:
    """Saves that may fail: tried again at once, then passed over until `raise_if_failed`, at the end of the run."""

    def __init__(self, clean_up: Callable[[], object]) -> None:
        """`clean_up` removes the leftovers of a failed save."""
        self._clean_up = clean_up
        self._failures: dict[str, MachineError] = {}
        self.failure: MachineError | None = None
        """The error of the newest save; None when it worked."""

    def save(self, save: Callable[[], _T], *, subject: str = "checkpoint") -> _T | None:
        """Call `save` and return its result, or None when the machine refused every attempt (see `failure`).

        Only errors a disk may recover from are tried again or passed over (full, input/output error, read-only); any
        other is raised. A later success makes up only for failures of the same `subject`.
        """
        # Twice, because the first attempt may have failed on space that its own leftovers take.
        for _ in range(2):
            try:
                result = save()
            except MachineError as error:
                if durable.errno_of(error) not in _TRANSIENT:
                    raise
                self.failure = self._failures[subject] = error
                try:
                    self._clean_up()
                except MachineError as second:
                    error.add_note(str(second))
            else:
                self.failure = None
                # A checkpoint that was saved says nothing about a best model that was not.
                self._failures.pop(subject, None)
                return result
        return None

    def raise_if_failed(self) -> None:
        """Raise one MachineError (exit 6) for every subject whose newest save failed."""
        if self._failures:
            raise MachineError.all(
                Problem(
                    f"the last save of the {subject} failed, {error.problems[0].problem}; the one before it stands",
                    *error.problems[0][1:],
                )
                for subject, error in self._failures.items()
            ) from next(iter(self._failures.values()))
