"""Attention inside each segment of one flat row, plugged into transformers through its attention interface.

A flat micro-batch lays documents one after the other in one row, without padding; `segments` says where each begins.
Nothing of one document may reach another, not even a rounding error, so every backend here computes a document's
attention from its own keys alone.

The boundaries travel as the model's attention mask: a 4-D int32 tensor, which transformers models hand through to the
attention function as it is (also when a block is recomputed for gradient checkpointing), so no dense mask and no
keyword of ours is needed. Any other mask means an ordinary call (generation, padded batches) and gets the library's own
attention.

Shapes: T tokens of the row, S documents, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llmtune.errors import ModelError
from llmtune.kernels.chunks import SelectChunks, every_chunk
from llmtune.kernels.tiled_attention import tiled_attention

__all__ = [
    "BACKENDS",
    "Backend",
    "Rule",
    "Segments",
    "dense_mask",
    "dropout_by_sdpa",
    "is_segment_mask",
    "segment_mask",
    "tiles_backend",
    "use_attention",
    "use_segment_attention",
]

NAME = "llmtune_segments_{backend}"


class Rule(NamedTuple):
    """The rule of a layer for its scores.

    Multiplied by `scale`, bent to `softcap * tanh(score / softcap)`, hidden beyond `window` tokens.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


class Segments(NamedTuple):
    """The documents of a flat row: cumulative lengths, int32 [S+1], and the tokens of the longest one."""

    marks: Tensor
    longest: int

    def on_host(self) -> tuple[int, ...]:
        """Return the cumulative lengths as numbers; on a CUDA device this waits for it."""
        return tuple(self.marks.tolist())


def segment_mask(segments: Tensor, longest: int, device: torch.device) -> Tensor:
    """Wrap cumulative document lengths as the attention mask of a flat row.

    segments: int32 [S+1], first 0, last T, strictly rising. longest: tokens of the longest document; it travels in the
    shape, so that nobody waits for a device to say it. Returns int32 [1, 1, longest, S+1] that occupies S+1 numbers.
    """
    return segments.to(device=device, dtype=torch.int32, non_blocking=True).view(1, 1, 1, -1).expand(1, 1, longest, -1)


