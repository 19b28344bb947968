"""Room on the disk: forecast before step 1, and saves that fail without costing the run (P7)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from llmtune import durable
from llmtune.common.bytes import readable_bytes
from llmtune.common.text import printable
from llmtune.errors import MachineError, Problem

__all__ = ["DiskForecast", "SaveAttempts", "forecast_disk", "free_bytes_at"]

_T = TypeVar("_T")

# Metrics, samples, TensorBoard's files, manifests, and blocks that are only partly filled.
_MARGIN_BYTES = 64 << 20
_TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT}


class DiskForecast(NamedTuple):
    """What a run will take on its disk at the worst moment, and what is free there, in bytes."""

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
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    with durable.translate_os_errors("ask for the free space of", nearest):
        status = os.statvfs(nearest)
    return status.f_bavail * status.f_frsize


def forecast_disk(
    folder: Path | str,
    *,
    checkpoint_bytes: int,
    saves: int,
    keep_last: int,
    best_bytes: int = 0,
    final_bytes: int = 0,
    existing_bytes: int = 0,
    free_bytes: int | None = None,
) -> DiskForecast:
    """Say what the run will need on the disk of `folder`, and refuse to begin when that is not there.

    At the worst moment there are the kept checkpoints and the one being written (`keep_last` + 1, or all `saves` when
    0), the best model twice (while it is replaced) and the final one. `existing_bytes` of the run itself count as free.
    Raises MachineError with the numbers and what to change.
    """
    kept = saves if keep_last == 0 else min(saves, keep_last + 1)
    parts = {
        f"{kept} checkpoints": kept * checkpoint_bytes,
        "best": 2 * best_bytes,
        "final": final_bytes,
        "logs": _MARGIN_BYTES,
    }
    free = (free_bytes_at(folder) if free_bytes is None else free_bytes) + existing_bytes
    forecast = DiskForecast(sum(parts.values()), free, {name: count for name, count in parts.items() if count})
    if forecast.needed_bytes > free:
        fewer = "checkpoint.keep_last=1" if keep_last != 1 else "checkpoint.keep_best=false"
        raise MachineError(
            f"the disk is too small for this run: {forecast}",
            where=printable(folder),
            fix=f"free {readable_bytes(forecast.needed_bytes - free)}, choose run.output_dir on another disk, or keep less ({fewer})",
        )
    return forecast


class SaveAttempts:
    """Saves that may fail: tried again at once, then passed over; `finish` says whether the run is safe in the end."""

    def __init__(self, sweep: Callable[[], object], *, attempts: int = 2) -> None:
        """`sweep` clears what a failed save could not remove; each save is tried `attempts` times."""
        self._sweep = sweep
        self._attempts = attempts
        self._failures: dict[str, MachineError] = {}
        self.failure: MachineError | None = None
        """Why the save tried last failed; None when it worked, or when none was tried."""

    def save(self, save: Callable[[], _T], *, what: str = "checkpoint") -> _T | None:
        """Call `save` and return its result, or None when the machine refused every attempt (`failure` says why).

        Only what a disk may recover from is tried again or passed over (full, input/output error, read-only); any other
        error is raised. A later success makes up only for failures of the same `what`.
        """
        for _ in range(self._attempts):
            try:
                result = save()
            except MachineError as error:
                if durable.errno_of(error) not in _TRANSIENT:
                    raise
                self.failure = self._failures[what] = error
                self._clear(error)
            else:
                self.failure = None
                self._failures.pop(what, None)
                return result
        return None

    def _clear(self, failure: MachineError) -> None:
        try:
            self._sweep()
        except MachineError as error:
            failure.add_note(str(error))

    def finish(self) -> None:
        """Raise one MachineError (exit 6) for every kind of save whose last attempt failed."""
        if self._failures:
            raise MachineError.all(
                Problem(
                    f"the last save of the {what} failed, {one.problems[0].problem}; the one before it stands",
                    *one.problems[0][1:],
                )
                for what, one in self._failures.items()
            ) from next(iter(self._failures.values()))
