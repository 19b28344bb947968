"""What only the command line (or a Python caller) decides for a process; never read from a config or a model's files."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What only the command line (or a caller) says about this process; never read from a config or a model's files."""

    no_cuda: bool = False
    """Train on the CPU even where there is a CUDA device."""

    offline: bool = False
    """Open no connection; what is not on this machine is an error."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
