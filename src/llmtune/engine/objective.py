"""The loss, plainly: nats per trained token, as a sum that the loop divides once for the whole window.

Legend: B rows of a micro-batch, T positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from llmtune.data.dataset.micro_batch import MicroBatch

__all__ = ["IGNORED", "plain_nll_sum", "weighted_nll_sum"]

IGNORED = -100
"""Target of a position that is not trained; `cross_entropy` gives it loss 0 and gradient 0, exactly."""


def plain_nll_sum(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Give the weighted negative log-likelihood of a micro-batch, summed: nats, float32, shape [].

    The logits are those of the library's own forward. The batch is moved to the model's device. A flat batch needs a
    model whose attention keeps documents apart by their restarting `position_ids` (transformers >= 5 does so when no
    mask is given).
    """
    batch = batch.to(next(model.parameters()).device)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    )
    return weighted_nll_sum(output.logits, batch.input_ids, batch.weights)


def weighted_nll_sum(logits_BTV: torch.Tensor, ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
    """Sum `weights[b, t] * -log softmax(logits[b, t - 1])[ids[b, t]]` over t >= 1, in float32; shape [].

    Positions of weight 0 are left out, so whatever stands there (NaN too) adds nothing; without any trained token the
    sum is 0, with zero gradients.

    >>> uniform = torch.zeros(1, 3, 4)
    >>> round(weighted_nll_sum(uniform, torch.tensor([[0, 1, 2]]), torch.tensor([[0.0, 1.0, 0.5]])).item(), 6)  # 1.5 x log 4
    2.079442
    """
    weights = weights_BT[:, 1:].flatten()
    targets = ids_BT[:, 1:].flatten().masked_fill(weights == 0, IGNORED)
    logits = logits_BTV[:, :-1].flatten(0, 1).float()
    nats = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return torch.sum(nats * weights)
