"""Feed-forward modules and norms in tiles of tokens: no tensor of the feed-forward width exists for a whole row.

What treats each token by itself gives the same numbers a tile at a time. Each tile is computed again, from its input
alone, when the backward pass comes to it, so of a row of 78,000 tokens only one tile's gate, up and product are alive.
The input is put aside before anything is computed from it: where a whole block is computed again, that ends at the
feed-forward input, whose products nobody needs then.

A module is taken over by giving its instance a subclass of its class; the arithmetic of a tile is whatever the module's
own forward does (fused adapters, 4-bit weights, dropout, autocast).

Shapes: N tokens, K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llmtune.kernels.chunks import SelectChunks, accumulate_float32, every_chunk
from llmtune.kernels.patching import original_class_name, patch
from llmtune.models.eval_mode import eval_mode

__all__ = ["Tiling", "tile_modules", "tile_tokens", "tiled_forward"]

LEAST_TOKENS = 1024
"""Tokens below which a tile's products no longer keep a device busy."""


@dataclass(frozen=True)
class Tiling:
    """What runs in tiles, and what does not."""

    tokens: int
    """Most tokens of a tile."""
    norms: int
    """How many norms do."""
    feed_forwards: int
    """How many feed-forward modules do."""
    skipped: dict[str, str]
    """Why not, by the class of other modules."""


def tile_tokens(width: int) -> int:
    """Tokens of a tile for a model of that width.

    As many as it is wide, so that a tile's products are as large as the weights it reads.

    >>> tile_tokens(4096), tile_tokens(576)
    (4096, 1024)
    """
    return max(LEAST_TOKENS, width)


class _PutAside(torch.autograd.Function):
    """Saves a tensor for another function's backward pass, before that function computes anything.

    Has no backward pass itself.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return token.clone()


class _InTiles(torch.autograd.Function):
    """`run` over the tiles of x [1, N, K], and again over each in the backward pass.

    Gradients of `weights` add up over the tiles.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        run: Callable[[Tensor], Tensor],
        tokens: int,
        select: SelectChunks,
        aside: Any,
        *weights: Tensor,
    ) -> Tensor:
        ctx.run, ctx.tokens, ctx.select, ctx.aside, ctx.weights = run, tokens, select, aside, weights
        ctx.surroundings = _Surroundings(x.device)
        return _over_tiles(run, x, tokens, select)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # It holds what a block's recomputation made, which nobody needs once this has run.
        aside, ctx.aside = ctx.aside, None
        if aside is None:
            raise RuntimeError("a second backward pass through tiles, whose inputs were let go by the first")
        (x,) = aside.saved_tensors
        wants_x, _, _, _, _, *wants = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if wants_x else None
        weights = [weight for weight, is_needed in zip(ctx.weights, wants, strict=True) if is_needed]
        sums: list[Tensor | None] = [None] * len(weights)
        with ctx.surroundings.again(), torch.enable_grad():
            for part in ctx.select(_tiles(x.shape[1], ctx.tokens)):
                tile = x[:, part].detach().requires_grad_(wants_x)
                output = ctx.run(tile)
                sources = [tile, *weights] if wants_x else weights
                grads = torch.autograd.grad(output, sources, grad[:, part].to(output.dtype), allow_unused=True)
                if grad_x is not None:
                    grad_x[:, part] = 0 if grads[0] is None else grads[0]
                for number, gradient in enumerate(grads[wants_x:]):
                    sums[number] = accumulate_float32(sums[number], gradient)
        gradients = iter(
            [
                None if gradient is None else gradient.to(weight.dtype)
                for gradient, weight in zip(sums, weights, strict=True)
            ]
        )
        return (grad_x, None, None, None, None, *(next(gradients) if is_needed else None for is_needed in wants))


