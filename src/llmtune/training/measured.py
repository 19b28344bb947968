"""The parts of a run's memory that can be counted, beside the planned ones."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from llmtune.training.build import TrainingSetup

__all__ = ["measured_bytes"]


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
