"""Memory of one micro-batch beside the weights, found by running it on fake tensors and counting every live byte.

The engine itself runs - its fused functions, its chunks, its tiles, its backward pass - on tensors that have a shape
and a type and no values, so what autograd keeps is counted, not estimated. A model of two decoder blocks is traced and
one of three; blocks are alike, so what more blocks hold follows on a straight line, phase by phase.

Of a long row's chunks a few are run that hold as much memory as all of them: chunks that follow one another differ by a
token or two, and each frees what it held before the next one. So a row of 342,000 tokens is planned by as many
operators as one of 8,000.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtune.engine.forward import attention_ways, checkpoint_blocks
from llmtune.engine.masters import make_masters
from llmtune.engine.objective import FlatInputs, flat_forward, weighted_nll_sum
from llmtune.engine.scoring import scores_of
from llmtune.kernels.activation_offload import PAGE_BYTES, HostStore, offload_block_inputs
from llmtune.kernels.attention import segment_mask, tiles_backend, use_segment_attention
from llmtune.kernels.attention_layout import make_layout
from llmtune.kernels.linear_cross_entropy import Head, find_head, head_nll_sum, token_nll
from llmtune.kernels.patch_model import kernel_libraries, patch_model
from llmtune.kernels.tiled_mlp import run_in_tiles
from llmtune.models.parameters import base_model_of, find_score_head
from llmtune.plan.attention_memory import fake_flex_attention, workspace_bytes
from llmtune.plan.meta_model import decoder_blocks, quantized_weights, to_fake_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TRACED_BLOCKS", "Gradients", "MicroBatchShape", "Peaks", "extrapolate", "representative_chunks", "trace"]

Chunk = TypeVar("Chunk")

FIRST, LAST = 2, 3
"""Chunks that run at both ends. The first has nothing before it, the second has. At the end stands the shorter one, or
the longest run of longer ones (up to three) of an even cut, whose chunks differ by one token."""


def representative_chunks(chunks: Sequence[Chunk], size: Callable[[Chunk], int] | None = None) -> Sequence[Chunk]:
    """Select the first two chunks and the last three.

    size: numbers a chunk makes, where chunks differ more than that: those around the two neighbours with the largest
    sum are selected too, because a chunk's tensors are still alive when the next one's are made.

    >>> representative_chunks(range(8))
    [0, 1, 5, 6, 7]
    """
    count = len(chunks)
    if count <= FIRST + LAST:
        return chunks
    numbers = {*range(FIRST), *range(count - LAST, count)}
    if size is not None:
        sizes = [size(chunk) for chunk in chunks]
        largest = max(range(1, count), key=lambda number: sizes[number - 1] + sizes[number])
        numbers |= {largest - 1, largest, min(largest + 1, count - 1)}
    return [chunks[number] for number in sorted(numbers)]


TRACED_BLOCKS = 2
"""Blocks of the smaller trace; the larger has one more. A single block is the first and the last at once and has no
other block's input beside it: what it lacks would count once for each block."""

PHASES = ("forward", "loss", "last block", "first block", "end")
"""Phases of one micro-batch: forward through the blocks; head and loss, forward and backward; backward through the last
block, through the first block; the rest of the backward pass.
"""

Gradients = Literal["single", "summed", "dropped"]
"""Which gradients of trained weights are alive: those this micro-batch makes, which stay until the update (`single`: a
window is one micro-batch); all of them from the start, because an earlier micro-batch made them (`summed`); or one at a
time, because each is dropped when its weight has moved (`dropped`: `training.step_in_backward`).
"""


@dataclass(frozen=True)
class MicroBatchShape:
    """The layout of a micro-batch in memory."""

    lengths: tuple[int, ...]
    """Tokens of its examples, in order."""
    trained_tokens: int
    """Tokens that carry loss."""
    layout: str
    """`flat` or `padded`."""
    compares: bool = False
    """The loss compares answers, so autograd differentiates it; else it is a sum over tokens."""

    @property
    def tokens(self) -> int:
        """Positions computed, padding included."""
        return sum(self.lengths) if self.layout == "flat" else len(self.lengths) * max(self.lengths)


