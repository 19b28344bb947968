"""Attention inside each segment of one flat row, plugged into transformers through its attention interface.

A flat micro-batch lays documents one after the other in one row, without padding; `segments` says where each begins.
Nothing of one document may reach another, not even a rounding error (promise N5), so every backend here computes a
document's attention from its own keys alone.

The boundaries travel as the model's attention mask: a 4-D int32 tensor, which transformers models hand through to the
attention function as it is (also when a block is recomputed for gradient checkpointing), so no dense mask and no
keyword of ours is needed. Any other mask means an ordinary call (generation, padded batches) and gets the library's own
attention.

Shapes: T tokens of the row, S documents, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from inspect import signature
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llmtune.common.memory import copy_to
from llmtune.errors import ModelError
from llmtune.kernels.chunks import SelectChunks, every_chunk
from llmtune.kernels.tiled_attention import tiled_attention

__all__ = [
    "BACKENDS",
    "AttentionParams",
    "Backend",
    "Segments",
    "dense_mask",
    "dropout_by_sdpa",
    "is_segment_mask",
    "segment_mask",
    "segments_of",
    "tiles_backend",
    "use_attention",
    "use_segment_attention",
]

IMPLEMENTATION_NAMES = {"sdpa": "llmtune_segments_by_document"}
"""Names under which backends are registered with transformers, where not `llmtune_segments_` and their own.

A model that has no attention by `sdpa` refuses every name that holds that word.
"""


class AttentionParams(NamedTuple):
    """The parameters of a layer's attention: softmax(softcap * tanh(scale * q k^T / softcap)) v, with a window."""

    scale: float
    """Factor of the scores."""
    window: int | None = None
    """Tokens that a query sees, itself included (sliding window, arXiv:2004.05150); None for all before it."""
    softcap: float | None = None
    """Bound of the scores (Gemma 2, arXiv:2408.00118); None for no bound."""
    dropout: float = 0.0
    """Probability with which an attention weight becomes 0."""


@dataclass(eq=False)
class Segments:
    """The documents of a flat row, as variable-length flash attention takes them."""

    cu_seqlens: Tensor
    """Cumulative document lengths, int32 [S+1]: first 0, last T."""
    max_seqlen: int
    """Tokens of the longest document."""
    numbers: tuple[int, ...] | None = None
    """The cumulative lengths as numbers, where the host had them."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """Masks of flex attention by window, made by the first layer of each."""

    def boundaries(self) -> tuple[int, ...]:
        """Return the cumulative lengths as numbers; only without `numbers` this waits for a CUDA device."""
        if self.numbers is None:
            self.numbers = tuple(self.cu_seqlens.tolist())
        return self.numbers


def segment_mask(cu_seqlens: Tensor, max_seqlen: int, device: torch.device) -> Tensor:
    """Wrap cumulative document lengths as the attention mask of a flat row.

    The lengths are those of variable-length attention: https://github.com/Dao-AILab/flash-attention

    cu_seqlens: int32 [S+1], first 0, last T, strictly rising. max_seqlen: tokens of the longest document. Returns int32
    [1, 1, max_seqlen, S+1] that occupies S+1 numbers.
    """
    numbers = tuple(cu_seqlens.tolist()) if cu_seqlens.device.type == "cpu" else None
    marks = copy_to(cu_seqlens.to(torch.int32), device)
    # The longest length travels in the shape: read from the tensor, every layer would wait for the device.
    mask = marks.view(1, 1, 1, -1).expand(1, 1, max_seqlen, -1)
    mask.__dict__["_segments"] = Segments(marks, max_seqlen, numbers)  # on the object, so all layers share it
    return mask


def segments_of(mask: Tensor) -> Segments:
    """Return the documents of a mask made by `segment_mask`, int32 [1, 1, max_seqlen, S+1], also of a copy of it."""
    segments: Segments | None = mask.__dict__.get("_segments")
    return Segments(mask[0, 0, 0], mask.shape[2]) if segments is None else segments


def is_segment_mask(mask: Tensor | None) -> bool:
    """Whether an attention mask of any shape carries document boundaries made by `segment_mask`."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4


