"""Activation offloading: the inputs of decoder blocks in host memory, two of them at most on the device.

A recomputed block (arXiv:1604.06174) saves nothing but its input. Here that input is copied to page-locked host memory
on a second stream while the block computes, and comes back while the block after it is in its backward pass. Pages are
taken from and go back to one store, so memory is locked once, whatever the lengths of the rows.

Shapes: T tokens of the row, E width of the model.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmtune.common.decisions import Decision
from llmtune.common.memory import is_out_of_memory
from llmtune.common.text import readable_bytes
from llmtune.errors import ModelError
from llmtune.models.parameters import checkpointable_blocks

__all__ = ["PAGE_BYTES", "HostStore", "StoredTensor", "offload_block_inputs", "offload_inputs"]

PAGE_BYTES = 1 << 24
"""Size of a page: a power of two, because torch's allocator of page-locked memory rounds up to one."""


@dataclass(eq=False)
class StoredTensor:
    """A tensor in a store."""

    shape: torch.Size
    dtype: torch.dtype
    pages: tuple[Tensor, ...]
    previous: Callable[[], StoredTensor | None]
    """The one put there just before, while it lives: the backward pass needs it next."""
    on_device: Tensor | None = field(default=None, repr=False)
    """The tensor itself, from `put` until its copy is made, and again from when it is fetched until it is taken."""


