"""How often pictures of a run at work are drawn: the run needs the processors."""

from __future__ import annotations

from llmtune.common.environment import available_cores

__all__ = ["rest_after"]

SHARE_OF_THE_MACHINE = 0.00125
"""Processor time that a watcher may take. A step whose threads wait for each other loses more than a watcher takes, two
to three times as much on two cores (benchmarks/watching.py)."""

LONGEST_REST_S = 60.0
"""However long a picture takes: a run may have ended."""


def rest_after(work_s: float) -> float:
    """Seconds to rest after work that took `work_s`: work_s / (share x cores), at most a minute."""
    return min(work_s / (SHARE_OF_THE_MACHINE * available_cores()), LONGEST_REST_S)
