"""What one micro-batch holds in memory, found by running it on stand-in tensors and counting every live byte.

The real engine runs - its fused functions, its chunks, its tiles, its backward pass - on tensors that have shape and
type and no numbers, so nothing is guessed about what autograd keeps. A skeleton of one block and one of two are traced;
blocks are alike, so what more blocks hold follows on a straight line, phase by phase.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtune.engine.forward import attention_ways, checkpoint_blocks
from llmtune.engine.objective import weighted_nll_sum
from llmtune.kernels.activation_offload import PAGE_BYTES, HostStore, keep_inputs_in, run_in_tiles
from llmtune.kernels.attention import segment_mask, use_segment_attention
from llmtune.kernels.attention_layout import lay_out
from llmtune.kernels.head_loss import find_head, head_nll_sum
from llmtune.kernels.patch_model import fuse
from llmtune.plan.attention_memory import flex_stand_in, workspace_bytes
from llmtune.plan.meta_model import base_of, blocks_of, give_stand_ins

__all__ = ["TRACED_BLOCKS", "TRACE_ERRORS", "MicroBatchShape", "Peaks", "extrapolate", "trace"]

TRACED_BLOCKS = 2
"""Blocks whose trace, with that of one more, tells those of all. One alone is the first and the last at once and has no
other's input beside it: what it lacks would count once for each block."""

PHASES = ("forward", "loss", "last block", "first block", "end")
"""Of one micro-batch: forward through the blocks; head and loss, both ways; backward through the last and the first
block; the rest.
"""


TRACE_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
)
"""What a model may raise on tensors without numbers: it then has no memory plan, and trains all the same."""


@dataclass(frozen=True)
class MicroBatchShape:
    """How a micro-batch lies in memory."""

    lengths: tuple[int, ...]
    """Tokens of its examples, in order."""
    trained_tokens: int
    """Tokens that carry loss."""
    layout: str
    """`flat` or `padded`."""

    @property
    def tokens(self) -> int:
        """Positions computed, padding included."""
        return sum(self.lengths) if self.layout == "flat" else len(self.lengths) * max(self.lengths)


@dataclass(frozen=True)
class Peaks:
    """Most bytes alive beside weights (and beside gradients that were there before), by phase.

    And what the forward pass left behind.
    """

    phases: dict[str, int]
    gradients: dict[str, int]
    """Of these, gradients of weights that the micro-batch itself had made by then and that stay."""
    kept: int
    """Bytes alive after the forward pass through the blocks: the activations."""
    host: int = 0
    """Bytes that wait in host memory for the backward pass."""

    @property
    def bytes(self) -> int:
        """The most of all phases."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The phase with the most."""
        return max(self.phases, key=lambda phase: self.phases[phase])


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, once each."""

    def __init__(self, known: Iterable[torch.Tensor], *, on_gpu: bool) -> None:
        super().__init__()
        self._on_gpu = on_gpu
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.phase = PHASES[0]
        self.phases = dict.fromkeys(PHASES, 0)
        self.made = 0
        self.gradients = dict.fromkeys(PHASES, 0)
        self.elsewhere = 0
        self._is_elsewhere = False
        for tensor in known:
            self._note(tensor)
        self.before = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        if self._on_gpu:
            self._see(workspace_bytes(func, args))
        return result

    def enter(self, phase: str) -> None:
        """From here on peaks belong to `phase`."""
        self.phase = phase
        self._see()

    def count_gradient(self, weight: torch.Tensor) -> None:
        """Note that this weight's gradient is complete, and stays."""
        self.made += weight.nbytes

    @contextmanager
    def in_other_memory(self) -> Iterator[None]:
        """Count what is made here apart: it is not on the device."""
        self._is_elsewhere = True
        yield
        self._is_elsewhere = False

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = 0 if self._is_elsewhere else storage.nbytes()
        self.elsewhere += storage.nbytes() if self._is_elsewhere else 0
        self.now += self._sizes[key]
        weakref.finalize(storage, self._drop, key)
        self._see()

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def _see(self, beside: int = 0) -> None:
        if self.now + beside > self.phases[self.phase]:
            self.phases[self.phase], self.gradients[self.phase] = self.now + beside, self.made