class _Surroundings:
    """What else decides a module's output: generators and autocast, as they were when it first ran."""

    def __init__(self, device: torch.device) -> None:
        kind = self._kind = device.type
        self._devices = [device] if kind == "cuda" else []
        self._states = [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(cuda_device) for cuda_device in self._devices),
        ]
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again and compute in the same type; afterwards all is as it was before."""
        enabled, dtype = self._autocast
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self._devices))
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            stack.enter_context(torch.autocast(self._kind, dtype=dtype, enabled=enabled))
            yield


def _tiles(count: int, tokens: int) -> list[slice]:
    """Cut `count` tokens into the fewest tiles of at most `tokens`, as even as they come."""
    number = -(-count // tokens)
    return [slice(start, stop) for start, stop in pairwise(count * index // number for index in range(number + 1))]


def _over_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tokens: int, select: SelectChunks = every_chunk) -> Tensor:
    output_of_row = None
    for part in select(_tiles(x.shape[1], tokens)):
        output = run(x[:, part])
        if output_of_row is None:
            output_of_row = output.new_empty(1, x.shape[1], output.shape[-1])
        output_of_row[:, part] = output
    assert output_of_row is not None, "there is at least one token"
    return output_of_row


def tiled_forward(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tokens: int,
    weights: Sequence[Tensor],
    select: SelectChunks = every_chunk,
) -> Tensor:
    """Return `run(x)`, computed over tiles of at most `tokens` rows, [..., K] -> [..., M].

    run: treats each row by itself. x: contiguous. weights: every tensor that `run` uses and that may want a gradient.
    """
    rows = x.reshape(1, -1, x.shape[-1])
    if torch.is_grad_enabled():
        aside = _PutAside.apply(torch.empty(0, requires_grad=True), rows.detach()).grad_fn
        output = _InTiles.apply(rows, run, tokens, select, aside, *weights)
    else:
        output = _over_tiles(run, rows, tokens, select)
    return output.view(*x.shape[:-1], -1)


class _Tiled:
    """A class put before that of a module which treats each token by itself.

    It calls the module's own forward a tile at a time where a row is longer than a tile.
    """

    _tile_numbers: int
    _select: SelectChunks
    parameters: Callable[[], Iterator[nn.Parameter]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the module's output, [..., K] -> [..., M]."""
        run: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        rows = self._tile_numbers // x.shape[-1]
        if args or kwargs or x.numel() // x.shape[-1] <= rows or not x.is_contiguous():
            return run(x, *args, **kwargs)
        return tiled_forward(
            run, x, rows, [weight for weight in self.parameters() if weight.requires_grad], self._select
        )


def tile_modules(decoder: nn.Module, width: int, *, proven: bool = False, select: SelectChunks = every_chunk) -> Tiling:
    """Run norms and feed-forward modules of a transformers decoder in tiles, in place.

    Returns what does and what does not, and why.

    width: of the residual stream. A class of feed-forward modules is first run whole and cut on a few tokens, and left
    alone where that is not the same, unless `proven` says that it needs no proof (a skeleton without numbers has none
    to give).
    """
    tokens = tile_tokens(width)
    blocks = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    norms = [module for module in decoder.modules() if _is_norm(module)]
    verdicts: dict[str, str | None] = {}
    feed_forwards = []
    for module in (child for block in blocks for child in block.children() if _may_be_feed_forward(child)):
        name = original_class_name(module)
        if name not in verdicts:
            verdicts[name] = _strange_part(module) or (None if proven else _difference(module, width))
        if verdicts[name] is None:
            feed_forwards.append(module)
    for module in (*norms, *feed_forwards):
        patch(module, _Tiled, "Tiled")
        module.__dict__.update(_tile_numbers=tokens * width, _select=select)
    return Tiling(
        tokens, len(norms), len(feed_forwards), {name: why for name, why in verdicts.items() if why is not None}
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm over the last dimension."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not any(module.children())


def _may_be_feed_forward(module: nn.Module) -> bool:
    return any(module.children()) and "Attention" not in type(module).__name__


def _strange_part(module: nn.Module) -> str | None:
    """Name what stands in a feed-forward module beside layers that treat each token by itself, or return None."""
    working = [child for child in module.modules() if child._parameters or not any(child.children())]
    strange = dict.fromkeys(original_class_name(child) for child in working if not _is_plain(child))
    return f"it holds {' and '.join(strange)}" if strange else None


def _is_plain(leaf: nn.Module) -> bool:
    home = type(leaf).__module__
    return (
        type(leaf).__name__ in PLAIN_LAYERS
        or home in ("torch.nn.modules.activation", "transformers.activations", "torch.nn.modules.dropout")
        or _is_norm(leaf)
    )


def _difference(module: nn.Module, width: int) -> str | None:
    """Run the module whole and cut on six arbitrary tokens; None when it is the same."""
    weight = next(module.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    x = torch.arange(6 * width, device=weight.device, dtype=torch.float32).sin().to(dtype).view(1, 6, width)
    try:
        with eval_mode(module):
            at_once, cut = module(x), _over_tiles(module, x, 4)
    except PROBE_ERRORS as error:
        return f"it cannot be run on a few tokens ({type(error).__name__})"
    apart = (at_once.double() - cut.double()).norm() / at_once.double().norm().clamp_min(1e-30)
    return None if float(apart) <= TOLERANCE else "its outputs depend on what other tokens stand beside"


TOLERANCE = 2e-2
"""Of the outputs' norm: rounding in bf16 stays below it, a token that sees its neighbour is ten times above."""

PROBE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)

PLAIN_LAYERS = frozenset(
    ("Linear", "Conv1D", "Linear4bit", "Identity", "ModuleDict", "ParameterDict", "DoraLinearLayer")
)
"""Classes of layers without parts that treat each token by itself (empty dictionaries are peft's). 8-bit layers do not:
they look for outlying columns over all tokens."""
