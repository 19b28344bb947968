"""Feed-forward modules and norms in tiles of tokens: no tensor of the feed-forward width exists for a whole row.

A module that treats each token by itself gives the same numbers a tile at a time (TiledMLP, arXiv:2506.13996). Each
tile is computed again, from its input alone, in the backward pass, so of a row of 78,000 tokens only one tile's gate,
up and product are alive.

A module is patched with a mixin; the arithmetic of a tile is the module's own forward (fused adapters, 4-bit weights,
dropout, autocast).

Shapes: N tokens, K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from transformers import PreTrainedModel

from llmtune.common.decisions import Decision
from llmtune.kernels.autograd import Context
from llmtune.kernels.chunks import SelectChunks, accumulate_float32, every_chunk
from llmtune.kernels.patching import original_class_name, patch
from llmtune.models.parameters import checkpointable_blocks, eval_mode

__all__ = ["Tiling", "run_in_tiles", "tile_decoder", "tiled_forward", "tokens_of_tile"]

LEAST_TOKENS = 1024
"""Tokens below which a tile's products no longer keep a device busy."""


@dataclass(frozen=True)
class Tiling:
    """The modules of a model that run in tiles, and those that do not."""

    tokens: int
    """Most tokens of a tile."""
    norms: int
    """Norms that run in tiles."""
    feed_forwards: int
    """Feed-forward modules that run in tiles."""
    skipped: dict[str, str]
    """The reason against it, by the class of the modules left as they are."""


def tokens_of_tile(width: int) -> int:
    """Tokens of a tile for a model of that width.

    As many as it is wide, so that a tile's products are as large as the weights it reads.

    >>> tokens_of_tile(4096), tokens_of_tile(576)
    (4096, 1024)
    """
    return max(LEAST_TOKENS, width)


