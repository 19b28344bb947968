"""Weight offloading: the frozen weights of decoder blocks in host memory, those of two blocks at most on the device.

With LoRA the base is only read. A block's frozen matrices lie in page-locked memory and come to the device in one piece
on a second stream, while the block before it computes (the scheme of L2L, arXiv:2002.05645). In the backward pass they
come in the reverse order, and the block is computed again while its own are there. They come as they were, 4-bit ones
packed, so every result has the bits that it has with all of them on the device.

Norms and biases stay on the device, and so does what an adapter trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.common.decisions import Decision
from llmtune.common.text import readable_bytes
from llmtune.errors import ModelError
from llmtune.kernels.activation_offload import HostStore, StoredTensor
from llmtune.kernels.patching import patch
from llmtune.models.parameters import checkpointable_blocks

__all__ = ["WeightStream", "is_offloaded", "offload_weights", "piece_bytes"]

ALIGNMENT = 256
"""Bytes: a tensor begins in its block's piece where an allocator would let it begin, for kernels that read vectors."""


class _Place(NamedTuple):
    """The place of a tensor of a block: in the model, and in the block's piece."""

    owner: object
    attribute: str
    """`data` of a parameter, or `absmax`, the scales of a 4-bit one."""
    start: int
    """Its first byte in the piece."""
    blank: Tensor
    """Of its type and shape, without memory. Whoever reads it outside of the block's turn gets NaN."""


class _Block(NamedTuple):
    stored: StoredTensor
    places: tuple[_Place, ...]


def is_offloaded(weight: Tensor) -> bool:
    """Whether a weight of a block, of any shape, waits on the host: frozen, with two dimensions or more."""
    return not weight.requires_grad and weight.dim() >= 2


def piece_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a block's piece from those of its tensors.

    >>> piece_bytes([1, 256, 300])
    1024
    """
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class WeightStream:
    """Brings the frozen matrices of a block to `device` when the block is called, and starts to fetch the next ones.

    The model lies on the host when this is made; then its other tensors are moved to the device. On a CPU the copies
    are made too, which serves tests alone.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device, self._store = device, HostStore(device)
        self._current: int | None = None
        blocks = checkpointable_blocks(model)
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._blocks = [self._take_from(block, held) for block in blocks]
        nn.Module.to(model, device=device)
        for module, name, weight in held:
            module._parameters[name] = weight
        for index, block in enumerate(blocks):
            patch(block, _Recomputed, "Streamed")
            block.register_forward_hook(partial(self._enter_at_gradient, index))
            # Parts of a block, because transformers recomputes a block's forward without the hooks of the block.
            for part in block.children():
                part.register_forward_pre_hook(partial(self._enter, index))

    @property
    def num_bytes(self) -> int:
        """Bytes that wait on the host."""
        return sum(block.stored.shape.numel() for block in self._blocks)

    def _take_from(self, block: nn.Module, held: list[tuple[nn.Module, str, nn.Parameter]]) -> _Block:
        """Copy a block's tensors to pages and take its weights away; `held` gets those that stand for them later."""
        places: list[_Place] = []
        tensors: list[Tensor] = []
        start = 0
        for owner, attribute, tensor in _tensors_of(block, self._device, held):
            empty = math.nan if tensor.is_floating_point() else 0
            blank = torch.full((1,), empty, dtype=tensor.dtype, device=self._device).expand(tensor.shape)
            places.append(_Place(owner, attribute, start, blank))
            tensors.append(tensor)
            start += piece_bytes([tensor.nbytes])
        piece = torch.zeros(start, dtype=torch.uint8)
        for place, tensor in zip(places, tensors, strict=True):
            _part(piece, place).copy_(tensor)
        stored = self._store.put(piece)
        self._store.release()
        taken = _Block(stored, tuple(places))
        _leave(taken)
        return taken

    def _enter(self, index: int, *_call: object) -> None:
        """Bring a block's weights, unless they are there, and start to fetch those of the block that comes next."""
        before = self._current
        if index == before:
            return
        if before is not None:
            _leave(self._blocks[before])  # before others come, so that there are never three
        self._current, block = index, self._blocks[index]
        piece = self._store.take(block.stored)
        for place in block.places:
            setattr(place.owner, place.attribute, _part(piece, place))
        following = self._following(index, before)
        if following is not None:
            self._store.fetch(self._blocks[following].stored)

    def _enter_at_gradient(self, index: int, _block: nn.Module, _inputs: object, output: object) -> None:
        """Bring a block's weights before its backward pass, whose first operation may read them without recomputing."""
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: self._enter(index))

    def _following(self, index: int, before: int | None) -> int | None:
        """Guess the block that comes after this one, which came after `before`; None where there is none."""
        count = len(self._blocks)
        if index == count - 1:  # the end of a forward pass: another one follows, or a backward pass, which begins here
            following = count - 2 if torch.is_grad_enabled() else 0
        else:
            following = index + 1 if before is None or before < index or index == 0 else index - 1
        return following if 0 <= following != index else None


def _leave(block: _Block) -> None:
    for place in block.places:
        setattr(place.owner, place.attribute, place.blank)


def _tensors_of(
    block: nn.Module, device: torch.device, held: list[tuple[nn.Module, str, nn.Parameter]]
) -> Iterator[tuple[object, str, Tensor]]:
    """Give the tensors of a block that are to wait, each with the object on `device` that will hold it in its turn."""
    for module in block.modules():
        for name, weight in module._parameters.items():
            if weight is None or not is_offloaded(weight):
                continue
            module._parameters[name] = None
            stands_for = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)
            held.append((module, name, stands_for))
            yield stands_for, "data", weight.data
            state = getattr(weight, "quant_state", None)  # of a 4-bit weight
            if state is not None:
                yield state, "absmax", state.absmax
                state.to(device)
                stands_for.quant_state = state  # type: ignore[attr-defined]


def _part(piece: Tensor, place: _Place) -> Tensor:
    part = piece[place.start : place.start + place.blank.nbytes]
    return part.view(place.blank.dtype).view(place.blank.shape)


class _Recomputed:
    """Mixin for a block: computed again in a backward pass outside of training too, when its weights are there."""

    training: bool

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the block; in training transformers recomputes it."""
        forward = partial(super().forward, **kwargs)  # type: ignore[misc]
        has_cache = kwargs.get("past_key_values") is not None  # computed again, it would get its keys twice
        if self.training or has_cache or not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)


def offload_weights(model: nn.Module, device: torch.device) -> Decision:
    """Move a model with an adapter from the host to a CUDA `device`, but for the frozen weights of its blocks.

    On a CPU nothing changes. Raises ModelError when the model has no blocks that transformers can recompute.
    """
    key = "model.offload_weights"
    if device.type != "cuda":
        return Decision(key, True, "asked for; weights stay where they are, a CPU has no other memory")
    count = len(checkpointable_blocks(model))
    if not count:
        raise ModelError(
            f"{type(model).__name__} has no blocks to bring one by one", fix="set model.offload_weights: false"
        )
    size = readable_bytes(WeightStream(model, device).num_bytes)
    return Decision(key, True, f"asked for: {size} of {count} blocks wait in page-locked memory of the host")
