"""The errors of llmtune: a problem, its location and the fix, and one exit code for each kind.

A message is written for the person who reads it in a terminal: the problem (with the value in it), its location, and
the fix. An error may carry several problems of the same kind, so that everything wrong with an input is reported at
once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "LlmtuneError",
    "MachineError",
    "ModelError",
    "Problem",
    "RankLostError",
    "StoppedBySignal",
    "TokenizerError",
    "UsageError",
    "in_one_line",
]

_LONGEST_LINE = 300
"""Characters of another library's message that are shown."""


class Problem(NamedTuple):
    """One problem, its location (`file:line`, a flag, a folder) and the fix."""

    problem: str
    where: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{where}{self.problem}{fix}"


class LlmtuneError(Exception):
    """A refusal: one or more problems, each with its location and fix.

    >>> print(LlmtuneError("unknown key `lerning_rate`", "dev.yaml:14", "did you mean `training.learning_rate`?"))
    dev.yaml:14: unknown key `lerning_rate`
      fix: did you mean `training.learning_rate`?
    """

    exit_code = 1
    kind = "error"
    is_reported: bool | None = None
    """Whether another process of the same training prints it; None where the processes have not met."""

    def __init__(self, problem: str, where: str | None = None, fix: str | None = None) -> None:
        self.problems: tuple[Problem, ...] = (Problem(problem, where, fix),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def all(cls, problems: Iterable[Problem]) -> LlmtuneError:
        """Make one error of this kind from all `problems`; there must be at least one."""
        listed = tuple(problems)
        assert listed, "an error needs at least one problem"
        error = cls(*listed[0])
        error.problems = listed
        error.args = ("\n".join(str(problem) for problem in listed),)
        return error


class UsageError(LlmtuneError):
    """The command line names something that does not exist, or contradicts itself."""

    exit_code = 2
    kind = "usage"


class ConfigError(LlmtuneError):
    """A config value is unknown, of the wrong type, out of range, or contradicts another."""

    exit_code = 2
    kind = "config"


class DataError(LlmtuneError):
    """A data file or row cannot be used as it is."""

    exit_code = 3
    kind = "data"


class ModelError(LlmtuneError):
    """A model cannot be found, read, trusted or built."""

    exit_code = 4
    kind = "model"


class TokenizerError(ModelError):
    """A tokenizer or its chat template cannot be found, read or used."""

    kind = "tokenizer"


class AdapterError(ModelError):
    """An adapter cannot be read, trusted, or does not belong to this base model."""

    kind = "adapter"


class CheckpointError(LlmtuneError):
    """No checkpoint can be used, or a verification found a difference."""

    exit_code = 5
    kind = "checkpoint"


class MachineError(LlmtuneError):
    """The machine refuses: disk, memory, device or network."""

    exit_code = 6
    kind = "machine"


class DivergedError(LlmtuneError):
    """Losses or gradients are no longer finite and the budget for skipping such steps is used up."""

    exit_code = 7
    kind = "diverged"


class RankLostError(LlmtuneError):
    """Another process of the same training died or stopped answering."""

    exit_code = 8
    kind = "rank"


class StoppedBySignal(LlmtuneError):
    """A signal asked the run to stop, and it stopped after saving. The exit code is 128 + the signal's number."""

    kind = "stopped"

    def __init__(self, signal_number: int, problem: str, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(problem, where, fix)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def in_one_line(error: BaseException) -> str:
    r"""Return the first line of another library's message, with the next one where the first ends in a colon.

    The error's class name where it has no message.

    >>> in_one_line(ValueError("2 values are missing:\n  width\n  height")), in_one_line(KeyboardInterrupt())
    ('2 values are missing: width', 'KeyboardInterrupt')
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    message = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return message if len(message) <= _LONGEST_LINE else f"{message[:_LONGEST_LINE]}..."
