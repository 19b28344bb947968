"""The keys `evaluation.*`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EvaluationConfig"]


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out rows, and when."""

    every_steps: int | None = None
    """Evaluate after every so many steps; only before and after training when not given."""

    before_training: bool = True
    """Evaluate the untouched model first, so that there is something to compare with."""

    prompts: tuple[str, ...] = ()
    """Prompts the model answers at each evaluation; kept in samples.jsonl."""

    max_new_tokens: int = 128
    """Longest answer to a prompt, in tokens."""

    exact_match: bool = False
    """Before and after training, answer the held-out prompts greedily and count the answers that equal the reference exactly."""

    batch_size: int | None = None
    """Sequences evaluated at once; `training.batch_size` when not given. The result does not depend on it."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without improvement."""

    early_stopping_threshold: float = 0.0
    """Smallest fall of the held-out loss, in nats per token, that counts as improvement."""