@dataclass(frozen=True)
class Peaks:
    """Bytes of one micro-batch beside weights and earlier gradients."""

    phases: dict[str, int]
    """The most bytes alive at once, by phase."""
    gradients: dict[str, int]
    """Of these, gradients of weights that the micro-batch itself had made by then and that stay."""
    activation_bytes: int
    """Bytes alive after the forward pass through the blocks: the activations."""
    host_bytes: int = 0
    """Bytes that wait in host memory for the backward pass."""

    def of_part(self, count: int) -> Peaks:
        """What each of `count` processes that share a row takes: its part of all but gradients and the loss's chunk."""

        def part(phase: str) -> int:
            whole = self.gradients[phase]
            if phase == "loss":  # a chunk of logits is as large as ever
                whole = max(whole, self.phases[phase] - self.activation_bytes)
            return whole + max(0, self.phases[phase] - whole) // count

        phases = {phase: part(phase) for phase in self.phases}
        return Peaks(phases, self.gradients, self.activation_bytes // count, self.host_bytes // count)

    @property
    def peak_bytes(self) -> int:
        """The most of all phases."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase with the most."""
        return max(self.phases, key=lambda phase: self.phases[phase])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, once each, while operators run under it."""

    def __init__(self, tensors: Iterable[torch.Tensor], *, on_gpu: bool, widened: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self._on_gpu = on_gpu
        self._widened = {weight.untyped_storage()._cdata: weight.nbytes for weight in widened.values()}
        """Bytes of the weights that are held in 4 or 8 bits, and made in full for each product."""
        self._sizes: dict[int, int] = {}
        self.now = 0
        """Bytes alive now."""
        self.phase = PHASES[0]
        self.phases = dict.fromkeys(PHASES, 0)
        """The most bytes alive at once, by phase."""
        self._gradient_bytes = 0
        self.gradients = dict.fromkeys(PHASES, 0)
        """Bytes of complete gradients at the moment of each phase's peak."""
        self.host_bytes = 0
        self._is_on_host = False
        for tensor in tensors:
            self._add(tensor)
        self.before = self.now
        """Bytes of the tensors given at the start."""

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        read = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)) if self._widened else ()
        widened = sum(self._widened.get(tensor.untyped_storage()._cdata, 0) for tensor in read)
        self._update_peak(widened + (workspace_bytes(func, args) if self._on_gpu else 0))
        return result

    def enter(self, phase: str) -> None:
        """Count peaks for `phase` from now on."""
        self.phase = phase
        self._update_peak()

    def count_gradient(self, weight: torch.Tensor, *_of: torch.Tensor) -> None:
        """Note that the gradient of a weight (or master), of its shape, is complete and stays."""
        self._gradient_bytes += weight.nbytes

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Count tensors made inside as host memory: they take none of the device's."""
        self._is_on_host = True
        yield
        self._is_on_host = False

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # views share a storage, and Python may wrap one storage in several objects
        if key in self._sizes:
            return
        self._sizes[key] = 0 if self._is_on_host else storage.nbytes()
        self.host_bytes += storage.nbytes() if self._is_on_host else 0
        self.now += self._sizes[key]
        weakref.finalize(storage, self._remove, key)  # the moment at which the allocator would have it back
        self._update_peak()

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def _update_peak(self, workspace: int = 0) -> None:
        if self.now + workspace > self.phases[self.phase]:
            self.phases[self.phase], self.gradients[self.phase] = self.now + workspace, self._gradient_bytes


