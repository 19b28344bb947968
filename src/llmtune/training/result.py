"""The outcome of a training, and the parts of its memory that can be counted, beside the planned ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.plan.summary import Plan
from llmtune.training.build import TrainingSetup
from llmtune.training.evaluator import EvalState

__all__ = ["Result", "measured_bytes"]


@dataclass(frozen=True)
class Result:
    """The outcome of a training."""

    folder: Path | None
    """The run folder; None in processes that write nothing."""
    state: str
    """`finished`, or `stopped` (saved, to be resumed)."""
    step: int
    """Updates applied."""
    metrics: dict[str, Any]
    """The last training line, and the newest value of every evaluation metric."""
    eval_state: EvalState
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    final_step: int | None = None
    """Updates behind the model in `final/`, which may be the best and not the last; None where there is none."""
    plan: Plan | None = None
    """The plan of this run; None for one that was resumed."""
    seconds: float = 0.0
    """Time spent in steps."""
    tokens: int = 0
    """Real tokens trained on."""
    memory_bytes: int = 0
    """Most memory held (see `peak_memory_bytes`)."""


def measured_bytes(setup: TrainingSetup) -> dict[str, int]:
    """Bytes of weights, adapter and optimizer state that this process holds, under the plan's names for them."""
    weights = _bytes([*setup.model.parameters(), *setup.model.buffers()])
    adapter = _bytes(setup.parameters.values()) if setup.is_adapted else 0
    states = (state for part in setup.optimizer.parts for state in part.state.values())
    optimizer = _bytes(value for state in states for value in state.values() if isinstance(value, Tensor))
    return {"weights": weights - adapter, "adapter": adapter, "optimizer": optimizer}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Sum of their sizes, each stored tensor counted once: tied weights share one."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