class HostStore:
    """Tensors in host memory, fastest when fetched in the reverse of the order in which they were put there.

    On a CUDA device copies run on a second stream. `new_page` gives uint8 tensors of PAGE_BYTES.
    """

    def __init__(self, device: torch.device, new_page: Callable[[], Tensor] | None = None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copy_done: torch.cuda.Event | None = None
        self._new_page = new_page or self._allocate_page
        self._free: list[Tensor] = []
        self._locks_pages = device.type == "cuda"  # only from page-locked memory does a copy run beside the computation
        self._in_flight: StoredTensor | None = None  # the one whose copy may still be under way
        self._last: Callable[[], StoredTensor | None] = _no_tensor
        self.num_pages = 0

    def put(self, x: Tensor) -> StoredTensor:
        """Copy a tensor of any shape to the host; its device memory is released when the next one comes.

        What `get` returns has the same bits: get(put(x)) = x. The scheme is that of vDNN (arXiv:1602.08124).
        """
        # Two tensors at most are on the device: this one, and the one whose copy it waits for.
        self.release()
        x = x.detach().contiguous()
        stored = StoredTensor(x.shape, x.dtype, self._take_pages(x.nbytes), self._last, x)
        # Pages are only ever touched on one stream, so they are free at once.
        weakref.finalize(stored, self._free.extend, stored.pages)
        self._last = weakref.ref(stored)
        with self._on_copy_stream(stored):
            for page, part in _parts(stored.pages, x):
                page.copy_(part, non_blocking=True)
        return stored

    def get(self, stored: StoredTensor) -> Tensor:
        """Return the tensor on its device, in its shape, and start to fetch the one put before it.

        A backward pass needs them in reverse order, so that copies run beside it (vDNN, arXiv:1602.08124).
        """
        x, previous = self.take(stored), stored.previous()
        if previous is not None:
            self.fetch(previous)  # while the block that gets `x` computes
        return x

    def take(self, stored: StoredTensor) -> Tensor:
        """Return the tensor on its device, in its shape, after its copy (vDNN, arXiv:1602.08124)."""
        if stored.on_device is None:
            self.fetch(stored)
        self._wait(stored)
        x, stored.on_device, self._in_flight = stored.on_device, None, None
        assert x is not None
        return x

    def fetch(self, stored: StoredTensor) -> None:
        """Start to copy a tensor to its device, beside what is computed there."""
        self.release()
        stored.on_device = stored.pages[0].new_empty(stored.shape, dtype=stored.dtype, device=self._device)
        with self._on_copy_stream(stored):
            for page, part in _parts(stored.pages, stored.on_device):
                part.copy_(page, non_blocking=True)

    @contextmanager
    def _on_copy_stream(self, stored: StoredTensor) -> Iterator[None]:
        """Run copies on the second stream, after everything that is queued on the first."""
        self._in_flight = stored
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._copy_done = self._stream.record_event()

    def _wait(self, stored: StoredTensor) -> None:
        """Make the computing stream wait for this tensor's copy, if it may still be under way; the host goes on."""
        if self._in_flight is stored and self._copy_done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copy_done)

    def release(self) -> None:
        """Release the device memory of the tensor that was copied last."""
        if self._in_flight is not None:
            # The allocator reuses memory in the order of the computing stream, so that stream waits for the copy first.
            self._wait(self._in_flight)
            self._in_flight.on_device = None
            self._in_flight = None

    def _take_pages(self, num_bytes: int) -> tuple[Tensor, ...]:
        needed = -(-num_bytes // PAGE_BYTES)
        for _ in range(needed - len(self._free)):
            self._free.append(self._new_page())
            self.num_pages += 1
        return tuple(self._free.pop() for _ in range(needed))

    def _allocate_page(self) -> Tensor:
        if self._locks_pages:
            try:
                return torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._locks_pages = False
            locked = readable_bytes(self.num_pages * PAGE_BYTES)
            warnings.warn(
                f"the system refuses more page-locked memory than {locked} (WSL2 gives 1 to 2 GB): what more is "
                "offloaded waits in ordinary memory, and the device waits for each copy of it",
                RuntimeWarning,
                stacklevel=2,
            )
        return torch.empty(PAGE_BYTES, dtype=torch.uint8)


def _no_tensor() -> None:
    return None


def _parts(pages: tuple[Tensor, ...], x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair the used part of each page with its bytes of a contiguous tensor, uint8 [bytes] both."""
    for page, part in zip(pages, x.view(-1).view(torch.uint8).split(PAGE_BYTES), strict=True):
        yield page[: part.numel()], part


def offload_block_inputs(store: HostStore, base: PreTrainedModel) -> int:
    """Make every recomputed decoder block of a transformers model save its input, [1, T, E], in `store`.

    Returns the number of blocks. Raises ModelError when the model has no blocks that transformers can recompute.
    """
    blocks = checkpointable_blocks(base)
    if not blocks:
        raise ModelError(
            f"the inputs of {type(base).__name__}'s blocks cannot be kept elsewhere",
            fix="use gradient_checkpointing: true",
        )

    def checkpoint_in_store(function: Callable[..., object], hidden: Tensor, *others: object) -> object:
        shape, dtype = hidden.shape, hidden.dtype

        def pack(tensor: Tensor) -> Tensor | StoredTensor:
            # Masks and position embeddings are shared by all blocks, so they stay on the device.
            is_input = tensor.shape == shape and tensor.dtype == dtype
            return store.put(tensor) if is_input else tensor

        def unpack(saved: Tensor | StoredTensor) -> Tensor:
            return store.get(saved) if isinstance(saved, StoredTensor) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, hidden, *others, use_reentrant=False)

    for block in blocks:
        # The attribute through which transformers' blocks call their checkpoint.
        block._gradient_checkpointing_func = checkpoint_in_store  # type: ignore[assignment]
    return len(blocks)


def offload_inputs(base: PreTrainedModel, device: torch.device) -> Decision:
    """Make the recomputed blocks of a model on a CUDA `device` save their inputs, [1, T, E], on the host.

    On a CPU nothing changes. Raises ModelError when the model has no blocks that transformers can recompute.
    """
    key, again = "model.gradient_checkpointing", "asked for: each block is computed again in the backward pass"
    if device.type != "cuda":
        return Decision(key, "offload", f"{again}; blocks' inputs stay where they are, a CPU has no other memory")
    blocks = offload_block_inputs(HostStore(device), base)
    return Decision(
        key, "offload", f"{again}; the inputs of {blocks} blocks wait for it in page-locked memory of the host"
    )