class _SaveInput(torch.autograd.Function):
    """Saves a tensor for another function's backward pass, before that function computes anything.

    A recomputed block stops as soon as every tensor that backward needs has been saved again. Saved here, the input of
    the feed-forward module is the last of them: its products, which only the tiles need, are not computed then.
    """

    @staticmethod
    def forward(ctx: Context, token: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return token.clone()


class _TiledContext(Context):
    function: Callable[[Tensor], Tensor]
    tokens: int
    select: SelectChunks
    saved_input: Node | None
    weights: tuple[Tensor, ...]
    state: _RandomAndAutocastState


class _TiledForward(torch.autograd.Function):
    """`function` over the tiles of x [1, N, K], and again over each tile in the backward pass.

    Gradients of `weights` are summed over the tiles.
    """

    @staticmethod
    def forward(
        ctx: _TiledContext,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        tokens: int,
        select: SelectChunks,
        saved_input: Node,
        *weights: Tensor,
    ) -> Tensor:
        ctx.function, ctx.tokens, ctx.select, ctx.saved_input, ctx.weights = (
            function,
            tokens,
            select,
            saved_input,
            weights,
        )
        ctx.state = _RandomAndAutocastState(x.device)
        return _over_tiles(function, x, tokens, select)

    @staticmethod
    def backward(ctx: _TiledContext, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Released at once: it holds what the block's recomputation saved, which nobody needs after this.
        saved_input, ctx.saved_input = ctx.saved_input, None
        if saved_input is None:
            raise RuntimeError("a second backward pass through tiles, whose inputs were let go by the first")
        (x,) = saved_input.saved_tensors  # type: ignore[attr-defined]
        needs_x, _, _, _, _, *needs_weights = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needs_x else None
        weights = [weight for weight, is_needed in zip(ctx.weights, needs_weights, strict=True) if is_needed]
        sums: list[Tensor | None] = [None] * len(weights)
        with ctx.state.restored(), torch.enable_grad():
            for part in ctx.select(_tiles(x.shape[1], ctx.tokens)):
                tile = x[:, part].detach().requires_grad_(needs_x)
                output = ctx.function(tile)
                inputs = [tile, *weights] if needs_x else weights
                # Not `backward`: it would add to the weights' gradients in their own, perhaps 16-bit, type.
                grads = torch.autograd.grad(output, inputs, grad[:, part].to(output.dtype), allow_unused=True)
                if grad_x is not None:
                    grad_x[:, part] = 0 if grads[0] is None else grads[0]
                for number, gradient in enumerate(grads[needs_x:]):
                    sums[number] = accumulate_float32(sums[number], gradient)
        gradients = iter(
            [
                None if gradient is None else gradient.to(weight.dtype)
                for gradient, weight in zip(sums, weights, strict=True)
            ]
        )
        of_weights = (next(gradients) if is_needed else None for is_needed in needs_weights)
        return (grad_x, None, None, None, None, *of_weights)


class _RandomAndAutocastState:
    """The generators and autocast as they were in the forward pass: with its input they decide a module's output."""

    def __init__(self, device: torch.device) -> None:
        device_type = self._device_type = device.type
        self._devices = [device] if device_type == "cuda" else []
        self._states = [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(cuda_device) for cuda_device in self._devices),
        ]
        self._autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same random numbers and compute in the same type inside; restore the present state afterwards."""
        enabled, dtype = self._autocast
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self._devices))
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            stack.enter_context(torch.autocast(self._device_type, dtype=dtype, enabled=enabled))
            yield


def _tiles(count: int, tokens: int) -> list[slice]:
    """Cut `count` tokens into the fewest tiles of at most `tokens`, of equal length up to one token."""
    number = -(-count // tokens)  # even tiles, because a short last one would not keep the device busy
    return [slice(start, stop) for start, stop in pairwise(count * index // number for index in range(number + 1))]


def _over_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tokens: int, select: SelectChunks = every_chunk
) -> Tensor:
    row_output = None
    for part in select(_tiles(x.shape[1], tokens)):
        output = function(x[:, part])
        if row_output is None:  # the module alone says how wide its output is, and of which type
            row_output = output.new_empty(1, x.shape[1], output.shape[-1])
        row_output[:, part] = output
    assert row_output is not None, "there is at least one token"
    return row_output


def tiled_forward(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tokens: int,
    weights: Sequence[Tensor],
    select: SelectChunks = every_chunk,
) -> Tensor:
    """Return `function(x)`, computed over tiles of at most `tokens` rows, [..., K] -> [..., M] (arXiv:2506.13996).

    function: treats each row by itself. x: contiguous. weights: every tensor of `function` that may need a gradient.
    """
    rows = x.reshape(1, -1, x.shape[-1])
    if torch.is_grad_enabled():
        # An empty tensor that needs a gradient makes torch build a node of the graph, which holds the input.
        saved_input = _SaveInput.apply(torch.empty(0, requires_grad=True), rows.detach()).grad_fn
        output: Tensor = _TiledForward.apply(rows, function, tokens, select, saved_input, *weights)
    else:
        output = _over_tiles(function, rows, tokens, select)
    return output.view(*x.shape[:-1], -1)


class _Tiled:
    """Mixin for a module that treats each token by itself: rows longer than a tile run a tile at a time."""

    _tile_numbers: int
    _select: SelectChunks
    parameters: Callable[[], Iterator[nn.Parameter]]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Compute the module's output, [..., K] -> [..., M]."""
        forward: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        tokens = self._tile_numbers // x.shape[-1]  # norms of single heads are narrower, so they take more rows
        if args or kwargs or x.numel() // x.shape[-1] <= tokens or not x.is_contiguous():
            return forward(x, *args, **kwargs)
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        return tiled_forward(forward, x, tokens, trained, self._select)


def run_in_tiles(
    base: PreTrainedModel,
    *,
    probe: bool = True,
    select: SelectChunks = every_chunk,
    whole: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> Decision:
    """Run norms and feed-forward modules of a transformers model in tiles; see `tile_decoder`."""
    width = int(base.config.get_text_config().hidden_size)
    tiling = tile_decoder(base.get_decoder(), width, probe=probe, select=select, whole=whole)
    kinds = [f"{tiling.norms} norms"] * (tiling.norms > 0) + [f"{tiling.feed_forwards} feed-forward modules"] * (
        tiling.feed_forwards > 0
    )
    skipped = "".join(f"; not {name}: {reason}" for name, reason in tiling.skipped.items())
    if not kinds:
        return Decision("training.tiles", "none", f"this model has no module that treats each token by itself{skipped}")
    size = "as many as the model is wide, so a tile's products are as large as the weights it reads"
    return Decision("training.tiles", f"{tiling.tokens:,} tokens", f"{' and '.join(kinds)}; {size}{skipped}")


def tile_decoder(
    decoder: nn.Module,
    width: int,
    *,
    probe: bool = True,
    select: SelectChunks = every_chunk,
    whole: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> Tiling:
    """Run norms and feed-forward modules of a transformers decoder in tiles, in place.

    width: of the residual stream. probe: run one module of each feed-forward class whole and in tiles on a few tokens,
    and leave the class as it is where the outputs differ; fake tensors have no values to compare. select: the tiles
    that run. whole: the context in which a block has all of its weights, for a model whose weights are sharded.
    """
    tokens = tokens_of_tile(width)
    # Norms need no probe: they are over the last dimension alone.
    norms = [module for module in decoder.modules() if _is_norm(module)]
    reasons_against: dict[str, str | None] = {}
    feed_forwards = []
    children = [(block, child) for block in checkpointable_blocks(decoder) for child in block.children()]
    for block, module in children:
        if not _may_be_feed_forward(module):
            continue
        name = original_class_name(module)
        if name not in reasons_against:
            with whole(block):
                reasons_against[name] = _unknown_layers(module) or (_probe(module, width) if probe else None)
        if reasons_against[name] is None:
            feed_forwards.append(module)
    for module in (*norms, *feed_forwards):
        patch(module, _Tiled, "Tiled")
        module.__dict__.update(_tile_numbers=tokens * width, _select=select)
    skipped = {name: reason for name, reason in reasons_against.items() if reason is not None}
    return Tiling(tokens, len(norms), len(feed_forwards), skipped)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm over the last dimension."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not any(module.children())


def _may_be_feed_forward(module: nn.Module) -> bool:
    return any(module.children()) and "Attention" not in type(module).__name__


def _unknown_layers(module: nn.Module) -> str | None:
    """Name the layers of a feed-forward module that are not known to treat each token by itself, or return None."""
    layers = [child for child in module.modules() if child._parameters or not any(child.children())]
    unknown = dict.fromkeys(original_class_name(layer) for layer in layers if not _is_tokenwise(layer))
    return f"it holds {' and '.join(unknown)}" if unknown else None


def _is_tokenwise(layer: nn.Module) -> bool:
    return type(layer).__name__ in TOKENWISE_LAYERS or type(layer).__module__ in TOKENWISE_MODULES or _is_norm(layer)


def _probe(module: nn.Module, width: int) -> str | None:
    """Run the module whole and in tiles on six arbitrary tokens, [1, 6, K]; None when the outputs are the same."""
    weight = next(module.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    x = torch.arange(6 * width, device=weight.device, dtype=torch.float32).sin().to(dtype).view(1, 6, width)
    try:
        with eval_mode(module):
            whole, tiled = module(x), _over_tiles(module, x, 4)
    except PROBE_ERRORS as error:
        return f"it cannot be run on a few tokens ({type(error).__name__})"
    difference = (whole.double() - tiled.double()).norm() / whole.double().norm().clamp_min(1e-30)
    return None if float(difference) <= TOLERANCE else "its outputs depend on what other tokens stand beside"


TOLERANCE = 2e-2
"""Largest difference relative to the outputs' norm: rounding in bf16 stays below it, and a token that sees its
neighbour differs ten times as much."""

PROBE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)

TOKENWISE_MODULES = ("torch.nn.modules.activation", "transformers.activations", "torch.nn.modules.dropout")
"""Python modules whose layers all treat each number by itself."""

TOKENWISE_LAYERS = frozenset(
    ("Linear", "Conv1D", "Linear4bit", "Identity", "ModuleDict", "ParameterDict", "DoraLinearLayer")
)
"""Classes of layers that treat each token by itself (empty dictionaries are peft's). 8-bit layers do not: they look for
outlying columns over all tokens (arXiv:2208.07339)."""
