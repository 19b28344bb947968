"""Options of a process that only the command line or a Python caller may set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Settings of this process; a config and the files of a model cannot change them."""

    no_cuda: bool = False
    """Train on the CPU even where there is a CUDA device."""

    offline: bool = False
    """Open no connection; a file that is not on this machine is an error."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    score: str | None = None
    """FILE.py:FUNCTION that judges answers in place of `evaluation.score`: code of the user's own, which is run."""

    rewards: tuple[str, ...] = ()
    """FILE.py:FUNCTION[=WEIGHT] of rewards beside `objective.rewards`: code of the user's own, which is run."""

    loss: Callable[[Any, Any], Any] | None = None
    """The caller's own loss in place of the usual one (see `engine.own_loss`)."""
