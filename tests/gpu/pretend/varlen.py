"""Variable-length flash attention in plain operations of the host, forward and backward, with its kernel's demands."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from pretend.machine import DEVICE
from torch import Tensor


def _visible(length: int, *, causal: bool, window: tuple[int, int] | None) -> Tensor:
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    visible = torch.ones(length, length, dtype=torch.bool)
    if causal or (window is not None and window[1] == 0):
        visible &= distance >= 0
    if window is not None and window[0] >= 0:
        visible &= distance <= window[0]
    return visible


def _documents(ends: Tensor, *rows: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each document with its part of each of `rows` [T, heads, D], as float32 [heads, tokens, D]."""
    for start, stop in pairwise(ends.tolist()):
        yield slice(start, stop), [row[start:stop].transpose(0, 1).float() for row in rows]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    _max_query: int,
    _max_key: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    *_others: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, H, D], log of the sums [H, T], state of the random generator."""
    assert ends is key_ends or torch.equal(ends, key_ends)
    assert ends.dtype == torch.int32, "cu_seqlens must be int32"
    assert ends.is_contiguous(), "cu_seqlens must be contiguous"
    assert query.dtype in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16 and bf16"
    assert query.stride(-1) == 1, "the last dimension must be contiguous"
    assert query.shape[-1] % 8 == 0, "the head width must be a multiple of 8"
    assert query.shape[-1] <= 256, "the head width must be at most 256"
    if DEVICE.card.capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs, sums = [], []
    for span, (q, k, v) in _documents(ends, query, key, value):
        repeats = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        visible = _visible(span.stop - span.start, causal=is_causal, window=window)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        sums.append(torch.logsumexp(scores, -1))
        outputs.append((torch.softmax(scores, -1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype), torch.cat(sums, 1), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _output: Tensor,
    _sums: Tensor,
    ends: Tensor,
    _key_ends: Tensor,
    _max_query: int,
    _max_key: int,
    is_causal: bool,
    _rng: Tensor,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    *_others: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    assert grad.dtype == query.dtype, "query and dout must have the same dtype"
    assert grad.stride(-1) == 1, "dout must have a contiguous last dimension"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grads = [torch.zeros_like(row, dtype=torch.float32) for row in (query, key, value)]
    for span, (q, k, v, g) in _documents(ends, query, key, value, grad):
        groups, repeats = k.shape[0], q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        visible = _visible(span.stop - span.start, causal=is_causal, window=window)
        weights = torch.softmax((q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf")), -1)
        grad_weights = g @ v.transpose(1, 2)
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        shape = (groups, repeats, *q.shape[1:])
        grads[0][span] = (grad_scores @ k).transpose(0, 1)
        grads[1][span] = (grad_scores.transpose(1, 2) @ q).view(shape).sum(1).transpose(0, 1)
        grads[2][span] = (weights.transpose(1, 2) @ g).view(shape).sum(1).transpose(0, 1)
    return tuple(one.to(query.dtype) for one in grads)
