"""NEFTune (arXiv:2310.05914): uniform noise on the input embeddings, in training only.

Legend: B rows of a micro-batch, T positions, N real tokens, D width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from llmtune.common.memory import copy_to
from llmtune.data.dataset.micro_batch import MicroBatch

__all__ = ["Neftune", "noise_scale"]


class Neftune:
    """A loss function with noisy embeddings (NEFTune, arXiv:2310.05914).

    Each component of a token's embedding moves by up to alpha / sqrt(length x D).
    `length` is that of the token's example, and noise is drawn for real tokens only, in order, so that it depends
    neither on padding nor on packing. It comes from torch's global generator of the device, whose state a checkpoint
    holds. There is none while `embedding` is in evaluation mode. Call it in place of `nll_sum`; `remove` removes the
    noise from the model.
    """

    def __init__(self, nll_sum: Callable[[MicroBatch], torch.Tensor], embedding: nn.Module, alpha: float) -> None:
        self._nll_sum = nll_sum
        self._alpha = alpha
        self._batch: MicroBatch | None = None
        self._hook = embedding.register_forward_hook(self._add_noise)

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """Sum the weighted negative log-likelihoods of a micro-batch under noise: nats, float32 []."""
        self._batch = batch
        try:
            return self._nll_sum(batch)
        finally:
            self._batch = None

    def remove(self) -> None:
        """Remove the noise from the model."""
        self._hook.remove()

    def _add_noise(self, embedding: nn.Module, _inputs: object, embedded_BTD: torch.Tensor) -> torch.Tensor | None:
        if self._batch is None or not embedding.training:
            return None
        batch, width = self._batch, embedded_BTD.shape[-1]
        assert embedded_BTD.shape[:-1] == batch.input_ids.shape, "the model embeds another batch than the one at hand"
        # Only as many draws as there are real tokens: the same row then gets the same noise with and without padding.
        draws_ND = torch.rand(batch.num_tokens, width, device=embedded_BTD.device) * 2 - 1
        if batch.attention_mask is None:
            noise_BTD = draws_ND.view(*batch.input_ids.shape, width)
        else:
            real_BT = copy_to(batch.attention_mask, embedded_BTD.device)[..., None]
            noise_BTD = torch.zeros_like(embedded_BTD, dtype=draws_ND.dtype).masked_scatter(real_BT, draws_ND)
        scale_BT = copy_to(noise_scale(batch, self._alpha, width), embedded_BTD.device)
        return embedded_BTD + (noise_BTD * scale_BT[..., None]).to(embedded_BTD.dtype)


def noise_scale(batch: MicroBatch, alpha: float, width: int) -> torch.Tensor:
    """Give the noise's scale for every position, float32 [B, T].

    scale = alpha / sqrt(L D) with L the length of the token's example and D the width (arXiv:2310.05914, algorithm 1)
    """
    if batch.segments is not None:
        lengths = batch.segments.diff()
        lengths_BT = lengths.repeat_interleave(lengths)[None]
    elif batch.attention_mask is not None:
        lengths_BT = batch.attention_mask.sum(dim=1, keepdim=True).expand(batch.input_ids.shape)
    else:
        lengths_BT = torch.full(batch.input_ids.shape, batch.input_ids.shape[1])
    return alpha / math.sqrt(width) * lengths_BT.float().rsqrt()
