"""Automatic choices: the key, the value taken, and the reason."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Decision"]


class Decision(NamedTuple):
    """One choice made for the user: the config key (or subject), the value taken, and the reason.

    >>> print(Decision("training.precision", "bf16", "this CPU multiplies bf16 natively"))
    training.precision = bf16: this CPU multiplies bf16 natively
    """

    key: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value}: {self.reason}"