def dense_mask(boundaries: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
    """Return bool [T, T]: True where query i may see key j. Tests compare every backend with this definition.

    visible[i, j] = (document(i) is document(j)) and 0 <= i - j < window
    """
    position_T = torch.arange(boundaries[-1], device=device)
    document_T = torch.zeros_like(position_T)
    for start in boundaries[1:-1]:  # a tensor of the boundaries would be copied, and waited for
        document_T[start:] += 1
    distance_TT = position_T[:, None] - position_T[None, :]
    visible_TT = (document_T[:, None] == document_T[None, :]) & (distance_TT >= 0)
    return visible_TT if window is None else visible_TT & (distance_TT < window)


def _repeat_heads(key: Tensor, heads: int) -> Tensor:
    """Repeat grouped key or value heads (arXiv:2305.13245) to one for each query head: [1, G, T, D] -> [1, H, T, D]."""
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


Backend = Callable[[Tensor, Tensor, Tensor, Segments, AttentionParams], Tensor]


def dropout_by_sdpa(backend: Backend) -> Backend:
    """Wrap a backend that has no dropout: calls with dropout go to SDPA, [1, H, T, D] -> [1, T, H, D]."""

    @wraps(backend)
    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, params: AttentionParams) -> Tensor:
        # Decided at each call: the engine's probe runs without dropout and would not notice that it is left out.
        return (_sdpa if params.dropout else backend)(query, key, value, segments, params)

    return attend


def tiles_backend(select: SelectChunks = every_chunk) -> Backend:
    """Make the backend of explicit matrix products over tiles, [1, H, T, D] -> [1, T, H, D].

    select: the tiles that run; all of them but in a memory plan.
    """

    @dropout_by_sdpa
    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, params: AttentionParams) -> Tensor:
        return tiled_attention(
            query,
            key,
            value,
            segments.boundaries(),
            scale=params.scale,
            window=params.window,
            softcap=params.softcap,
            select=select,
        )

    return attend


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, params: AttentionParams) -> Tensor:
    """Call torch's scaled dot-product attention once for each document."""
    if params.softcap is not None:
        # The engine's probe catches this and tries the next backend.
        raise NotImplementedError("scaled_dot_product_attention has no soft cap on scores")
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    outputs = []
    for start, stop in pairwise(segments.boundaries()):
        span, length = slice(start, stop), stop - start
        # `is_causal` has a fused kernel; a mask, needed only where the window hides something, has a slower one.
        is_windowed = params.window is not None and length > params.window
        mask = dense_mask((0, length), params.window, query.device) if is_windowed else None
        outputs.append(
            functional.scaled_dot_product_attention(
                query[:, :, span],
                key[:, :, span],
                value[:, :, span],
                attn_mask=mask,
                dropout_p=params.dropout,
                is_causal=mask is None,
                scale=params.scale,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


@dropout_by_sdpa
def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, params: AttentionParams) -> Tensor:
    """Call torch's variable-length flash attention (torch.nn.attention.varlen, arXiv:2307.08691): CUDA, 16 bits."""
    if params.softcap is not None:
        raise NotImplementedError("variable-length flash attention has no soft cap on scores")
    cu_seqlens = segments.cu_seqlens.contiguous()  # the mask that carries it is an expanded view
    grouped: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in signature(varlen_attn).parameters:  # torch 2.11
        grouped = {}
        key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    output = varlen_attn(
        # Not `query[0]`, whose backward pass fills a tensor with zeros first.
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        cu_seqlens,
        cu_seqlens,
        segments.max_seqlen,
        segments.max_seqlen,
        scale=params.scale,
        # Tokens to the left and right of the query, which itself is not counted; -1 is no bound.
        window_size=(-1 if params.window is None else params.window - 1, 0),
        **(grouped if query.shape[1] != key.shape[1] else {}),
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


@dropout_by_sdpa
def _flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments, params: AttentionParams) -> Tensor:
    """Call torch's flex attention (arXiv:2412.05496) with a document mask; compiled on CUDA."""
    total, device = query.shape[2], query.device
    document_T = torch.bucketize(torch.arange(total, device=device), segments.cu_seqlens[1:].contiguous(), right=True)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_visible = (document_T[q] == document_T[k]) & (q >= k)
        return is_visible if params.window is None else is_visible & (q - k < params.window)

    def capped(score: Tensor, *_indices: Tensor) -> Tensor:
        return score if params.softcap is None else params.softcap * torch.tanh(score / params.softcap)

    # Uncompiled it writes all scores out, which on a CPU serves tests only.
    attend: Callable[..., Tensor] = _compiled_flex() if device.type == "cuda" else flex_attention  # type: ignore[assignment]
    # One mask for all layers of a window, and for their recomputation: it costs more than the attention of a layer.
    if params.window not in segments.block_masks:
        segments.block_masks[params.window] = create_block_mask(visible, None, None, total, total, device=str(device))
    output = attend(
        query,
        key,
        value,
        score_mod=capped,
        block_mask=segments.block_masks[params.window],
        scale=params.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    # Dynamic, or every length of a row would be compiled anew.
    return torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]


def _eager(query: Tensor, key: Tensor, value: Tensor, segments: Segments, params: AttentionParams) -> Tensor:
    """Compute all scores of the row under one dense mask, softmax in float32. For checking, not for speed."""
    mask = dense_mask(segments.boundaries(), params.window, query.device)
    return _dense_attention(query, key, value, mask, params)


def _dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, params: AttentionParams) -> Tensor:
    scores = torch.matmul(query, _repeat_heads(key, query.shape[1]).transpose(2, 3)) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=params.dropout)
    return torch.matmul(weights, _repeat_heads(value, query.shape[1])).transpose(1, 2)


