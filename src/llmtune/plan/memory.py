"""Memory of a training by part, at the worst moment of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmtune.config.distributed_checks import takes_deepspeed
from llmtune.config.schema import Config
from llmtune.engine.allocator import SHARDED_LARGEST_BLOCK, has_expandable_segments
from llmtune.engine.choose_device import CUDA_CONTEXT_BYTES
from llmtune.engine.deepspeed_settings import offload_of, zero_stage_of
from llmtune.plan.activation_trace import Gradients, MicroBatchShape, Peaks
from llmtune.plan.meta_model import ModelSizes

__all__ = ["Division", "MemoryPlan", "division_of", "optimizer_bytes", "plan_memory"]

ALLOCATOR_SHARE = {"cpu": 0.25, "cuda": 0.05}
"""Gaps that the allocator holds, as a part of the tensors that come and go: a micro-batch's, and gradients."""

SHARE_WITH_THREAD_CACHES = 0.7
"""The same on a CPU where each thread keeps freed small blocks, which hold gaps apart: glibc's allocator does. The gaps
of a whole run: they grow for about 20 steps."""

SHARE_OF_FIXED_SEGMENTS = 0.25
"""The same on a GPU whose allocator cannot grow a segment: every length of a row leaves gaps of its own. torchtune
measured 16.39 GiB where growing segments took 10.83 (its pull request 1185)."""

LARGEST_GAPS = {"cpu": 2, "cuda": 0}
"""Gaps as large as the largest gradient (an embedding's): such a block no longer fits where small tensors have begun to
fill its place.
"""


@dataclass(frozen=True)
class Division:
    """Equal parts of the weights, of the gradients and of the optimizer's state, of which a process holds one."""

    weights: int = 1
    gradients: int = 1
    state: int = 1
    copies: bool = False
    """The optimizer moves a copy of the trained weights: DeepSpeed's of its part, or float32 masters."""
    offload: str = "none"
    """What waits in the host's memory: `none`, `optimizer` (the copy and the state), or `all`."""