def is_segment_mask(mask: Tensor | None) -> bool:
    """Whether an attention mask carries document boundaries made by `segment_mask`."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4


def dense_mask(marks: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
    """Return bool [T, T]: True where query i may see key j. The definition the fast backends are held to."""
    position_T = torch.arange(marks[-1], device=device)
    document_T = torch.bucketize(position_T, torch.tensor(marks[1:], device=device), right=True)
    distance_TT = position_T[:, None] - position_T[None, :]
    seen_TT = (document_T[:, None] == document_T[None, :]) & (distance_TT >= 0)
    return seen_TT if window is None else seen_TT & (distance_TT < window)


def _repeat_heads(key: Tensor, heads: int) -> Tensor:
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


Backend = Callable[[Tensor, Tensor, Tensor, Segments, Rule], Tensor]


def dropout_by_sdpa(backend: Backend) -> Backend:
    """Give calls with dropout to SDPA, for a backend that has none.

    The probe of a model runs without dropout, so it does not see that such a backend would leave it out.
    """

    @wraps(backend)
    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
        return (_sdpa if rule.dropout else backend)(query, key, value, segments, rule)

    return attend


def tiles_backend(select: SelectChunks = every_chunk) -> Backend:
    """Explicit matrix products over tiles of each document; only the tiles that `select` returns, for a plan."""

    @dropout_by_sdpa
    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
        return tiled_attention(
            query,
            key,
            value,
            segments.on_host(),
            scale=rule.scale,
            window=rule.window,
            softcap=rule.softcap,
            select=select,
        )

    return attend


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
    """Call torch's scaled dot-product attention once for each document."""
    if rule.softcap is not None:
        raise NotImplementedError("scaled_dot_product_attention has no soft cap on scores")
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    outputs = []
    for start, stop in pairwise(segments.on_host()):
        span, length = slice(start, stop), stop - start
        mask = (
            None if rule.window is None or length <= rule.window else dense_mask((0, length), rule.window, query.device)
        )
        outputs.append(
            functional.scaled_dot_product_attention(
                query[:, :, span],
                key[:, :, span],
                value[:, :, span],
                attn_mask=mask,
                dropout_p=rule.dropout,
                is_causal=mask is None,
                scale=rule.scale,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


@dropout_by_sdpa
def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
    """Call torch's variable-length flash attention (torch.nn.attention.varlen): CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn

    if rule.softcap is not None:
        raise NotImplementedError("variable-length flash attention has no soft cap on scores")
    marks = segments.marks.contiguous()
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        marks,
        marks,
        segments.longest,
        segments.longest,
        scale=rule.scale,
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


@dropout_by_sdpa
def _flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
    """Call torch's flex attention with a document mask; compiled on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total, device = query.shape[2], query.device
    document_T = torch.bucketize(torch.arange(total, device=device), segments.marks[1:].contiguous(), right=True)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (document_T[q] == document_T[k]) & (q >= k)
        return seen if rule.window is None else seen & (q - k < rule.window)

    def capped(score: Tensor, *_where: Tensor) -> Tensor:
        return score if rule.softcap is None else rule.softcap * torch.tanh(score / rule.softcap)

    attend: Any = flex_attention
    if device.type == "cuda":
        attend = _compiled_flex()
    blocks = create_block_mask(visible, None, None, total, total, device=str(device))
    output: Tensor = attend(
        query,
        key,
        value,
        score_mod=capped,
        block_mask=blocks,
        scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]


def _eager(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
    """Write the definition out: all scores, one dense mask, softmax in float32. For checking, not for speed."""
    mask = dense_mask(segments.on_host(), rule.window, query.device)
    return _attend_dense(query, key, value, mask, rule)


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    scores = torch.matmul(query, _repeat_heads(key, query.shape[1]).transpose(2, 3)) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=rule.dropout)
    return torch.matmul(weights, _repeat_heads(value, query.shape[1])).transpose(1, 2)


def _library(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule, others: dict[str, Any]
) -> Any:
    """Answer an ordinary call (generation, padding) as the library would."""
    if rule.softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=rule.dropout, scaling=rule.scale, **others
        )
    if mask is None and query.shape[2] > 1:
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = causal.tril(key.shape[2] - query.shape[2])
    return _attend_dense(query, key, value, mask, rule), None


def _attention_function(backend: Backend) -> Callable[..., Any]:
    """Make the function that transformers calls in every attention layer from one that knows flat rows only."""

    @torch.compiler.disable
    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, dropout)
        if attention_mask is None or not is_segment_mask(attention_mask):
            return _library(module, query, key, value, attention_mask, rule, others)  # type: ignore[no-any-return]
        unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
        if unknown or not module.is_causal:
            raise NotImplementedError(
                f"attention by segments does not know {', '.join(unknown) or 'attention that is not causal'}"
            )
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        segments = Segments(attention_mask[0, 0, 0], attention_mask.shape[2])
        return backend(query.to(dtype), key.to(dtype), value.to(dtype), segments, rule), None

    return attend


def use_segment_attention(model: Any, backend: str, attend: Backend | None = None) -> str:
    """Make `model` compute attention by segments with a backend of `BACKENDS`.

    Returns the name of the implementation it had.

    attend: used in its place, for a plan where the backend itself cannot run on tensors without numbers.

    Ordinary calls (any other mask) still get the library's own attention, so generation needs no switching back. Undo
    with `use_attention`. Raises ModelError when the model does not take it.
    """
    name = NAME.format(backend=backend if attend is None else f"{backend}_stand_in")
    AttentionInterface.register(name, _attention_function(attend or BACKENDS[backend]))
    AttentionMaskInterface.register(name, sdpa_mask)
    return use_attention(model, name)


def use_attention(model: Any, name: str) -> str:
    """Set a transformers attention implementation by name; returns the one before.

    Raises ModelError when the model does not take it.
    """
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ModelError(f"attention `{name}` does not work here: {error}", fix="use model.attention: auto") from error
    if model.config._attn_implementation != name:
        raise ModelError(f"{type(model).__name__} does not take attention `{name}`", fix="use model.attention: auto")
    return before


BACKENDS: dict[str, Backend] = {
    "tiles": tiles_backend(),
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flex": _flex,
    "eager": _eager,
}
"""Ways to compute attention by segments; all equal attention under `dense_mask`."""