def trace(
    model: PreTrainedModel,
    batch: MicroBatchShape,
    *,
    device_type: str,
    compute: torch.dtype | None,
    checkpointing: bool | str,
    gradients: Gradients,
    attention: str | None = None,
    libraries: Collection[str] | None = None,
    masters: bool = False,
    is_quantized: bool = False,
) -> Peaks:
    """Run a meta model forward and backward on a micro-batch of that shape, and count bytes; the model is used up.

    device_type: `cpu` or `cuda`, whose engine is traced. attention: its backend of attention by segments, the first it
    tries when not given. libraries: whose kernels it calls; those of the device that are installed here when not given.
    compute: autocast's type, None for float32 arithmetic. checkpointing: the resolved value of
    `model.gradient_checkpointing`. masters: that of `training.master_weights`. is_quantized: frozen layers have 4 or 8
    bits. Raises any of MODEL_ERRORS for a model that fails on fake tensors: NotImplementedError where `attention` does.
    """
    make_layout.cache_clear()  # or the masks of tiles would count in the first trace of a shape only
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake_tensors(model, mode)
    base = base_model_of(model)
    if checkpointing:
        checkpoint_blocks(base)
    if batch.layout == "flat":
        libraries = kernel_libraries(device_type) if libraries is None else libraries
        patch_model(base, device_type, libraries)
        backend = attention or attention_ways("auto", device_type, half=compute is not None)[0]
        use_segment_attention(base, backend, PLANNED_ATTENTION.get(backend))
    if checkpointing == "offload":
        # The proof compares values, which fake tensors do not have.
        run_in_tiles(base, probe=False, select=representative_chunks)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with mode:
        moving = list(make_masters(model).values()) if masters else trained
        tensors = [*model.parameters(), *model.buffers()]
        for moved in moving if gradients == "summed" else ():
            moved.grad = torch.empty_like(moved)
            tensors.append(moved.grad)
    live = LiveBytes(tensors, on_gpu=device_type == "cuda", widened=quantized_weights(model) if is_quantized else {})
    if gradients != "summed":  # summed ones are among `tensors`, and a sum takes no more
        for weight, moved in zip(trained, moving, strict=True):
            keep = partial(live.count_gradient, moved)
            weight.register_post_accumulate_grad_hook(_drop if gradients == "dropped" else keep)
    if checkpointing == "offload" and device_type == "cuda":
        offload_block_inputs(_fake_host_store(live, mode), base)
    _mark_phases(decoder_blocks(model), live)
    # A fake tensor is one of the CPU for either device type: the trace needs no GPU.
    autocast = torch.autocast("cpu", dtype=compute, enabled=compute is not None)
    inputs = _inputs(batch, mode)
    with live:
        with autocast:
            loss, after_forward = _forward(model, batch, inputs, live, device_type, find_head(base, libraries or ()))
        loss.backward()  # type: ignore[no-untyped-call]
    phases = {phase: max(0, peak - live.before) for phase, peak in live.phases.items()}
    return Peaks(phases, live.gradients, max(0, after_forward - live.before), live.host_bytes)


def _drop(weight: torch.Tensor) -> None:
    weight.grad = None