def trace(
    model: Any,
    batch: MicroBatchShape,
    *,
    device_type: str,
    compute: torch.dtype | None,
    checkpointing: bool | str,
    gradients_held: bool,
    gradients_dropped: bool = False,
    attention: str | None = None,
) -> Peaks:
    """Run `model` (a skeleton on the meta device; it is used up) on a micro-batch of that shape, forward and backward,
    and count.

    device_type: `cpu` or `cuda`, whose engine is traced. attention: its way of attention by segments, the first it
    tries when not given. compute: autocast's type, None for float32 arithmetic. checkpointing: as
    `model.gradient_checkpointing`, settled. gradients_held: an earlier micro-batch of the window left its gradients.
    gradients_dropped: each goes once it is complete (`training.step_in_backward`). Raises what the model raises on
    stand-ins, NotImplementedError where this way of attention is not for this model.
    """
    lay_out.cache_clear()  # or the masks of tiles would count in the first trace of a shape only
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    give_stand_ins(model, mode)
    base = base_of(model)
    if checkpointing:
        checkpoint_blocks(base)
    if batch.layout == "flat":
        fuse(base, device_type)
        way = attention or attention_ways("auto", device_type, half=compute is not None)[0]
        use_segment_attention(base, way, flex_stand_in if way == "flex" else None)
    if checkpointing == "offload":
        run_in_tiles(base, proven=True)
    model.train()
    known = [*model.parameters(), *model.buffers()]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if gradients_held:
        with mode:
            for weight in trained:
                weight.grad = torch.empty_like(weight)
                known.append(weight.grad)
    live = _Live(known, on_gpu=device_type == "cuda")
    if not gradients_held:
        for weight in trained:
            weight.register_post_accumulate_grad_hook(_drop if gradients_dropped else live.count_gradient)
    if checkpointing == "offload" and device_type == "cuda":
        keep_inputs_in(_store_elsewhere(live, mode), base)
    _mark_blocks(blocks_of(model), live)
    autocast: AbstractContextManager[Any] = (
        torch.autocast("cpu", dtype=compute) if compute is not None else nullcontext()
    )
    run = _flat if batch.layout == "flat" else _padded
    inputs = _inputs(batch, mode)
    with live:
        with autocast:
            loss, kept = run(model, batch, inputs, live, device_type)
        loss.backward()
    phases = {phase: max(0, peak - live.before) for phase, peak in live.phases.items()}
    return Peaks(phases, live.gradients, max(0, kept - live.before), live.elsewhere)


def _drop(weight: torch.Tensor) -> None:
    weight.grad = None


def extrapolate(fewer: Peaks, more: Peaks, blocks: int) -> Peaks:
    """What `blocks` blocks hold, from what `TRACED_BLOCKS` and one more hold: each phase on its own straight line."""

    def line(first: int, second: int) -> int:
        return max(0, first + (blocks - TRACED_BLOCKS) * (second - first))

    def lines(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
        return {phase: line(first[phase], second[phase]) for phase in PHASES}

    phases, gradients = lines(fewer.phases, more.phases), lines(fewer.gradients, more.gradients)
    return Peaks(phases, gradients, line(fewer.kept, more.kept), line(fewer.host, more.host))


def _store_elsewhere(live: _Live, mode: FakeTensorMode) -> HostStore:
    """A store whose pages are stand-ins that are counted apart."""

    def new_page() -> torch.Tensor:
        with live.in_other_memory(), mode:
            return torch.empty(PAGE_BYTES, dtype=torch.uint8)

    return HostStore(torch.device("cpu"), new_page)


def _mark_blocks(blocks: Sequence[torch.nn.Module], live: _Live) -> None:
    """Have the backward pass say when it comes to the last block, the first block, and the end."""

    def output_of(phase: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: live.enter(phase))

        return hook

    def input_of(_module: Any, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: live.enter("end"))

    blocks[0].register_forward_pre_hook(input_of)
    blocks[0].register_forward_hook(output_of("first block"))
    if len(blocks) > 1:
        blocks[-1].register_forward_hook(output_of("last block"))


@dataclass(frozen=True)
class _Inputs:
    """Stand-ins for a micro-batch; the document boundaries are real, because the engine reads them as numbers."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor


def _inputs(batch: MicroBatchShape, mode: FakeTensorMode) -> _Inputs:
    rows = min(batch.trained_tokens, batch.tokens - 1)
    shape = (1, batch.tokens) if batch.layout == "flat" else (len(batch.lengths), max(batch.lengths))
    with mode:
        ids, rows_N = torch.zeros(shape, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        weights, targets = torch.ones(shape), torch.zeros(rows, dtype=torch.int64)
    ends = torch.tensor([0, *batch.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return _Inputs(ids, ids, weights, rows_N, targets, ends)


def _flat(
    model: Any, batch: MicroBatchShape, inputs: _Inputs, live: _Live, device_type: str
) -> tuple[torch.Tensor, int]:
    """The flat engine's forward, step by step as in `training.engine`."""
    base = base_of(model)
    head = find_head(base)
    assert head is not None
    mask = segment_mask(inputs.segments, max(batch.lengths), torch.device("cpu"))
    decoder: Any = base.get_decoder()
    hidden = decoder(
        input_ids=inputs.ids, position_ids=inputs.positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    trained = hidden[0, inputs.rows]
    kept = live.now
    live.enter("loss")
    return head_nll_sum(
        head, trained, inputs.targets, inputs.weights[0, : len(inputs.targets)], device_type=device_type
    ), kept


def _padded(
    model: Any, _batch: MicroBatchShape, inputs: _Inputs, live: _Live, _device_type: str
) -> tuple[torch.Tensor, int]:
    """The plain engine's forward; without its padding mask, whose values a stand-in does not have."""
    kept = 0

    def at_head(_module: Any, _inputs: Any) -> None:
        nonlocal kept
        kept = live.now
        live.enter("loss")

    base_of(model).get_output_embeddings().register_forward_pre_hook(at_head)
    logits = model(input_ids=inputs.ids, use_cache=False).logits
    return weighted_nll_sum(logits, inputs.ids, inputs.weights), kept
