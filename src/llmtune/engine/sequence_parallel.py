"""Rows that several processes share, for rows too long for one device: Ulysses (arXiv:2309.14509).

Each process computes a run of a row's positions through the whole model, head and loss included. Only attention looks
at other positions: there an all-to-all gives each process all positions of a part of the heads, and another one gives
it back its own positions, of all heads. So everything that keeps documents apart in a whole row does so here, and what
a process keeps for the backward pass is a part of what it would keep of the whole row.

Shapes: T tokens of the row, P processes that share it, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from functools import wraps

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llmtune.common.decisions import Decision
from llmtune.engine.devices import Devices
from llmtune.engine.objective import RowPart
from llmtune.errors import ConfigError, ModelError
from llmtune.kernels.attention import AttentionParams, Backend, Segments
from llmtune.kernels.autograd import Context

__all__ = ["SharedRows", "shared_heads"]


class SharedRows:
    """The part of this process in the rows that it shares with others; all of them call each method together."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self.part = RowPart(devices.rank % devices.row_size, devices.row_size)

    def check_heads(self, shape: PreTrainedConfig) -> Decision:
        """Say what each process computes. Raises ConfigError for a model whose heads cannot be shared evenly."""
        heads, count = getattr(shape.get_text_config(), "num_attention_heads", 1), self.part.count
        reason = against_heads(heads, count)
        if reason is not None:
            divisors = [str(number) for number in range(2, heads + 1) if heads % number == 0]
            fix = f"set it to {', '.join([*divisors, 'or 1'])}, and start as many processes or a multiple"
            raise ConfigError(reason, where="distributed.sequence_parallel", fix=fix)
        reason = f"processes share each row: each has 1/{count} of its positions, and {heads // count} of {heads} heads"
        return Decision("distributed.sequence_parallel", count, reason)

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor of any shape over the processes r that share the rows: total = sum_r value_r."""
        return self._devices.sum_of_row(value)

    def attention(self, backend: Backend) -> Backend:
        """Wrap a backend: from the positions of this process, [1, H, T/P, D], to theirs, [1, T/P, H, D]."""

        @wraps(backend)
        def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, params: AttentionParams) -> Tensor:
            count, heads = self.part.count, query.shape[1]
            if (reason := against_heads(heads, count)) is not None:
                raise ModelError(reason)
            repeats = shared_heads(key.shape[1], count) // key.shape[1]
            if repeats > 1:  # as many as processes: a query head still finds its key head by its number
                key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            query, key, value = self._to_heads(query, key, value)
            return self._to_positions(backend(query, key, value, segments, params))

        return attend

    def _to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """From a part of the positions to one of the heads: [1, H, T/P, D] -> [1, H/P, T, D] each, in one message."""
        count = self.part.count
        parts = torch.cat([tensor.reshape(count, -1) for tensor in tensors], dim=1)
        received = self._exchange(parts).split([tensor.numel() // count for tensor in tensors], dim=1)
        return [
            part.view(count, heads // count, tokens, width).transpose(0, 1).reshape(1, heads // count, -1, width)
            for part, (_, heads, tokens, width) in zip(received, (tensor.shape for tensor in tensors), strict=True)
        ]

    def _to_positions(self, output: Tensor) -> Tensor:
        """From a part of the heads back to a part of the positions: [1, T, H/P, D] -> [1, T/P, H, D]."""
        count, (_, tokens, heads, width) = self.part.count, output.shape
        received = self._exchange(output.reshape(count, tokens // count, heads, width))
        return received.transpose(0, 1).reshape(1, tokens // count, count * heads, width)

    def _exchange(self, parts: Tensor) -> Tensor:
        received: Tensor = _Exchange.apply(parts, self._devices)
        return received


def shared_heads(heads: int, count: int) -> int:
    """Give the number of key heads of which each of `count` processes gets as many: grouped ones are repeated for it.

    >>> shared_heads(8, 4), shared_heads(2, 4), shared_heads(4, 6)
    (8, 4, 12)
    """
    return math.lcm(heads, count)


def against_heads(heads: int, count: int) -> str | None:
    """Say why `count` processes cannot share a model's attention heads, or None."""
    return f"{count} processes cannot share the {heads} attention heads of the model evenly" if heads % count else None


class _ExchangeContext(Context):
    devices: Devices


class _Exchange(torch.autograd.Function):
    """`Devices.exchange`, whose gradient goes the same way back."""

    @staticmethod
    def forward(ctx: _ExchangeContext, parts: Tensor, devices: Devices) -> Tensor:
        ctx.devices = devices
        return devices.exchange(parts.contiguous())

    @staticmethod
    def backward(ctx: _ExchangeContext, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.devices.exchange(grad.contiguous()), None