def extrapolate(smaller: Peaks, larger: Peaks, blocks: int) -> Peaks:
    """Peaks of `blocks` blocks from those of TRACED_BLOCKS and of one more: each phase on its own straight line.

    With n = TRACED_BLOCKS, peak(blocks) = peak(n) + (blocks - n) (peak(n + 1) - peak(n)), at least 0.
    """

    def line(first: int, second: int) -> int:
        return max(0, first + (blocks - TRACED_BLOCKS) * (second - first))

    def lines(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
        return {phase: line(first[phase], second[phase]) for phase in PHASES}

    return Peaks(
        lines(smaller.phases, larger.phases),
        lines(smaller.gradients, larger.gradients),
        line(smaller.activation_bytes, larger.activation_bytes),
        line(smaller.host_bytes, larger.host_bytes),
    )


def _fake_host_store(live: LiveBytes, mode: FakeTensorMode) -> HostStore:
    def new_page() -> torch.Tensor:
        with live.on_host(), mode:
            return torch.empty(PAGE_BYTES, dtype=torch.uint8)

    return HostStore(torch.device("cpu"), new_page)


def _mark_phases(blocks: Sequence[nn.Module], live: LiveBytes) -> None:
    """Enter a phase when the backward pass comes to the last block, to the first block, and past it."""

    def enter_at_gradient(tensor: object, phase: str) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: live.enter(phase))

    def mark_output(phase: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        return lambda _block, _inputs, output: enter_at_gradient(
            output[0] if isinstance(output, tuple) else output, phase
        )

    # With one block its output belongs to the phase "first block"; "last block" then stays at 0.
    blocks[0].register_forward_pre_hook(lambda _block, inputs: enter_at_gradient(inputs[0] if inputs else None, "end"))
    blocks[0].register_forward_hook(mark_output("first block"))
    if len(blocks) > 1:
        blocks[-1].register_forward_hook(mark_output("last block"))


@dataclass(frozen=True)
class _Inputs:
    """Fake tensors of a micro-batch; the document boundaries are real, because the engine reads them as numbers."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor


def _inputs(batch: MicroBatchShape, mode: FakeTensorMode) -> _Inputs:
    rows = min(batch.trained_tokens, batch.tokens - 1)  # the first token is never predicted
    shape = (1, batch.tokens) if batch.layout == "flat" else (len(batch.lengths), max(batch.lengths))
    with mode:
        ids, rows_N = torch.zeros(shape, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        weights, targets = torch.ones(shape), torch.zeros(rows, dtype=torch.int64)
    ends = torch.tensor([0, *batch.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return _Inputs(ids, ids, weights, rows_N, targets, ends)


def _forward(
    model: PreTrainedModel,
    batch: MicroBatchShape,
    inputs: _Inputs,
    live: LiveBytes,
    device_type: str,
    head: Head | None,
) -> tuple[torch.Tensor, int]:
    if batch.layout == "padded":
        return _padded(model, inputs, live)
    score_head = find_score_head(base_model_of(model))
    mask = segment_mask(inputs.segments, max(batch.lengths), torch.device("cpu"))
    # Rows and targets are given, because a fake tensor has no values from which the engine could count them.
    flat = FlatInputs(inputs.ids, inputs.positions, mask, inputs.rows, inputs.targets, inputs.weights)
    hidden = flat_forward(model, flat)
    after_forward = live.now
    live.enter("loss")
    if score_head is not None:
        return scores_of(score_head, hidden[: len(batch.lengths)]).sum(), after_forward
    assert head is not None
    weights = inputs.weights[0, : len(inputs.targets)]
    if batch.compares:
        return (token_nll(head, hidden, inputs.targets) * weights).sum(), after_forward
    loss = head_nll_sum(head, hidden, inputs.targets, weights, device_type=device_type, select=representative_chunks)
    return loss, after_forward


def _padded(model: PreTrainedModel, inputs: _Inputs, live: LiveBytes) -> tuple[torch.Tensor, int]:
    """The plain engine's forward; without its padding mask, whose values a fake tensor does not have."""
    after_forward = 0

    def at_head(_head: nn.Module, _inputs: tuple[object, ...]) -> None:
        nonlocal after_forward
        after_forward = live.now
        live.enter("loss")

    base = base_model_of(model)
    score_head = find_score_head(base)
    (score_head or base.get_output_embeddings()).register_forward_pre_hook(at_head)
    if score_head is not None:
        hidden = base.base_model(input_ids=inputs.ids, use_cache=False).last_hidden_state
        return scores_of(score_head, hidden[:, -1]).sum(), after_forward
    logits = model(input_ids=inputs.ids, use_cache=False).logits
    return weighted_nll_sum(logits, inputs.ids, inputs.weights), after_forward


PLANNED_ATTENTION = {"flex": fake_flex_attention, "tiles": tiles_backend(representative_chunks)}
"""Backends that a plan runs in another form: flex must be compiled for a device, tiles are many in a long row."""
