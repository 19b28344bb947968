"""What was chosen for the user: every automatic choice is a value, and it carries its reason."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Decision"]


class Decision(NamedTuple):
    """One choice made on the user's behalf: the config key (or subject) it answers, the value taken, and why.

    >>> print(Decision("training.precision", "bf16", "this CPU multiplies bf16 natively"))
    training.precision = bf16: this CPU multiplies bf16 natively
    """

    key: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value}: {self.reason}"