def division_of(config: Config, processes: int) -> Division:
    """The division by the config's strategy; a process alone holds everything."""
    masters = Division(copies=config.training.master_weights is True)
    if processes == 1:
        return masters
    if takes_deepspeed(config):
        stage = zero_stage_of(config)
        weights, gradients, state = (processes if stage >= first else 1 for first in (3, 2, 1))
        return Division(weights, gradients, state, copies=True, offload=offload_of(config))
    if config.distributed.strategy == "fsdp":
        return Division(processes, processes, processes, offload=offload_of(config))
    return masters


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training at its worst moment; the parts add up to `peak_bytes`."""

    parts: dict[str, int]
    """Bytes by part: the names of `PARTS`."""
    moment: str
    """When that is: loading, a phase of the micro-batch, the update, or saving."""
    batch: MicroBatchShape
    """The largest micro-batch of the run."""
    sizes: ModelSizes
    host_bytes: int = 0
    """Page-locked memory of the host, beside the parts: inputs of blocks, their frozen weights, or what
    `distributed.offload` puts there.
    """

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def optimizer_bytes(name: str, *, entries: int, entry_bytes: int) -> int:
    """Bytes of an optimizer's state for `entries` trained weights that take `entry_bytes` in all.

    AdamW holds two moments in the type of the weights (arXiv:1711.05101), its paged form in float32; 8-bit states two
    bytes a weight and float32 scales of blocks (arXiv:2110.02861); SGD and Lion one momentum (arXiv:2302.06675);
    Adafactor a float32 row and column of each matrix (arXiv:1804.04235), an eighth of the weights at LoRA's ranks and
    far less in full tuning.
    """
    return round(OPTIMIZER_BYTES[name](entries, entry_bytes))


def plan_memory(
    sizes: ModelSizes,
    peaks: Peaks,
    batch: MicroBatchShape,
    *,
    kind: str,
    optimizer: str,
    gradients: Gradients,
    thread_caches: bool,
    process_bytes: int,
    file_bytes: int,
    reference_bytes: int = 0,
    division: Division | None = None,
) -> MemoryPlan:
    """Add the parts up for every moment of a run and return the moment with the largest sum; all sizes in bytes.

    A phase of the micro-batch takes weights + optimizer + gradients + what the trace counted + the allocator's gaps;
    the update weights + optimizer + gradients; saving, on a CPU, weights + twice the optimizer, or with fsdp twice the
    weights + optimizer; loading weights + file.

    kind: `cpu` or `cuda`. thread_caches: the allocator keeps small blocks for each thread. process_bytes: the process
    without a model, which counts for a CPU only. file_bytes: of the weight files. reference_bytes: of a copy of the
    trained weights that preferences are compared with. division: the parts of the weights, gradients and optimizer
    state that each process holds, beside what is whole at once (`ModelSizes.unit_bytes`).
    """
    is_cpu, division = kind == "cpu", division or Division()
    base = {  # in every moment
        "process": process_bytes if is_cpu else CUDA_CONTEXT_BYTES,
        "weights": _held(sizes.base_bytes, division.weights, whole=sizes.unit_bytes),
        "adapter": _held(sizes.adapter_bytes, division.weights),
        "reference": _held(reference_bytes, division.weights),
    }
    state = optimizer_bytes(optimizer, entries=sizes.trained, entry_bytes=sizes.gradient_bytes)
    # A dropped gradient lives until its weight has moved, so the update of one weight holds one of them.
    at_update = sizes.largest_gradient_bytes if gradients == "dropped" else sizes.gradient_bytes
    # Only the worst moment counts: what one moment frees, another may take.
    own_state = _held(state + (sizes.gradient_bytes if division.copies else 0), division.state)
    micro_batch = _micro_batch_parts(sizes, peaks, gradients, division)
    micro_batch["allocator"] = _gaps(micro_batch, sizes, kind, division, thread_caches=thread_caches)
    on_host = 0 if is_cpu else sizes.offloaded_bytes  # a CPU is its own host
    base["weights"] -= max(0, on_host - sizes.two_offloaded_bytes)
    if not is_cpu and division.offload != "none":
        on_host, own_state = own_state, 0
        if division.offload == "all":
            on_host += _held(sizes.base_bytes, division.weights) + _held(sizes.adapter_bytes, division.weights)
            base |= {"weights": min(sizes.unit_bytes, sizes.base_bytes), "adapter": 0}
    moments = {
        peaks.peak_phase: {"optimizer": own_state, **micro_batch},
        "update": {"gradients": _held(at_update, division.gradients), "optimizer": own_state},
    }
    if is_cpu:
        moments["saving"] = {"optimizer": own_state, "workspace": _copied_at_save(sizes, state, division)}
        # The files are mapped while their tensors are copied, so both are in memory for a moment, whole.
        moments["loading"] = {"workspace": file_bytes + sizes.base_bytes - base["weights"]}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(
        dict.fromkeys(PARTS, 0) | base | moments[moment], moment, batch, sizes, peaks.host_bytes + on_host
    )


def _copied_at_save(sizes: ModelSizes, state: int, division: Division) -> int:
    """Bytes of the copy that the main process writes a checkpoint from: of the whole optimizer state.

    With fsdp its tensors are gathered one after the other, and only the weights of the final model are there together.
    """
    is_fsdp = division.weights > 1 and not division.copies
    return (sizes.adapter_bytes or sizes.base_bytes) if is_fsdp else state


def _held(size: int, parts: int, *, whole: int = 0) -> int:
    """Bytes that a process holds of `size` bytes in equal parts, and of those `whole` at once."""
    return size if parts == 1 else min(size, -(-size // parts) + whole)


def _gaps(
    micro_batch: Mapping[str, int], sizes: ModelSizes, kind: str, division: Division, *, thread_caches: bool
) -> int:
    """Bytes of gaps that the allocator holds beside the parts of the micro-batch as a process holds them."""
    share, large = ALLOCATOR_SHARE[kind], LARGEST_GAPS[kind]
    if kind == "cpu" and thread_caches:
        share = SHARE_WITH_THREAD_CACHES
    elif kind == "cuda" and not has_expandable_segments():
        share = SHARE_OF_FIXED_SEGMENTS
    if kind == "cpu" and division.state > 1 and sizes.largest_gradient_bytes > SHARDED_LARGEST_BLOCK:
        large = 0  # such a block goes back to the system
    return round(share * sum(micro_batch.values())) + large * sizes.largest_gradient_bytes


def _micro_batch_parts(sizes: ModelSizes, peaks: Peaks, gradients: Gradients, division: Division) -> dict[str, int]:
    """Bytes by part in the worst phase of the micro-batch, beside weights, optimizer state and the allocator's gaps."""
    earlier = sizes.gradient_bytes if gradients == "summed" else 0
    # Each line is a straight line of its own (`extrapolate`), so the parts are kept from adding up to more than the
    # peak.
    made = min(peaks.peak_bytes, sizes.gradient_bytes, peaks.gradients[peaks.peak_phase])
    if gradients == "dropped":
        # One gradient at a time is alive in the backward pass; it is called so whatever phase it is in.
        made = (
            min(max(0, peaks.peak_bytes - peaks.activation_bytes), sizes.largest_gradient_bytes)
            if peaks.peak_phase != "forward"
            else 0
        )
    activations = min(peaks.activation_bytes, peaks.peak_bytes - made)
    rest = peaks.peak_bytes - made - activations
    in_loss = peaks.peak_phase == "loss"
    # A gradient is whole until it is summed.
    whole = min(sizes.unit_bytes, sizes.gradient_bytes)
    return {
        "gradients": _held(earlier + made, division.gradients, whole=whole),
        "activations": activations,
        "loss": rest if in_loss else 0,
        "workspace": 0 if in_loss else rest,
    }


PARTS = (
    "process",
    "weights",
    "adapter",
    "reference",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "workspace",
    "allocator",
)
"""The parts of a plan, in the order in which they are shown."""

OPTIMIZER_BYTES: dict[str, Callable[[int, int], float]] = {
    "adamw": lambda _entries, entry_bytes: 2 * entry_bytes,
    "paged_adamw": lambda entries, _bytes: 8 * entries,
    "adamw_8bit": lambda entries, _bytes: 2.1 * entries,
    "paged_adamw_8bit": lambda entries, _bytes: 2.1 * entries,
    "lion": lambda entries, _bytes: 4 * entries,
    "adafactor": lambda entries, _bytes: entries / 2,
    "muon": lambda _entries, entry_bytes: 2 * entry_bytes,
    "sgd": lambda _entries, entry_bytes: entry_bytes,
}
"""Bytes of state from (trained entries, their bytes); for `muon`, whose matrices need half of it, as for AdamW."""
