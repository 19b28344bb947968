"""Memory of a training by part, at the worst moment of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmtune.plan.activation_trace import MicroBatchShape, Peaks
from llmtune.plan.meta_model import Counted

__all__ = ["MemoryPlan", "add_up", "optimizer_bytes"]

ALLOCATOR_SHARE = {"cpu": 0.25, "cuda": 0.05}
"""What the allocator holds beside tensors that come and go (a micro-batch's, and gradients), as a part of them: gaps.
"""

SHARE_WITH_THREAD_CACHES = 0.35
"""The same on a CPU where each thread keeps freed small blocks, which hold gaps apart: a program that trains by the
Python API, mostly.
"""

LARGEST_GAPS = {"cpu": 2, "cuda": 0}
"""Gaps as large as the largest gradient (an embedding's): what small tensors have since begun to fill, such a block
fits no more.
"""

CUDA_CONTEXT_BYTES = 600 << 20
"""What the driver and its libraries take of a GPU before the first tensor; measured figures lie between 450 and 700
MiB.
"""


@dataclass(frozen=True)
class MemoryPlan:
    """What a training holds at its worst moment; the parts add up to `peak_bytes`."""

    parts: dict[str, int]
    """Bytes by part: process, weights, prepacked, adapter, gradients, optimizer, activations, loss, workspace,
    allocator.
    """
    moment: str
    """When that is: loading, a phase of the micro-batch, the update, or saving."""
    batch: MicroBatchShape
    """The largest micro-batch of the run."""
    counted: Counted
    host_bytes: int = 0
    """Page-locked memory of the host, beside the parts, in which inputs of blocks wait for the backward pass."""

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def optimizer_bytes(name: str, *, entries: int, entry_bytes: int) -> int:
    """Bytes of an optimizer's state for `entries` trained weights that take `entry_bytes` in all."""
    return round(OPTIMIZER_BYTES[name](entries, entry_bytes))


def add_up(
    counted: Counted,
    peaks: Peaks,
    batch: MicroBatchShape,
    *,
    kind: str,
    optimizer: str,
    gradients_held: bool,
    gradients_dropped: bool,
    prepacked: bool,
    thread_caches: bool,
    process: int,
    file_bytes: int,
) -> MemoryPlan:
    """Put the parts of every moment together and give the worst one. kind: `cpu` or `cuda`; sizes in bytes.

    gradients_held: the window has several micro-batches, so all gradients exist before the last one. gradients_dropped:
    a window is one micro-batch, and each gradient goes when its weight has moved; the largest is then named
    `gradients`, whatever phase it is in. prepacked: frozen weights are laid out for the kernels beside themselves, once
    they are loaded. thread_caches: the allocator has them.
    """
    share = SHARE_WITH_THREAD_CACHES if thread_caches and kind == "cpu" else ALLOCATOR_SHARE[kind]
    state = optimizer_bytes(optimizer, entries=counted.trained, entry_bytes=counted.gradient_bytes)
    base = {
        "process": process if kind == "cpu" else CUDA_CONTEXT_BYTES,
        "weights": counted.base_bytes,
        "adapter": counted.adapter_bytes,
    }
    held = counted.gradient_bytes if gradients_held else 0
    inside = min(peaks.bytes, counted.gradient_bytes, peaks.gradients[peaks.phase])
    if gradients_dropped:
        inside = (
            min(max(0, peaks.bytes - peaks.kept), counted.largest_gradient_bytes) if peaks.phase != "forward" else 0
        )
    activations = min(peaks.kept, peaks.bytes - inside)
    rest = peaks.bytes - inside - activations
    in_loss = peaks.phase == "loss"
    moments = {
        peaks.phase: {
            "gradients": held + inside,
            "optimizer": state,
            "activations": activations,
            "loss": rest if in_loss else 0,
            "workspace": (0 if in_loss else rest) + counted.largest_linear_bytes,
            "allocator": round(share * (peaks.bytes + held)) + LARGEST_GAPS[kind] * counted.largest_gradient_bytes,
        },
        "update": {
            "gradients": counted.largest_gradient_bytes if gradients_dropped else counted.gradient_bytes,
            "optimizer": state,
        },
    }
    if kind == "cpu":
        moments["saving"] = {"optimizer": state, "workspace": state}  # a snapshot is a copy
    if prepacked:
        moments = {name: parts | {"prepacked": counted.prepacked_bytes} for name, parts in moments.items()}
    if kind == "cpu":
        moments["loading"] = {"workspace": file_bytes}
    moment = max(moments, key=lambda one: sum(moments[one].values()))
    parts = dict.fromkeys(PARTS, 0) | base | moments[moment]
    return MemoryPlan(parts, moment, batch, counted, peaks.host)


PARTS = (
    "process",
    "weights",
    "prepacked",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "workspace",
    "allocator",
)

OPTIMIZER_BYTES: dict[str, Callable[[int, int], float]] = {
    "adamw": lambda _entries, entry_bytes: 2 * entry_bytes,
    "paged_adamw": lambda entries, _bytes: 8 * entries,
    "adamw_8bit": lambda entries, _bytes: 2.1 * entries,
    "paged_adamw_8bit": lambda entries, _bytes: 2.1 * entries,
    "lion": lambda entries, _bytes: 4 * entries,
    "muon": lambda _entries, entry_bytes: 2 * entry_bytes,
    "sgd": lambda _entries, entry_bytes: entry_bytes,
}
"""Bytes of state from (trained entries, their bytes); for `muon`, whose matrices need half of it, what AdamW would
need.
"""
