"""The forward pass of a flat micro-batch: the library's own decoder on one row of documents, without padding.

Only the hidden states from which a trained token is predicted go on to the head, so its logits are never computed for
untrained tokens. Training, evaluation and the memory plan all run this one forward.

Shapes: T tokens of the row, S documents, N trained tokens, E width of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtune.data.dataset.micro_batch import MicroBatch
from llmtune.kernels.attention import segment_mask
from llmtune.kernels.linear_cross_entropy import Head, head_nll_sum, sequence_log_probs, trained_rows
from llmtune.models.parameters import base_model_of

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["FlatInputs", "flat_forward", "flat_inputs", "flat_log_probs", "flat_nll_sum"]


class FlatInputs(NamedTuple):
    """A flat micro-batch on its device, as decoder and loss take it."""

    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T], from 0 in each document."""
    mask: Tensor
    """Document boundaries as an attention mask, int32 [1, 1, longest, S+1] (see `segment_mask`)."""
    rows: Tensor
    """int64 [N]: positions from which a trained token is predicted, one before it."""
    targets: Tensor
    """int64 [N]: the trained tokens."""
    weights: Tensor
    """float32 [N]: their loss weights."""


def flat_inputs(batch: MicroBatch, device: torch.device) -> FlatInputs:
    """Move a flat micro-batch to `device`."""
    assert batch.segments is not None, "the flat engine needs segments"
    # Both are counted on the host before the copy: on a CUDA device each would wait for the stream.
    longest = int(batch.segments.diff().max())
    rows_N = trained_rows(batch.weights).to(device, non_blocking=True)
    batch = batch.to(device)
    assert batch.segments is not None
    mask = segment_mask(batch.segments, longest, device)
    next_N = rows_N + 1
    return FlatInputs(
        batch.input_ids, batch.position_ids, mask, rows_N, batch.input_ids[0, next_N], batch.weights[0, next_N]
    )


def flat_forward(model: PreTrainedModel | PeftModel, inputs: FlatInputs) -> Tensor:
    """Return the hidden states from which trained tokens are predicted, [N, E].

    `model` (bare or inside peft's wrapper) must have attention by segments, so that documents cannot see each other
    (promise N5).
    """
    decoder: nn.Module = base_model_of(model).get_decoder()
    hidden = decoder(
        input_ids=inputs.input_ids, position_ids=inputs.position_ids, attention_mask=inputs.mask, use_cache=False
    ).last_hidden_state
    trained_NE: Tensor = hidden[0, inputs.rows]
    return trained_NE


def flat_nll_sum(model: PreTrainedModel | PeftModel, batch: MicroBatch, *, head: Head, device: torch.device) -> Tensor:
    """Sum of weighted negative log-likelihoods of one flat micro-batch: nats, float32 [].

    nll_sum = sum_n weights[n] * -log softmax(head(hidden[n]))[targets[n]]
    """
    inputs = flat_inputs(batch, device)
    return head_nll_sum(head, flat_forward(model, inputs), inputs.targets, inputs.weights)


def flat_log_probs(
    model: PreTrainedModel | PeftModel, batch: MicroBatch, *, head: Head, device: torch.device
) -> Tensor:
    """Log-probability of the trained tokens of each document of a flat micro-batch: nats, float32 [S]."""
    inputs = flat_inputs(batch, device)
    rows_of_sequence_S = batch.sequence_rows.to(device)
    return sequence_log_probs(head, flat_forward(model, inputs), inputs.targets, inputs.weights, rows_of_sequence_S)
