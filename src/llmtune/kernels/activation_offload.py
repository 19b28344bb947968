"""The inputs of decoder blocks in host memory: a device holds two of them, however many blocks there are.

A recomputed block keeps nothing but its input. Here that input leaves for page-locked memory of the host on a stream of
its own while the block computes, and comes back while the block after it is in its backward pass. Pages are taken from
and go back to one store, so memory is locked once, whatever the lengths of the rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from llmtune.common.decisions import Decision
from llmtune.errors import ModelError
from llmtune.kernels.chunked_mlp import tile_modules
from llmtune.kernels.chunks import SelectChunks, every_chunk

__all__ = ["PAGE_BYTES", "HostStore", "keep_inputs_in", "offload_inputs", "run_in_tiles"]

PAGE_BYTES = 1 << 24
"""Size of a page: a power of two, because torch's allocator of page-locked memory rounds up to one."""


@dataclass(eq=False)
class _Held:
    """A tensor in a store."""

    shape: torch.Size
    dtype: torch.dtype
    pages: tuple[Tensor, ...]
    before: Callable[[], _Held | None]
    """The one put there just before, while it lives: the next that the backward pass will ask for."""
    on_device: Tensor | None = field(default=None, repr=False)
    """The tensor itself, from `put` until its copy is made, and again from when it is fetched until it is taken."""


class HostStore:
    """Tensors in host memory, best asked for in the reverse of the order in which they were put there.

    On a CUDA device copies run on a stream of their own. Memory of the device is allocated and freed in the order of
    the stream that computes: it waits for a copy before it goes on without the tensor. `new_page` gives uint8 tensors
    of PAGE_BYTES.
    """

    def __init__(self, device: torch.device, new_page: Callable[[], Tensor] | None = None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Any = None
        self._new_page = new_page or self._allocate_page
        self._free: list[Tensor] = []
        self._moving: _Held | None = None  # the one whose copy may still be under way
        self._last: Callable[[], _Held | None] = _nothing
        self.num_pages = 0

    def put(self, x: Tensor) -> _Held:
        """Copy a tensor to the host. It stays on its device until the next one comes."""
        self._settle()
        x = x.detach().contiguous()
        stored = _Held(x.shape, x.dtype, self._take_pages(x.nbytes), self._last, x)
        # Pages are only ever touched on one stream, so they are free at once.
        weakref.finalize(stored, self._free.extend, stored.pages)
        self._last = weakref.ref(stored)
        with self._beside(stored):
            for page, part in _parts(stored.pages, x):
                page.copy_(part, non_blocking=True)
        return stored

    def get(self, stored: _Held) -> Tensor:
        """Return the tensor on its device, and have the one put before it fetched."""
        if stored.on_device is None:
            self._fetch(stored)
        self._wait(stored)
        x, stored.on_device, self._moving = stored.on_device, None, None
        assert x is not None
        before = stored.before()
        if before is not None:
            self._fetch(before)
        return x

    def _fetch(self, stored: _Held) -> None:
        self._settle()
        stored.on_device = stored.pages[0].new_empty(stored.shape, dtype=stored.dtype, device=self._device)
        with self._beside(stored):
            for page, part in _parts(stored.pages, stored.on_device):
                part.copy_(page, non_blocking=True)

    @contextmanager
    def _beside(self, stored: _Held) -> Iterator[None]:
        """Copy on the other stream, after what has been computed so far."""
        self._moving = stored
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._copied = self._stream.record_event()

    def _wait(self, stored: _Held) -> None:
        """Have the stream that computes wait for this copy, if it may still be under way."""
        if self._moving is stored and self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def _settle(self) -> None:
        """Let go of the device's copy of the tensor that moved last."""
        if self._moving is not None:
            self._wait(self._moving)
            self._moving.on_device = None
            self._moving = None

    def _take_pages(self, count: int) -> tuple[Tensor, ...]:
        missing = -(-count // PAGE_BYTES) - len(self._free)
        self._free += [self._new_page() for _ in range(missing)]
        self.num_pages += max(0, missing)
        return tuple(self._free.pop() for _ in range(-(-count // PAGE_BYTES)))

    def _allocate_page(self) -> Tensor:
        return torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)


def _nothing() -> None:
    return None


def _parts(pages: tuple[Tensor, ...], x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair each page (what is used of it) with its bytes of a contiguous tensor."""
    for page, part in zip(pages, x.view(-1).view(torch.uint8).split(PAGE_BYTES), strict=True):
        yield page[: part.numel()], part


def keep_inputs_in(store: HostStore, base: Any) -> int:
    """Have every recomputed decoder block of a transformers model keep its input in `store`.

    Returns how many blocks there are.

    Raises ModelError when the model has no blocks that say how they are recomputed.
    """
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            f"the inputs of {type(base).__name__}'s blocks cannot be kept elsewhere",
            fix="use gradient_checkpointing: true",
        )

    def through_store(function: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
        shape, dtype = hidden.shape, hidden.dtype

        def pack(tensor: Tensor) -> Tensor | _Held:
            is_input = tensor.shape == shape and tensor.dtype == dtype  # else a mask, which all blocks share
            return store.put(tensor) if is_input else tensor

        def unpack(saved: Tensor | _Held) -> Tensor:
            return store.get(saved) if isinstance(saved, _Held) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, hidden, *others, use_reentrant=False)

    for block in blocks:
        block._gradient_checkpointing_func = through_store  # type: ignore[assignment]
    return len(blocks)


def offload_inputs(base: Any, device: torch.device) -> Decision:
    """Have the recomputed blocks of a model on a CUDA `device` keep their inputs on the host.

    On a CPU they are there already.
    """
    key, again = "model.gradient_checkpointing", "asked for: each block is computed again in the backward pass"
    if device.type != "cuda":
        return Decision(key, "offload", f"{again}; blocks' inputs stay where they are, a CPU has no other memory")
    blocks = keep_inputs_in(HostStore(device), base)
    return Decision(
        key, "offload", f"{again}; the inputs of {blocks} blocks wait for it in page-locked memory of the host"
    )


def run_in_tiles(base: Any, *, proven: bool = False, select: SelectChunks = every_chunk) -> Decision:
    """Run norms and feed-forward modules of a transformers model in tiles.

    The decision says which, how long, and what not. See `tiles`.
    """
    tiling = tile_modules(
        base.get_decoder(), int(base.config.get_text_config().hidden_size), proven=proven, select=select
    )
    kinds = [f"{tiling.norms} norms"] * (tiling.norms > 0) + [f"{tiling.feed_forwards} feed-forward modules"] * (
        tiling.feed_forwards > 0
    )
    left = "".join(f"; not {name}: {why}" for name, why in tiling.skipped.items())
    if not kinds:
        return Decision("training.tiles", "none", f"this model has no module that treats each token by itself{left}")
    size = "as many as the model is wide, so a tile's products are as large as the weights it reads"
    return Decision("training.tiles", f"{tiling.tokens:,} tokens", f"{' and '.join(kinds)}; {size}{left}")