class _OtherArguments(TypedDict, total=False):
    """Further keywords that transformers passes to an attention function."""

    s_aux: Tensor | None
    """Attention sinks, one logit a head (GPT-OSS)."""
    position_bias: Tensor | None
    """Bias of the scores by distance (T5)."""


UNSUPPORTED: tuple[Literal["s_aux", "position_bias"], ...] = ("s_aux", "position_bias")
"""Keywords that change the scores in a way no backend computes; a model with one of them gets the plain engine."""


def _library_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    others: _OtherArguments,
) -> tuple[Tensor, None]:
    """Compute an ordinary call (generation, padding) as the library would."""
    if params.softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=params.dropout, scaling=params.scale, **others
        )
    if mask is None and query.shape[2] > 1:
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        # With a cache of earlier keys the queries are the last ones, so the diagonal ends in the lower right corner.
        mask = causal.tril(key.shape[2] - query.shape[2])
    return _dense_attention(query, key, value, mask, params), None


def _attention_function(backend: Backend) -> Callable[..., tuple[Tensor, None]]:
    """Make the function that transformers calls in every attention layer from a backend for flat rows."""

    # `boundaries()` reads a tensor's values, where a compiled graph would break in every layer.
    @torch.compiler.disable
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Unpack[_OtherArguments],
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling  # 1 / sqrt(D), arXiv:1706.03762
        params = AttentionParams(scale, sliding_window, softcap, dropout)
        if attention_mask is None or not is_segment_mask(attention_mask):
            return _library_attention(module, query, key, value, attention_mask, params, others)
        unsupported = [name for name in UNSUPPORTED if others.get(name) is not None]
        if unsupported or not module.is_causal:
            raise NotImplementedError(
                f"attention by segments does not know {', '.join(unsupported) or 'attention that is not causal'}"
            )
        # Autocast does not reach into the backends' own functions, so its type is given to their inputs here.
        device_type = query.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype
        return backend(query.to(dtype), key.to(dtype), value.to(dtype), segments_of(attention_mask), params), None

    return attend


def use_segment_attention(model: PreTrainedModel, backend: str, attend: Backend | None = None) -> str:
    """Make `model` compute attention by segments with a backend of `BACKENDS`.

    Returns the name of the implementation it had before; `use_attention` sets that again.

    attend: used in place of the backend: around it, or in a plan where it cannot run on tensors without numbers.

    Ordinary calls (any other mask) still get the library's own attention, so generation needs no switching back. Raises
    ModelError when the model does not take it.
    """
    name = IMPLEMENTATION_NAMES.get(backend, f"llmtune_segments_{backend}") + ("" if attend is None else "_stand_in")
    AttentionInterface.register(name, _attention_function(attend or BACKENDS[backend]))
    AttentionMaskInterface.register(name, sdpa_mask)
    return use_attention(model, name)


def use_attention(model: PreTrainedModel, name: str) -> str:
    """Set a transformers attention implementation by name; returns the one before.

    Raises ModelError when the model does not take it.
    """
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ModelError(f"attention `{name}` does not work here: {error}", fix="use model.attention: auto") from error
    if model.config._attn_implementation != name:  # a model may refuse without an error
        raise ModelError(f"{type(model).__name__} does not take attention `{name}`", fix="use model.attention: auto")
    return before


BACKENDS: dict[str, Backend] = {
    "tiles": tiles_backend(),
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flex": _flex,
    "eager": _eager,
}
"""Backends of attention by segments, [1, H, T, D] -> [1, T, H, D]; all equal attention under `dense_mask`."""
